"""Promotion and rollback by hand: the Prefect flows, the commands, and the retrainings after a rollback."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import SECTIONS, Pipeline, PipelinesFile
from flows.notifications.verdicts import read_verdict
from flows.operations import flows
from flows.operations.retention import prune
from flows.registry import versions
from flows.registry.champion import GATE, promote, read_moves, rollback
from flows.retrain.flow import Outcome, retrain
from flows.state.root import StateRoot
from gptcore.bundle import load
from gptcore.errors import GPTCoreError
from tests.servers import gptflow

MODEL = "gpt-tiny"


def night(pipeline: Pipeline, force: bool = False, **train: object) -> Outcome:
    """Run one retraining and return its outcome."""
    asked = pipeline.model_copy(update={"train": pipeline.train.model_copy(update=train)})
    sections = {name: getattr(asked, name) for name in SECTIONS}
    return retrain(asked.name, asked.model_name, **sections, force=force, return_state=True).result()


def champion_number(root: StateRoot) -> int:
    champion = versions.find_champion(root, MODEL)
    assert champion is not None
    return int(champion.version)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_retrainings_after_a_rollback_promote_better_weights_but_not_the_withdrawn_ones(
    tiny: Pipeline, root: StateRoot
) -> None:
    assert night(tiny, max_steps=20).verdict == "promoted"
    assert night(tiny, max_steps=120).verdict == "promoted"
    rollback(root, MODEL, "it swears", "ann")
    first = night(tiny, force=True, max_steps=120)
    assert first.verdict == "rejected" and "rolled back by ann: it swears" in first.reason
    assert champion_number(root) == 1
    second = night(tiny, max_steps=300)
    assert second.verdict == "promoted" and champion_number(root) == 4
    described = versions.describe(root, versions.resolve(root, f"models:/{MODEL}/4"))
    assert (described["parent_version"], described["verdict"]) == ("1", "promoted")
    assert [(move.source, move.target, move.by) for move in read_moves(root, MODEL)] == [
        (None, "1", GATE),
        ("1", "2", GATE),
        ("2", "1", "ann"),
        ("1", "4", GATE),
    ]
    freed = prune(root, {MODEL: 1})
    assert set(freed.versions) == {f"models:/{MODEL}/2", f"models:/{MODEL}/3"}
    assert rollback(root, MODEL, "so does this", "ann").target == "1"
    load(versions.fetch_bundle(root, MODEL, "1"))
    back = night(tiny, max_steps=120)  # pruned, so the version is trained again; its weights are still withdrawn
    assert back.verdict == "rejected" and "it swears" in back.reason


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_operations_are_flows_with_typed_and_described_parameters(tiny_registry: Any, project: Path) -> None:
    for _ in range(2):
        tiny_registry.register()
    root = tiny_registry.root
    described = {flow.name: flow.parameters.model_dump()["properties"] for flow in flows.OPERATIONS}
    assert set(described) == {"promote", "rollback", "prune"}
    assert all(field["description"] for fields in described.values() for field in fields.values())
    assert (described["promote"]["version"]["type"], described["promote"]["reason"]["minLength"]) == ("integer", 1)
    assert read_verdict(flows.promote(MODEL, 1, "first", return_state=True)) == "promoted"
    assert read_verdict(flows.promote(MODEL, 1, "again", return_state=True)) == "unchanged"
    assert read_verdict(flows.promote(MODEL, 2, "second", return_state=True)) == "promoted"
    state = flows.rollback(MODEL, "bad", return_state=True)
    assert (state.name, state.message) == ("Completed", f"rolled back: {MODEL}: version 2 -> 1: bad")
    assert all(move.by.startswith("Prefect flow run ") for move in read_moves(root, MODEL))
    with pytest.raises(GPTCoreError, match="no earlier champion"):
        flows.rollback(MODEL, "bad")
    keep = flows.build_parameters(flows.prune, PipelinesFile(project / "pipelines.yaml"))
    assert keep == {"keep": {MODEL: 10}}
    state = flows.prune({MODEL: 1}, dry_run=True, return_state=True)
    assert state.message is not None and state.message.endswith("bytes would be freed")


@pytest.mark.slow
def test_promote_rollback_show_models_and_prune_work_from_the_command_line(tiny_registry: Any, project: Path) -> None:
    for _ in range(3):
        tiny_registry.register()
    promote(tiny_registry.root, MODEL, "1", "first", GATE)
    done = gptflow(project, "promote", f"{MODEL}/2", "--reason", "nicer")
    assert (done.returncode, done.stdout) == (0, f"{MODEL}: version 2 is champion, after 1\n"), done.stderr
    done = gptflow(project, "rollback", MODEL, "--reason", "worse", "--json")
    body = json.loads(done.stdout)
    assert (body["model"], body["from"], body["to"], body["kind"]) == (MODEL, "2", "1", "rolled back")
    shown = json.loads(gptflow(project, "show", f"models:/{MODEL}/2", "--json").stdout)
    assert [move["kind"] for move in shown["moves"]] == ["promoted by a person", "rolled back"]
    assert "rolled back, version 2 -> 1" in gptflow(project, "show", f"models:/{MODEL}@champion").stdout
    assert "rejected, withdrawn" in gptflow(project, "models").stdout
    (project / "pipelines.yaml").write_text("pipelines: {tiny: {retrain: {keep: 1}}}")
    listed = json.loads(gptflow(project, "prune", "--dry-run", "--json").stdout)
    assert listed["versions"] == [f"models:/{MODEL}/2"] and listed["bytes"] == sum(listed["paths"].values()) > 0
    assert "1 versions, " in gptflow(project, "prune").stdout
    assert len(MlflowClient(tiny_registry.root.tracking_uri).search_model_versions(f"name = '{MODEL}'")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["promote", "gpt-tiny", "9", "--reason", "x"], "models:/gpt-tiny/9 does not exist; gpt-tiny has versions 1"),
        (["promote", "nobody", "1", "--reason", "x"], "no registered model 'nobody'"),
        (["rollback", "gpt-tiny", "--reason", "x"], "no earlier champion to go back to"),
        (["rollback", "gpt-tiny"], "Missing option '--reason'"),
        (["promote", "gpt-tiny", "1", "--reason", " "], "say why"),
    ],
)
def test_an_impossible_promotion_or_rollback_is_refused_with_exit_code_2(
    tiny_registry: Any, project: Path, arguments: list[str], part: str
) -> None:
    tiny_registry.register()
    done = gptflow(project, *arguments)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_promote_rollback_and_prune_commands_do_not_import_prefect() -> None:
    program = "import sys, flows.cli.registry, flows.registry.champion, flows.operations.retention\n"
    program += "assert 'prefect' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

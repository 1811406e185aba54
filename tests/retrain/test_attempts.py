"""Trainings that outlive a run: they are paused or killed, and later resumed on their first text or abandoned."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.differences import differences
from flows.retrain import attempts
from flows.state.root import StateRoot
from gptcore.corpus.ingest import ingest
from gptcore.errors import CheckpointError, ConfigError, TrainingDiverged
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.training.run_directory import RunDirectory
from tests.retrain.test_policy import asking, run
from tests.tiny import prose

pytestmark = pytest.mark.usefixtures("prefect_server", "root")


def run_directories(root: StateRoot) -> list[Path]:
    return sorted((root.path / "runs" / "tiny").glob("*-*/"))


def paused_once(tiny: Pipeline) -> Pipeline:
    """Pause a training after one session of one update; return the pipeline for the next runs."""
    name, outcome = run(asking(tiny, train={"session_seconds": 0.001}))
    assert (name, outcome.verdict) == ("paused", "paused")
    assert "session_seconds are over at step 1" in outcome.reason
    return tiny


def statuses(root: StateRoot) -> list[str]:
    client = MlflowClient(root.tracking_uri)
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return sorted(run.info.status for run in found)


def test_a_paused_training_is_finished_on_its_first_text_before_a_run_trains_on_new_text(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    asked = paused_once(tiny)
    assert statuses(root) == ["SCHEDULED"]
    (only,) = run_directories(root)
    (project / "text" / "two.txt").write_text(prose(2, 9000))
    name, outcome = run(asked)
    assert (name, outcome.uri, outcome.run_directory) == ("promoted", "models:/gpt-tiny/1", str(only))
    assert [line["step"] for line in RunDirectory(only).read_metrics()] == list(range(1, 61))
    assert statuses(root) == ["FINISHED"]
    _, outcome = run(asked)
    assert outcome.uri == "models:/gpt-tiny/2" and len(run_directories(root)) == 2


@pytest.mark.slow
def test_a_training_in_sessions_ends_with_the_weights_of_an_uninterrupted_one(tiny: Pipeline, root: StateRoot) -> None:
    asked = paused_once(asking(tiny, train={"max_steps": 12}))
    run(asked)
    run(asked, force=True)
    first, second = (version.tags for version in versions.list_versions(root, "gpt-tiny"))
    assert first["run_key"] == second["run_key"] and first["weights_sha256"] == second["weights_sha256"]


@pytest.mark.slow
def test_restart_abandons_a_paused_training_and_starts_on_the_new_text(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    asked = asking(paused_once(tiny), retrain={"unfinished": "restart"})
    (before,) = run_directories(root)
    (project / "text" / "two.txt").write_text(prose(2, 3000))
    _, outcome = run(asked)
    assert outcome.run_directory != str(before) and RunDirectory(before).read_result() is None


def test_a_training_that_failed_or_has_other_settings_or_sources_is_not_resumed(
    tiny: Pipeline, root: StateRoot
) -> None:
    asked = paused_once(tiny)
    assert attempts.find_unfinished(root, resolved(asked)) is not None
    other = asking(asked, train={"learning_rate": 0.02})
    assert attempts.find_unfinished(root, resolved(other)) is None
    assert attempts.explain_restart(root, resolved(other)).endswith("is not resumed: train.learning_rate 0.01 -> 0.02")
    long_warm_up = asking(asked, train={"max_steps": None, "max_epochs": 1, "warmup_steps": 10**6})
    tokens = load_tokens(next(root.tokens.glob("[0-9a-f]*")))
    with pytest.raises(ConfigError, match=r"warmup_steps 1000000 are not fewer than the \d\d+ updates of the budget"):
        attempts.check_fits(long_warm_up, tokens)
    assert attempts.find_unfinished(root, resolved(asked), sources_overridden=True) is None
    assert attempts.find_unfinished(root, resolved(asking(asked, train={"start_from": "champion"}))) is not None
    (directory,) = run_directories(root)
    RunDirectory(directory).record_failure(TrainingDiverged("it diverged", 1))
    assert attempts.find_unfinished(root, resolved(asked)) is None and not attempts.explain_restart(root, other)


def test_a_training_goes_on_with_another_number_of_cores_and_the_run_and_the_version_say_so(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asking(tiny, train={"threads": "auto", "max_steps": 5})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    paused_once(asked)
    (only,) = run_directories(root)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    name, outcome = run(asked)
    assert (name, outcome.run_directory, run_directories(root)) == ("rejected", str(only), [only])
    assert "changed since its last start: threads 2 -> 1" in caplog.text
    assert [line["step"] for line in RunDirectory(only).read_metrics()] == list(range(1, 6))
    version = versions.resolve(root, outcome.uri)
    lineage = versions.read_lineage(root, version)
    assert [execution["threads"] for execution in lineage["executions"]] == [2, 1]
    assert lineage["hardware"]["threads"] == lineage["config"]["train"]["threads"] == 1
    assert lineage["run_config"]["in_run_key"]["threads"] == 2 and only.name.startswith(version.tags["run_key"][:16])
    assert [difference.what for difference in differences(lineage) if difference.is_decisive] == ["execution"]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert run(asked)[0] == "skipped"


def test_a_training_that_began_on_a_gpu_goes_on_without_it_unless_the_request_was_changed(
    tiny: Pipeline, root: StateRoot
) -> None:
    on_a_gpu = {"device": "cuda", "precision": "bf16", "compile": True, "threads": 8}
    first = begin(root, tiny, on_a_gpu)
    assert first is not None and first.changes == ""
    for change in ({"precision": "fp32"}, {"device": "cpu"}, {"compile": False}, {"learning_rate": 0.02}):
        assert attempts.find_unfinished(root, asking(tiny, train=change)) is None, change
    found = attempts.find_unfinished(root, tiny)
    assert found is not None and (found.run, found.run_key) == (first.run, first.run_key)
    assert found.changes == "device cuda -> cpu, compile True -> False, threads 8 -> 1"
    assert found.run.read_config().train == found.train and found.train.precision == "bf16"
    left = begin(root, asking(tiny, train={"precision": "fp32"}), {**on_a_gpu, "precision": "fp32"})
    assert left is not None and left.run != first.run, "an explicit change is another training"
    again = begin(root, tiny, {"device": "cpu", "precision": "fp32", "compile": False, "threads": 1})
    assert again is not None and again.run == first.run, "found without current.json"
    name, outcome = run(tiny)
    assert (name, outcome.run_directory) == ("promoted", str(first.run.path))
    (execution,) = versions.read_lineage(root, versions.resolve(root, outcome.uri))["executions"]
    assert (execution["device"], execution["precision"]) == ("cpu", "bf16"), "no update was made on the GPU"


def begin(root: StateRoot, pipeline: Pipeline, machine: dict[str, Any]) -> attempts.Attempt | None:
    """Begin a training as on a machine where `auto` has these values."""
    snapshot = ingest(pipeline.corpus, root.corpora, root.project)
    tokens = tokenize(snapshot.path, pipeline.corpus.tokenizer, root.tokens)
    there = pipeline.train.model_copy(update={**machine, "processes": 1})
    resolved = pipeline.model_copy(update={"train": there})
    return attempts.begin(root, resolved, pipeline.train, snapshot, tokens, start=None, force=False)


@pytest.mark.slow
def test_an_unfinished_training_whose_text_is_gone_is_abandoned(tiny: Pipeline, root: StateRoot) -> None:
    asked = paused_once(tiny)
    for snapshot in root.corpora.iterdir():
        snapshot.rename(root.path / "elsewhere")
    assert attempts.find_unfinished(root, resolved(asked)) is None
    assert run(asked)[0] == "promoted"


def test_damaged_tokens_of_a_paused_training_are_made_again_and_a_damaged_text_is_refused_with_the_fix(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    asked = paused_once(tiny)
    tokens, corpus = next(root.tokens.glob("[0-9a-f]*")), next(root.corpora.glob("[0-9a-f]*"))
    first = attempts.find_unfinished(root, resolved(asked))
    intact = {path: path.read_bytes() for path in (tokens / "train.bin", corpus / "train.txt")}
    for path, data in intact.items():
        path.write_bytes(data[:200] + bytes(100) + data[300:])
    (project / "text" / "two.txt").write_text(prose(2, 3000))  # the sources no longer give the same text
    refused = rf"the unfinished training .* is not resumed: .*train\.txt .*Delete the directory {corpus}\."
    with pytest.raises(CheckpointError, match=refused):
        attempts.find_unfinished(root, resolved(asked))
    (corpus / "train.txt").write_bytes(intact[corpus / "train.txt"])
    assert attempts.find_unfinished(root, resolved(asked)) == first
    assert (tokens / "train.bin").read_bytes() == intact[tokens / "train.bin"]


def resolved(pipeline: Pipeline) -> Any:
    from gptcore.training.resolve import resolve

    return pipeline.model_copy(update={"train": resolve(pipeline.train)})

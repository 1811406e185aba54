"""Training a version again: equal conditions give equal weights, and different conditions are named first."""

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.config.pipelines import SECTIONS, PipelinesFile
from flows.registry import versions
from flows.registry.differences import differences, materials
from flows.retrain.flow import retrain
from flows.state.root import StateRoot
from tests.fixtures import forge
from tests.servers import gptflow
from tests.tiny import write_project

URI = "models:/gpt-tiny/1"
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Path]:
    """A project with one version, made once. The fixture `root` restores its state after each test."""
    project = tmp_path_factory.mktemp("released")
    write_project(project, model={"drop_rate": 0.1}, train={"max_steps": 30}, sample={"max_new_tokens": 5})
    root = StateRoot(project / "mlruns").prepare()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GPTFLOW_HOME", str(root.path))
        patched.setenv("MLFLOW_TRACKING_URI", root.tracking_uri)
        asked = PipelinesFile(project / "pipelines.yaml").pipeline("tiny")
        sections = {name: getattr(asked, name) for name in SECTIONS}
        retrain(asked.name, asked.model_name, **sections)
    (project / "pipelines.yaml").write_text("pipelines:\n  other: {}\n")  # today's file does not name the pipeline
    shutil.rmtree(project / "text")
    yield project


@pytest.fixture
def root(released: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateRoot]:
    """The state root of the released version, restored after the test."""
    root = StateRoot(released / "mlruns")
    monkeypatch.setenv("GPTFLOW_HOME", str(root.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", root.tracking_uri)
    kept = released / "kept"
    shutil.copytree(root.path, kept, symlinks=True)
    yield root
    databases = ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal")
    for path in root.path.iterdir():
        if path.name not in databases:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in kept.iterdir():
        if path.name not in databases:
            path.rename(root.path / path.name)
    # The file stays, because MLflow keeps connections to it.
    with (
        closing(sqlite3.connect(kept / "mlflow.db")) as before,
        closing(sqlite3.connect(root.path / "mlflow.db")) as now,
    ):
        before.backup(now)
    shutil.rmtree(kept)


def described(root: StateRoot) -> dict[str, Any]:
    return versions.describe(root, versions.resolve(root, URI))


def rewrite(root: StateRoot, edit: Edit) -> None:
    """Change the version's lineage with `edit`."""
    path = versions.fetch_bundle(root, "gpt-tiny", "1") / "lineage.json"
    lineage = json.loads(path.read_text())
    edit(lineage)
    path.write_text(json.dumps(lineage))
    forge(root, "gpt-tiny", "1")


def reproduce(root: StateRoot, *options: str, uri: str = URI) -> "subprocess.CompletedProcess[str]":
    return gptflow(root.path.parent, "reproduce", uri, *options)


def files(root: StateRoot) -> set[str]:
    """Return the files in the state root, apart from logs, locks and Prefect's own home."""
    every = (path.relative_to(root.path) for path in root.path.rglob("*") if path.is_file())
    return {str(path) for path in every if path.parts[0] not in ("logs", "prefect", "locks")}


def set_to(*keys: str, value: object) -> Edit:
    def edit(lineage: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            lineage = lineage[key]
        lineage[last] = value

    return edit


def names(root: StateRoot, tmp_path: Path) -> list[str]:
    then = described(root)
    _, lost = materials(root, then, tmp_path / "work")
    return [difference.what for difference in [*differences(then), *lost] if difference.is_decisive]


def test_no_difference_is_found_right_after_the_training(root: StateRoot, tmp_path: Path) -> None:
    assert names(root, tmp_path) == []


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (set_to("packages", "torch", value="1.0"), ["package torch"]),
        (set_to("packages", "never-installed", value="1.0"), ["package never-installed"]),
        (set_to("python", value="3.4.0"), ["python"]),
        (set_to("gptcore_sha256", value="0" * 64), []),
        (set_to("code_commit", value="0" * 40), []),
        (set_to("code_dirty", value="unknown"), []),
        (set_to("run_config", "training_version", value=0), ["training version"]),
        (set_to("run_config", "train", "max_seconds", value=3.0), ["train.max_seconds"]),
        (set_to("hardware", "processor", value="abacus"), ["processor"]),
        (set_to("hardware", "device", value="cuda:7"), ["device"]),
        (set_to("hardware", "threads", value=4096), ["threads"]),
        (set_to("executions", value=[{"threads": 2}, {"threads": 1}]), ["execution"]),
        (set_to("documents_sha256", value="0" * 64), ["documents"]),
    ],
)
def test_a_changed_condition_is_named_if_the_weights_may_depend_on_it(
    root: StateRoot, tmp_path: Path, edit: Edit, named: list[str]
) -> None:
    rewrite(root, edit)
    assert names(root, tmp_path) == named


def test_altered_and_pruned_snapshots_are_named(root: StateRoot, tmp_path: Path) -> None:
    snapshot = root.corpora / described(root)["corpus_sha256"][:16]
    text = snapshot / "holdout.txt"
    text.write_text(text.read_text().replace("model", "motel", 1))
    then = described(root)
    _, (altered,) = materials(root, then, tmp_path / "work")
    assert altered.what == "corpus snapshot" and "holdout.txt has sha256" in altered.now
    shutil.rmtree(snapshot)
    _, (gone,) = materials(root, then, tmp_path / "work")
    assert gone.what == "corpus snapshot" and gone.now == f"{snapshot} is gone"
    shutil.rmtree(root.tokens / then["tokens_sha256"][:16])
    there, lost = materials(root, then, tmp_path / "work")
    assert [difference.what for difference in lost] == ["corpus snapshot", "tokens"]
    assert there.snapshot is there.tokens is None


def test_missing_tokens_are_made_again_from_the_snapshot(root: StateRoot, tmp_path: Path) -> None:
    then = described(root)
    shutil.rmtree(root.tokens / then["tokens_sha256"][:16])
    there, lost = materials(root, then, tmp_path)
    assert there.tokens is not None and there.tokens.path.parent == tmp_path
    assert there.tokens.sha256 == then["tokens_sha256"] and lost == []


def test_the_weights_of_a_warm_start_are_named_if_they_are_missing_or_different(
    root: StateRoot, tmp_path: Path
) -> None:
    ancestor = {"uri": URI, "weights_sha256": described(root)["weights_sha256"], "corpus_sha256": "0" * 64}
    rewrite(root, set_to("ancestors", value=[ancestor]))
    there, lost = materials(root, described(root), tmp_path)
    assert there.start is not None and there.start.name == "model.safetensors" and lost == []
    rewrite(root, set_to("ancestors", value=[{**ancestor, "weights_sha256": "0" * 64}]))
    _, (other,) = materials(root, described(root), tmp_path)
    assert other.what == f"weights of {URI}" and other.then == "0" * 64
    rewrite(root, set_to("ancestors", value=[{**ancestor, "uri": "models:/gpt-tiny/7"}]))
    there, (gone,) = materials(root, described(root), tmp_path)
    assert there.start is None and "models:/gpt-tiny/7 does not exist" in gone.now


@pytest.mark.slow
def test_a_version_trained_again_has_equal_weights_and_nothing_is_written(root: StateRoot) -> None:
    before = files(root)
    done = reproduce(root, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["equal"] and told["reproduced_weights_sha256"] == described(root)["weights_sha256"]
    assert told["reproduced_bits_per_byte"] == described(root)["holdout_bits_per_byte"]
    assert files(root) == before
    assert len(versions.list_versions(root)) == 1
    assert not list((root.path / "runs").glob(".tmp-*"))
    shown = reproduce(root)
    assert shown.returncode == 0 and "equal, bit for bit" in shown.stdout and told["weights_sha256"] in shown.stdout


@pytest.mark.slow
def test_a_difference_is_named_and_stops_the_command_unless_anyway_is_given(root: StateRoot) -> None:
    rewrite(root, set_to("packages", "torch", value="1.0"))
    stopped = reproduce(root)
    assert stopped.returncode == 2 and "package torch" in stopped.stdout and "package torch" in stopped.stderr
    assert "--anyway" in stopped.stderr and "Traceback" not in stopped.stderr and "trained again" not in stopped.stdout
    told = json.loads(reproduce(root, "--json").stdout)
    assert told["equal"] is None and told["differences"][0]["then"] == "1.0"
    rewrite(root, set_to("run_config", "train", "seed", value=1))  # imitates the effect of another torch
    done = reproduce(root, "--anyway")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not equal" in done.stdout and "There were differences" in done.stdout


@pytest.mark.slow
def test_different_weights_under_the_same_conditions_are_a_failure(root: StateRoot) -> None:
    rewrite(root, set_to("weights_sha256", value="0" * 64))
    done = reproduce(root)
    assert done.returncode == 1 and "under the same conditions gave" in done.stderr


@pytest.mark.slow
def test_anyway_works_with_tokens_alone_but_not_without_text_and_an_unknown_version_is_refused(root: StateRoot) -> None:
    then = described(root)
    shutil.rmtree(root.corpora / then["corpus_sha256"][:16])
    on_tokens = reproduce(root, "--anyway", "--json")
    assert on_tokens.returncode == 0, on_tokens.stderr
    assert json.loads(on_tokens.stdout)["equal"] and json.loads(on_tokens.stdout)["reproduced_bits_per_byte"] is None
    shutil.rmtree(root.tokens / then["tokens_sha256"][:16])
    done = reproduce(root, "--anyway")
    assert done.returncode == 2 and "there is no text" in done.stderr
    unknown = reproduce(root, uri="models:/gpt-tiny/9")
    assert unknown.returncode == 2 and "models:/gpt-tiny/9 does not exist" in unknown.stderr

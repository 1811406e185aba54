"""A state root that was moved or copied: the paths in its database follow, and every lookup finds the new place."""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.registry import versions
from flows.state import locks, relocate
from flows.state.root import StateRoot
from gptcore.bundle import load
from gptcore.errors import GPTCoreError
from tests.servers import Prefect, Up, clean, gptflow
from tests.tiny import write_pipelines


def cells(database: Path, text: str) -> list[tuple[str, str, str]]:
    """Return table, column and value of everything in the database that contains `text`."""
    connection = sqlite3.connect(database)
    tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    columns = [(table, row[1]) for table in tables for row in connection.execute(f"pragma table_info({table})")]
    return [
        (table, column, value)
        for table, column in columns
        for (value,) in connection.execute(f"select {column} from {table} where instr({column}, ?)", (text,))
    ]


def state_of(root: StateRoot) -> dict[str, Any]:
    return dict(json.loads((root.path / "state.json").read_text()))


@pytest.fixture
def home(tiny_registry: Any, monkeypatch: pytest.MonkeyPatch) -> StateRoot:
    """A state root with a version of gpt-tiny, which the environment no longer names."""
    tiny_registry.register()
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    return StateRoot(tiny_registry.root.path)


def copied(home: StateRoot, to: Path) -> StateRoot:
    return StateRoot(Path(shutil.copytree(home.path, to)))


def answers(root: StateRoot) -> None:
    """Check that the only version is found inside the root and loads."""
    # Not versions.fetch_bundle: this process queried MLflow about another root, and MLflow caches the answer.
    files = Path(MlflowClient(root.tracking_uri).get_model_version_download_uri("gpt-tiny", "1"))
    assert files.is_relative_to(root.path)
    load(files / "artifacts" / versions.BUNDLE)


@pytest.mark.parametrize("has_state_file", [True, False], ids=["same release", "older release"])
def test_a_copy_works_without_the_original_and_the_original_keeps_working(
    home: StateRoot, tmp_path: Path, has_state_file: bool
) -> None:
    if not has_state_file:
        (home.path / "state.json").unlink()
    (home.path / "up.json").write_text("{}")
    before = cells(home.path / "mlflow.db", str(tmp_path))
    copy = copied(home, tmp_path / "copy").prepare()
    assert cells(copy.path / "mlflow.db", str(home.path)) == []
    assert len(cells(copy.path / "mlflow.db", str(copy.path))) == len(before)
    shutil.move(home.path, tmp_path / "away")
    answers(copy)
    shutil.move(tmp_path / "away", home.path)
    assert cells(home.path / "mlflow.db", str(tmp_path)) == before
    answers(home.prepare())
    assert copy.id != home.id
    assert not (copy.path / "up.json").exists() and (home.path / "up.json").exists()


def test_a_moved_state_keeps_its_id_and_its_record_of_running_servers(home: StateRoot, tmp_path: Path) -> None:
    (home.path / "up.json").write_text("{}")
    identity = home.id
    moved = StateRoot(home.path.rename(tmp_path / "moved")).prepare()
    answers(moved)
    assert moved.id == identity and (moved.path / "up.json").exists()
    assert state_of(moved) == {"format": 1, "id": identity, "path": str(moved.path)}


def test_only_paths_and_uris_into_the_old_root_are_rewritten(home: StateRoot, tmp_path: Path) -> None:
    old, new = str(home.path), str(tmp_path / "new home")
    locations = {
        "plain": (f"{old}/artifacts/plain", f"{new}/artifacts/plain"),
        "uri": (f"file://{old}/a", f"file://{new}/a"),
        "neighbour": (f"{old}-old/artifacts", f"{old}-old/artifacts"),
        "neighbour-uri": (f"file://{old}-old", f"file://{old}-old"),
        "inside": (f"/backup{old}/artifacts", f"/backup{old}/artifacts"),
        "remote": ("s3://bucket/mlruns", "s3://bucket/mlruns"),
    }
    with sqlite3.connect(home.path / "mlflow.db") as connection:
        for name, (before, _) in locations.items():
            connection.execute(
                "insert into experiments (name, artifact_location, lifecycle_stage, workspace)"
                " values (?, ?, 'active', 'default')",
                (name, before),
            )
        told = json.dumps({"sources": ["/text"], "snapshot": f"{old}/corpora/1", "beside": f"{old}-old/x"})
        connection.execute(
            "insert into datasets (dataset_uuid, experiment_id, name, digest, dataset_source_type, dataset_source)"
            " values ('1', 1, 'tiny', '1', 'x', ?)",
            (told,),
        )
    copied(home, Path(new)).prepare()
    with sqlite3.connect(Path(new) / "mlflow.db") as connection:
        found = dict(connection.execute("select name, artifact_location from experiments"))
        (source,) = connection.execute("select dataset_source from datasets").fetchone()
    assert {name: found[name] for name in locations} == {name: after for name, (_, after) in locations.items()}
    assert json.loads(source) == {"sources": ["/text"], "snapshot": f"{new}/corpora/1", "beside": f"{old}-old/x"}


@pytest.mark.parametrize("killed_at", ["_rewrite_paths", "_write_state"])
def test_a_rewrite_that_was_killed_is_repeated_after_the_state_was_moved_again(
    home: StateRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    original = getattr(relocate, killed_at)
    calls = 0

    def killed(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if killed_at == "_rewrite_paths" or calls == 2:  # the second write removes the old path
            raise KeyboardInterrupt
        original(*arguments)

    inside = home.path.rename(tmp_path / "first")
    nested = tmp_path / "second" / "first"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(relocate, killed_at, killed)
        StateRoot(inside).prepare()
    nested.parent.mkdir()
    last = StateRoot(inside.rename(nested)).prepare()
    answers(last)
    for gone in (home.path, inside):
        assert cells(last.path / "mlflow.db", f"{gone}/") == []
    assert "formerly" not in state_of(last)


def test_a_state_moved_into_its_old_directory_is_rewritten_only_once(
    home: StateRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = home.path.rename(tmp_path / "away")
    home.path.mkdir()
    inner = StateRoot(away.rename(home.path / "inner"))
    relocate._rewrite_paths(inner.path / "mlflow.db", (str(home.path),), str(inner.path))  # then it was killed
    inner.prepare()
    answers(inner)
    assert cells(inner.path / "mlflow.db", "inner/inner") == []


def test_a_moved_state_that_is_in_use_is_refused_and_nothing_is_changed(home: StateRoot, tmp_path: Path) -> None:
    moved = StateRoot(home.path.rename(tmp_path / "moved"))
    before = cells(moved.path / "mlflow.db", str(home.path))
    with (
        locks.hold(moved.lock_path("tiny")),
        pytest.raises(GPTCoreError, match=r"in use \(tiny.lock is held\).*Stop what"),
    ):
        moved.prepare()
    assert cells(moved.path / "mlflow.db", str(home.path)) == before
    answers(moved.prepare())


def test_a_newer_format_and_a_damaged_file_are_refused_with_the_fix(tmp_path: Path) -> None:
    root = StateRoot(tmp_path / "mlruns").prepare()
    (root.path / "state.json").write_text('{"format": 7, "unheard": "of"}')
    with pytest.raises(GPTCoreError, match=r"format 7.*reads format 1\. Upgrade gptflow, or set GPTFLOW_HOME"):
        root.prepare()
    (root.path / "state.json").write_text('{"format": 1')
    with pytest.raises(GPTCoreError, match=r"state\.json is damaged.*Delete it"):
        root.prepare()
    (root.path / "state.json").unlink()
    (root.path / "mlflow.db").write_text("no database" * 100)
    with pytest.raises(GPTCoreError, match=r"mlflow\.db cannot be used.*Restore it from a backup"):
        root.prepare()


def test_preparing_a_state_again_changes_no_byte(home: StateRoot) -> None:
    def bytes_there() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}

    before = bytes_there()
    home.prepare()
    assert bytes_there() == before


@pytest.mark.slow
def test_a_trained_state_works_in_a_new_place_when_the_old_one_is_gone(
    project: Path, tmp_path: Path, server: Prefect
) -> None:
    there = {"PREFECT_API_URL": server.url}
    assert gptflow(project, "run", "tiny", **there).returncode == 0
    elsewhere = tmp_path / "else where" / "state"
    shutil.copytree(project / "mlruns", elsewhere)
    (project / "mlruns").rename(project / "away")
    uri, home = "models:/gpt-tiny@champion", str(elsewhere)
    (listed,) = json.loads(gptflow(project, "models", "--json", GPTFLOW_HOME=home).stdout)
    assert listed["aliases"] == ["champion"]
    shown = json.loads(gptflow(project, "show", uri, "--json", GPTFLOW_HOME=home).stdout)
    assert shown["weights_sha256"] == listed["weights_sha256"]
    text = gptflow(project, "generate", uri, "--prompt", "The model", GPTFLOW_HOME=home)
    assert text.returncode == 0 and text.stdout.startswith("The model"), text.stderr
    program = f"import mlflow; print(mlflow.pyfunc.load_model({uri!r}).predict(['The model']))"
    tracking = f"sqlite:///{elsewhere / 'mlflow.db'}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean(MLFLOW_TRACKING_URI=tracking), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    freed = json.loads(gptflow(project, "prune", "--dry-run", "--json", GPTFLOW_HOME=home).stdout)
    assert freed["paths"] == {}
    again = gptflow(project, "run", "tiny", GPTFLOW_HOME=home, **there)
    assert again.returncode == 0 and "nothing changed since version 1" in again.stdout, again.stdout + again.stderr
    better = gptflow(project, "run", "tiny", "--set", "train.max_steps=120", GPTFLOW_HOME=home, **there)
    assert better.returncode == 0 and "models:/gpt-tiny/2" in better.stdout, better.stdout + better.stderr
    assert not (project / "mlruns").exists()


@pytest.mark.deep
def test_gptflow_up_updates_the_deployments_of_a_moved_state(up: Up, tmp_path: Path) -> None:
    up.start()
    up.stop()
    moved = (up.project / "mlruns").rename(tmp_path / "moved")
    write_pipelines(up.project, other={})
    up.root = StateRoot(moved)
    up.start(GPTFLOW_HOME=str(moved))
    said = up.log.read_text()
    assert "removed    tiny" in said and "unchanged  promote" in said, said
    run = up.prefect.start("other", train={"max_steps": 5})
    assert up.prefect.ended(run)["type"] == "COMPLETED"
    assert list(moved.glob("runs/other/*/final")) and not (up.project / "mlruns").exists()

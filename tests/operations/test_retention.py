"""Retention on a real SQLite registry: what is deleted, what is kept after any history, and kills in between."""

import json
import os
import random
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.operations.retention import prune
from flows.registry import versions
from flows.registry.champion import NoPrevious, complete_log, promote, read_moves, rollback
from flows.registry.moves import trace_champions
from flows.retrain.attempts import CURRENT
from flows.state import locks
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import load

MODEL = "gpt-tiny"


def numbers(root: StateRoot) -> set[str]:
    return {str(version.version) for version in versions.list_versions(root, MODEL)}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def files_of(root: StateRoot, version: Any) -> list[Path]:
    """Return a path for each thing on disk that belongs to a version or that it was made from."""
    tags, client = version.tags, MlflowClient(root.tracking_uri)
    run = client.get_run(version.run_id)
    return [
        root.run_directory("tiny", tags["run_key"], 1) / "final" / "model.safetensors",
        Path(run.info.artifact_uri) / "plots" / "losses.png",
        root.corpora / tags["corpus_sha256"][:16] / "text",
        Path(client.get_logged_model(run.outputs.model_outputs[0].model_id).artifact_location) / "artifacts" / "bundle",
    ]


def test_old_versions_are_deleted_with_all_their_files_and_everything_that_only_they_needed(tiny_registry: Any) -> None:
    root = tiny_registry.root
    for corpus in ("old", "old", "shared", "shared", "new"):
        tiny_registry.register(corpus=corpus)
    every = versions.list_versions(root, MODEL)
    files = {str(version.version): files_of(root, version) for version in every}
    dry = prune(root, {MODEL: 2}, dry_run=True)
    assert numbers(root) == set("12345") and all(path.exists() for paths in files.values() for path in paths)
    freed = prune(root, {MODEL: 2})
    assert (dry.versions, dry.paths) == (freed.versions, freed.paths)
    assert freed.versions == [f"models:/{MODEL}/{number}" for number in (3, 2, 1)] and freed.bytes > 3000
    assert numbers(root) == set("45")
    assert all(path.exists() for number in "45" for path in files[number])
    run_files, _, corpus, bundle = files["1"]
    assert not any(path.exists() for path in (run_files.parents[1], corpus.parent, bundle, files["3"][1].parent))
    assert len(names(root.corpora)) == len(names(root.tokens)) == 2
    again = prune(root, {MODEL: 2})
    assert (again.versions, again.paths) == ([], {})
    run = tiny_registry.client.get_run(every[0].run_id)
    assert run.data.tags["pruned"] == "done"


def test_a_version_with_an_alias_a_copy_or_a_warm_started_descendant_is_kept(tiny_registry: Any) -> None:
    root, client = tiny_registry.root, tiny_registry.client
    for _ in range(6):
        tiny_registry.register()
    client.set_registered_model_alias(MODEL, "demo", "1")
    client.copy_model_version(f"models:/{MODEL}/2", "elsewhere")
    client.set_model_version_tag(MODEL, "6", "started_from", f"models:/{MODEL}/5")
    client.set_model_version_tag(MODEL, "5", "started_from", f"models:/{MODEL}/3")
    prune(root, {MODEL: 1})
    assert numbers(root) == set("12356")
    load(versions.fetch_bundle(root, "elsewhere", "1"))


def test_undecided_imported_and_unnamed_models_are_left_alone(tiny_registry: Any) -> None:
    root, client = tiny_registry.root, tiny_registry.client
    for _ in range(4):
        tiny_registry.register()
    client.delete_model_version_tag(MODEL, "1", "verdict")
    client.delete_model_version_tag(MODEL, "2", "run_key")
    assert prune(root, {"another-model": 1}).versions == []
    prune(root, {MODEL: 1})
    assert numbers(root) == set("124")


def test_the_files_of_current_trainings_are_kept_and_those_of_an_abandoned_training_are_freed(
    tiny_registry: Any,
) -> None:
    root = tiny_registry.root
    for name, is_finished in (("paused", False), ("unregistered", True), ("left", False)):
        _, tokens = tiny_registry.text(name)
        tiny_registry.run_directory(0, manifest.sha256_of(name), tokens, 1, is_finished)
    noted = {
        "own": f"{manifest.sha256_of('paused')[:16]}-1",
        "overridden": f"{manifest.sha256_of('unregistered')[:16]}-1",
    }
    (root.path / "runs" / "tiny" / CURRENT).write_text(json.dumps(noted))
    for corpus in ("old", "new"):
        tiny_registry.register(corpus=corpus)
    with locks.hold(root.lock_path("tiny")):  # a run of the pipeline may be preparing a text
        assert prune(root, {MODEL: 2}).paths == {}
    prune(root, {MODEL: 1})
    kept = {manifest.sha256_of(["corpus", name])[:16] for name in ("paused", "unregistered", "new")}
    assert names(root.corpora) == kept
    assert len(names(root.path / "runs" / "tiny") - {CURRENT}) == len(names(root.tokens)) == 3


def test_a_locked_run_directory_and_all_snapshots_are_kept_while_a_pipeline_runs(tiny_registry: Any) -> None:
    root = tiny_registry.root
    tiny_registry.register(corpus="old")
    tiny_registry.text("just ingested")
    tiny_registry.register(corpus="new")
    first = root.run_directory("tiny", versions.list_versions(root, MODEL)[0].tags["run_key"], 1)
    with locks.hold(root.path / "locks" / "tiny.lock"), locks.hold(first / "lock"):
        freed = prune(root, {MODEL: 1})
        assert freed.busy == ["tiny"] and "while tiny runs, snapshots and token files stay" in freed.summary(False)
        assert first.exists() and len(names(root.corpora)) == 3
    assert prune(root, {MODEL: 1}).busy == []
    assert len(names(root.corpora)) == 1
    assert not first.exists()


def test_no_lock_of_a_pipeline_is_held_while_files_are_deleted(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_registry.root
    for corpus in ("old", "new"):
        tiny_registry.register(corpus=corpus)
    _, tokens = tiny_registry.text("abandoned")
    abandoned = tiny_registry.run_directory(0, manifest.sha256_of("abandoned"), tokens, 1, is_finished=False)
    with locks.hold(root.lock_path("tiny")):
        pass
    delete, deleted = shutil.rmtree, []

    def delete_unlocked(path: Path, **options: Any) -> None:
        with root.try_lock(root.lock_path("tiny")) as is_free:
            assert is_free, f"{path} is deleted under the lock"
        deleted.append(Path(path).name)
        delete(path, **options)

    monkeypatch.setattr("shutil.rmtree", delete_unlocked)
    prune(root, {MODEL: 1})
    assert not abandoned.parents[1].exists()
    gone_names = {
        manifest.sha256_of([kind, name])[:16] for kind in ("corpus", "tokens") for name in ("old", "abandoned")
    }
    assert {f".tmp-removed-{name}" for name in gone_names} <= set(deleted)


@pytest.mark.parametrize("kind", ["runs", "tokens", "corpora"])
def test_what_a_killed_call_has_renamed_is_deleted_by_a_later_one(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root, delete = tiny_registry.root, shutil.rmtree
    for corpus in ("old", "new"):
        tiny_registry.register(corpus=corpus)

    def delete_or_die(path: Path, **options: Any) -> None:
        if Path(path).is_relative_to(root.path / kind):
            raise KeyboardInterrupt
        delete(path, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", delete_or_die)
        prune(root, {MODEL: 1})
    (left,) = (root.path / kind).rglob(".tmp-removed-*")
    os.utime(left, (0, 0))
    prune(root, {MODEL: 1})
    assert not left.exists() and len(names(root.corpora)) == len(names(root.tokens)) == 1


def test_a_run_that_sweeps_up_the_same_leftovers_does_not_stop_retention(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, set_aside = tiny_registry.root, manifest.set_aside
    for corpus in ("old", "new"):
        tiny_registry.register(corpus=corpus)

    def set_aside_before_a_sweep(path: Path) -> Path:
        present = set_aside(path)
        shutil.rmtree(present)
        return present

    monkeypatch.setattr(manifest, "set_aside", set_aside_before_a_sweep)
    assert len(prune(root, {MODEL: 1}).paths) > 2
    assert len(names(root.corpora)) == len(names(root.tokens)) == 1


def test_stale_temporary_directories_are_removed_and_fresh_ones_are_kept(tiny_registry: Any) -> None:
    root = tiny_registry.root
    for name in (".tmp-stale", ".tmp-fresh"):
        (root.corpora / name).mkdir(parents=True)
    os.utime(root.corpora / ".tmp-stale", (0, 0))
    prune(root, {MODEL: 1})
    assert names(root.corpora) == {".tmp-fresh"}


def test_a_copied_state_never_deletes_the_files_of_the_original(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):
        tiny_registry.register()
    original = tiny_registry.root
    files = [path for version in versions.list_versions(original, MODEL) for path in files_of(original, version)]
    copy = StateRoot(tmp_path / "copy")
    shutil.copytree(original.path, copy.path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy.path}/mlflow.db")
    assert prune(copy, {MODEL: 1}).versions == [f"models:/{MODEL}/1"]
    assert all(path.exists() for path in files)


@pytest.mark.slow
def test_a_killed_prune_damages_nothing_that_is_kept_and_the_next_prune_frees_the_rest(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_registry.root
    tiny_registry.register(corpus="first")
    for kill_at in range(40):
        tiny_registry.register(corpus=f"night {kill_at}")
        with monkeypatch.context() as patched:
            steps = count()
            for owner, name in DESTRUCTIVE:
                patched.setattr(owner, name, killed_at(kill_at, steps, getattr(owner, name)))
            try:
                prune(root, {MODEL: 1})
            except KeyboardInterrupt:
                pass
            else:
                break
        newest = versions.list_versions(root, MODEL)[-1]
        assert all(path.exists() for path in files_of(root, newest))
        load(versions.fetch_bundle(root, MODEL, str(newest.version)))
        prune(root, {MODEL: 1})
        manifest.sweep(root.path / "runs" / "tiny", older_than_seconds=0)
        for parent in (root.corpora, root.tokens):
            manifest.sweep(parent, older_than_seconds=0)
        assert [len(names(p)) for p in (root.corpora, root.tokens, root.path / "runs" / "tiny")] == [1, 1, 1]
        assert len(names(root.artifacts / "tiny" / "models")) == len(numbers(root)) == 1
        assert len(list(root.artifacts.glob("tiny/*/artifacts/plots"))) == 1
    else:
        raise AssertionError("there are more steps than were tried")
    assert kill_at > 10


DESTRUCTIVE = [
    (MlflowClient, "set_tag"),
    (MlflowClient, "delete_tag"),
    (MlflowClient, "delete_model_version"),
    (MlflowClient, "delete_logged_model"),
    (manifest, "remove"),
    (shutil, "rmtree"),
]


def killed_at(number: int, steps: Any, really: Any) -> Any:
    """Wrap `really` so that step `number` is done half or not at all, and then the process dies."""

    def step(*arguments: Any, **options: Any) -> Any:
        if next(steps) == number:
            if really is shutil_rmtree:
                for path in sorted(Path(arguments[0]).rglob("*.json"))[:1]:
                    path.unlink()
            raise KeyboardInterrupt
        return really(*arguments, **options)

    return step


shutil_rmtree = shutil.rmtree


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.deep) for seed in (1, 2, 3))])
def test_needed_files_are_kept_and_every_rollback_loads_after_any_history(tiny_registry: Any, seed: int) -> None:
    root, draw = tiny_registry.root, random.Random(seed)
    for _ in range(25):
        happen(tiny_registry, draw)
        if draw.random() < 0.25:
            keep = draw.randint(1, 4)
            before = versions.list_versions(root, MODEL) if tiny_registry.count else []
            complete_log(root, MODEL)
            needed = {str(v.version) for v in before[-keep:]} | set(trace_champions(read_moves(root, MODEL))) - {None}
            dry = prune(root, {MODEL: keep}, dry_run=True)
            freed = prune(root, {MODEL: keep})
            assert (dry.versions, dry.paths) == (freed.versions, freed.paths)
            assert needed == {str(version.version) for version in before} - gone(freed.versions)
            for version in before:
                if str(version.version) in needed:
                    assert all(path.exists() for path in files_of(root, version))
    with pytest.raises(NoPrevious):
        for _ in count():
            target = rollback(root, MODEL, "further back", "ann").target
            load(versions.fetch_bundle(root, MODEL, str(target)))


def happen(tiny_registry: Any, draw: random.Random) -> None:
    """Do one random thing: register, promote, roll back, or change the champion in MLflow itself."""
    root = tiny_registry.root
    what = draw.choice(["register", "register", "register", "promote", "promote", "rollback", "outside"])
    if what == "register" or not tiny_registry.count:
        tiny_registry.register(corpus=draw.choice("abcdef"))
        return
    version = draw.choice(sorted(numbers(root)))
    if what == "promote":
        promote(root, MODEL, version, "draw", "ann")
    elif what == "outside":
        tiny_registry.client.set_registered_model_alias(MODEL, "champion", version)
    else:
        try:
            rollback(root, MODEL, "draw", "ann")
        except NoPrevious:
            assert len(set(trace_champions(read_moves(root, MODEL)))) <= 2


def gone(uris: list[str]) -> set[str]:
    return {uri.rpartition("/")[2] for uri in uris}

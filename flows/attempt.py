"""One training of a pipeline on one text: which run directory it has, and what an earlier run left unfinished.

The run directory is named by run key and attempt, so that whoever trains the same again finds it. Which one a pipeline
works on is written down beside them before it is begun, so that the next run finds it even if the text has changed.

    runs/<pipeline>/current.json   {"own": "<run key>-<attempt>", "overridden": ...}
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from flows import tracking
from flows.pipelines import Pipeline
from flows.releases import ancestry, registry
from flows.releases.ancestry import Ancestor, WarmStart
from flows.releases.lineage import run_key
from flows.state import StateRoot
from gptcore import manifest
from gptcore.config import RunConfig, Start
from gptcore.corpus import Snapshot, load_snapshot
from gptcore.data import Tokens, load_tokens
from gptcore.errors import CheckpointError, ConfigError, TrainingDiverged
from gptcore.learning.rundir import RunDirectory
from gptcore.train import TRAINING_VERSION

CURRENT = "current.json"


@dataclass(frozen=True)
class Attempt:
    """A training that is prepared, or further."""

    run: RunDirectory
    run_key: str
    number: int
    """From 1; the same training is tried again only if it is asked for."""
    snapshot: Snapshot
    tokens: Tokens
    ancestors: tuple[Ancestor, ...]
    """The version that it starts from and those before it; empty where it starts from scratch."""


def number_of(
    root: StateRoot, pipeline: Pipeline, tokens: Tokens, start: WarmStart | None, force: bool, sources_overridden: bool
) -> int | None:
    """The attempt at a training to work on; None if an earlier one has its verdict and none is to follow it."""
    newest = registry.find(root, pipeline.model_name, _key(pipeline, tokens, start))
    if newest is None:
        return 1
    number = int(newest.tags["attempt"])
    if not _is_done(root, newest, sources_overridden):
        return number
    return number + 1 if force else None


def prepare(
    root: StateRoot,
    pipeline: Pipeline,
    snapshot: Snapshot,
    tokens: Tokens,
    start: WarmStart | None,
    number: int,
    sources_overridden: bool = False,
) -> Attempt:
    """Makes the run directory, and notes that it is the one that the pipeline works on."""
    key = _key(pipeline, tokens, start)
    run = RunDirectory(root.run_directory(pipeline.name, key, number))
    configure(run, pipeline, tokens, f"../../../tokens/{tokens.path.name}", start)
    note(run.path, sources_overridden)
    return Attempt(run, key, number, snapshot, tokens, start.ancestors if start else ())


def configure(run: RunDirectory, pipeline: Pipeline, tokens: Tokens, tokens_path: str, start: WarmStart | None) -> None:
    """Makes `run` the run directory of this training. `tokens_path` is as it stands in config.json.

    Raises CheckpointError if it belongs to another training.
    """
    began_with = Start(uri=start.uri, weights_sha256=start.weights_sha256) if start else None
    run.prepare(_config(pipeline, tokens, tokens_path, began_with), start.weights if start else None)


def unfinished(root: StateRoot, pipeline: Pipeline, sources_overridden: bool = False) -> Attempt | None:
    """The training that an earlier run began with these very settings, on whatever text, and that is not done yet.

    One that diverged is not gone on with: it would diverge again. None also where its text or its start is gone.
    """
    path = _noted(root.path / "runs" / pipeline.name, sources_overridden)
    if path is None:
        return None
    try:
        run = RunDirectory(path)
        config = run.config()
        tokens = load_tokens(run.tokens_path())
        snapshot = load_snapshot(root.corpus(manifest.about(tokens.path)["corpus_sha256"]))
        ancestors = _ancestors(root, config.start)
    except (ConfigError, CheckpointError, registry.UnknownVersion, registry.RegistryError):
        return None
    number = int(path.name.rpartition("-")[2])
    same = _key(pipeline, tokens, config.start) == config.run_key
    found = registry.find(root, pipeline.model_name, config.run_key, number)
    is_done = found is not None and _is_done(root, found, sources_overridden)
    has_diverged = isinstance(run.failure(), TrainingDiverged)
    if not same or is_done or has_diverged or not _is_start(root, pipeline, config.start):
        return None
    run.prepare(_config(pipeline, tokens, config.tokens, config.start))
    return Attempt(run, config.run_key, number, snapshot, tokens, ancestors)


def current(directory: Path) -> dict[str, str]:
    """The run directories that a pipeline works on, by name, among its run directories `directory`."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads((directory / CURRENT).read_text())
        if isinstance(found, dict):
            return {kind: name for kind, name in found.items() if isinstance(name, str)}
    return {}


def _config(pipeline: Pipeline, tokens: Tokens, tokens_path: str, start: Start | None) -> RunConfig:
    return RunConfig(
        training_version=TRAINING_VERSION,
        tokens=tokens_path,
        tokens_sha256=tokens.sha256,
        model=pipeline.model,
        vocab_size=tokens.n_vocab,
        train=pipeline.train,
        run_key=_key(pipeline, tokens, start),
        start=start,
    )


def _key(pipeline: Pipeline, tokens: Tokens, start: WarmStart | Start | None) -> str:
    return run_key(pipeline, tokens, TRAINING_VERSION, start.weights_sha256 if start else None)


def _is_done(root: StateRoot, version: ModelVersion, sources_overridden: bool) -> bool:
    """Whether the version has its verdict, and its MLflow run everything that explains it."""
    # Once the pipeline's own sources have become the text of an experiment, its version competes.
    has_yet_to_compete = version.tags.get("gate_kind") == registry.SOURCES_OVERRIDDEN and not sources_overridden
    return "verdict" in version.tags and not has_yet_to_compete and tracking.is_finished(root, version.run_id or "")


def _is_start(root: StateRoot, pipeline: Pipeline, began_with: Start | None) -> bool:
    """Whether `train.start_from` asks for what the training began with. Any champion will do, or none yet."""
    asked = pipeline.train.start_from
    if asked == registry.CHAMPION:
        return True
    if asked == ancestry.SCRATCH or began_with is None:
        return asked == ancestry.SCRATCH and began_with is None
    return began_with.uri == registry.uri_of(registry.resolve(root, asked))


def _ancestors(root: StateRoot, began_with: Start | None) -> tuple[Ancestor, ...]:
    return tuple(ancestry.line_of(root, registry.resolve(root, began_with.uri))) if began_with else ()


def is_judged(root: StateRoot, pipeline: Pipeline, key: str, run: str, sources_overridden: bool) -> bool:
    """Whether the run directory named `run`, of this key, has become a version with its verdict and its evidence."""
    found = registry.find(root, pipeline.model_name, key, int(run.rpartition("-")[2]))
    return found is not None and _is_done(root, found, sources_overridden)


def note(run: Path, sources_overridden: bool) -> None:
    """Writes down that the pipeline works on this run directory."""
    body: dict[str, Any] = {**current(run.parent), kind(sources_overridden): run.name}
    temporary = run.parent / f".tmp-{CURRENT}"
    with temporary.open("w") as file:
        file.write(json.dumps(body) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run.parent / CURRENT)
    manifest.flush(run.parent)


def _noted(directory: Path, sources_overridden: bool) -> Path | None:
    name = current(directory).get(kind(sources_overridden))
    return directory / name if name and Path(name).name == name != ".." else None


def kind(sources_overridden: bool) -> str:
    """Under which key of current.json it is written."""
    return "overridden" if sources_overridden else "own"

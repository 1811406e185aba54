"""Attempts: one training of a pipeline on one text, its run directory, and what an earlier run left unfinished.

A run directory is named by run key and attempt, so that a run with the same training finds it. Before a training
starts, current.json records its run directory. So the next run finds it, even if the text has changed meanwhile.

    runs/<pipeline>/current.json   {"own": "<run key>-<attempt>", "overridden": ...}
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from flows.cards import verdict
from flows.config.pipelines import Pipeline
from flows.registry import ancestry, versions
from flows.registry.ancestry import Ancestor, WarmStart
from flows.registry.lineage import run_key, settings_key
from flows.registry.tags import VersionTags
from flows.retrain.changed_settings import describe_changed_settings
from flows.state.root import StateRoot
from flows.tracking import runs
from gptcore import manifest
from gptcore.config import RunConfig, Start, TrainConfig, explain_long_warm_up
from gptcore.corpus.snapshot import Snapshot, load_snapshot
from gptcore.corpus.split import fill_settings, has_empty_settings
from gptcore.errors import CheckpointError, ConfigError, NewerFormat, TrainingDiverged
from gptcore.manifest import write_atomically
from gptcore.records import read_record
from gptcore.sections import parse_recorded
from gptcore.tokens.directory import Tokens, read_manifest
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.training import memory
from gptcore.training.batches import Batches, check_sizes
from gptcore.training.loop import steps_in_budget
from gptcore.training.resolve import describe_changes, find_training_version, resolve
from gptcore.training.run_directory import RunDirectory

CURRENT = "current.json"


@dataclass(frozen=True)
class Attempt:
    """A training whose run directory exists."""

    run: RunDirectory
    run_key: str
    number: int
    """From 1. The same training is tried again only with --force."""
    snapshot: Snapshot
    tokens: Tokens
    ancestors: tuple[Ancestor, ...]
    """The version that the training starts from, and that version's own ancestors. Empty from scratch."""
    train: TrainConfig
    """How it is trained here, without `auto`."""
    changes: str = ""
    """What differs from the start before, as in `threads 8 -> 2`. Empty if nothing does."""


def keep_split(pipeline: Pipeline, record: Mapping[str, Any]) -> Pipeline:
    """Return the pipeline with the empty keys of its split filled from what a snapshot recorded.

    Text must not move between train, val and holdout while the corpus grows.
    """
    where = f"the split that the pipeline {pipeline.name} keeps"
    return pipeline.model_copy(update={"corpus": fill_settings(pipeline.corpus, record, where)})


def keep_recorded_split(root: StateRoot, pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with the empty keys of its split filled from its earlier trainings, if there are any."""
    is_complete = not has_empty_settings(pipeline.corpus)
    return pipeline if is_complete else keep_split(pipeline, versions.find_split(root, pipeline))


def begin(
    root: StateRoot,
    pipeline: Pipeline,
    requested: TrainConfig,
    snapshot: Snapshot,
    tokens: Tokens,
    start: WarmStart | None,
    force: bool,
    sources_overridden: bool = False,
) -> Attempt | None:
    """Make the run directory of the attempt to work on, and record it in current.json.

    `requested` is the pipeline's section `train` with `auto` as it is. Return None if an earlier attempt, on this
    machine or on another one, has its verdict and `force` is not set.
    """
    as_requested = pipeline.model_copy(update={"train": requested})
    key_here = _run_key(pipeline, tokens, start)
    recorded = None if force else _find_begun(root, as_requested, key_here, tokens, start, sources_overridden)
    train = pipeline.train if recorded is None else resolve(requested, recorded.precision_so_far)
    began_with = recorded.machine_in_run_key.fill_in(requested) if recorded else train
    config = _run_config(
        pipeline.model_copy(update={"train": began_with}),
        tokens,
        tokens_path=f"../../../tokens/{tokens.path.name}",
        start=_name_start(start),
    )
    number = _next_number(root, pipeline.model_name, config.run_key, force, sources_overridden)
    if number is None:
        return None
    run = RunDirectory(root.run_directory(pipeline.name, config.run_key, number))
    run.prepare(config.with_train(train), start.weights if start else None)
    write_current(run.path, sources_overridden)
    return Attempt(
        run=run,
        run_key=config.run_key,
        number=number,
        snapshot=snapshot,
        tokens=tokens,
        ancestors=start.ancestors if start else (),
        train=train,
        changes=describe_changes(recorded.train, train) if recorded else "",
    )


def _next_number(root: StateRoot, model_name: str, run_key: str, force: bool, sources_overridden: bool) -> int | None:
    """Return the number of the attempt to work on. None if an earlier one has its verdict and `force` is not set."""
    newest = versions.find_by_run_key(root, model_name, run_key)
    if newest is None:
        return 1
    number = VersionTags.from_tags(newest.tags).attempt or 1
    if not _is_done(root, newest, sources_overridden):
        return number
    return number + 1 if force else None


def _find_begun(
    root: StateRoot,
    pipeline: Pipeline,
    key_here: str,
    tokens: Tokens,
    start: WarmStart | None,
    sources_overridden: bool,
) -> RunConfig | None:
    """Return the config.json of a training that began as `pipeline` requests where `auto` meant something else.

    Return None without one, and if a training with the key that the request has on this machine began already.
    """
    is_here = versions.find_by_run_key(root, pipeline.model_name, key_here) is not None
    if is_here or root.run_directory(pipeline.name, key_here, 1).exists():
        return None
    unfinished = _read_unfinished(root, pipeline, tokens, sources_overridden)
    begun = chain(_read_lineages(root, pipeline, tokens), unfinished)
    return next((one for one in begun if one.run_key == _run_key_as_recorded(pipeline, tokens, start, one)), None)


def _read_lineages(root: StateRoot, pipeline: Pipeline, tokens: Tokens) -> Iterator[RunConfig]:
    """Yield the config.json of the versions with these tokens and settings, the newest first."""
    for version in versions.find_by_settings(root, pipeline.model_name, settings_key(pipeline), tokens.sha256):
        with suppress(versions.RegistryError, ConfigError, KeyError):
            run_config = versions.read_lineage(root, version)["run_config"]
            yield parse_recorded(RunConfig, run_config, versions.uri_of(version))


def _read_unfinished(
    root: StateRoot, pipeline: Pipeline, tokens: Tokens, sources_overridden: bool
) -> Iterator[RunConfig]:
    """Yield the config.json of each training on these tokens that neither diverged nor has its verdict."""
    for path in sorted((root.path / "runs" / pipeline.name).glob("*-[0-9]*")):
        run = RunDirectory(path)
        with suppress(ConfigError, ValueError):
            config = run.read_config()
            if config.tokens_sha256 != tokens.sha256 or isinstance(run.read_failure(), TrainingDiverged):
                continue
            if not is_judged(root, pipeline, config.run_key, path.name, sources_overridden):
                yield config


def configure(run: RunDirectory, pipeline: Pipeline, tokens: Tokens, tokens_path: str, start: WarmStart | None) -> None:
    """Write the training's config.json into the run directory. `tokens_path` is written to it as given.

    Where `pipeline.train` is `auto`, the trainer chooses. Raises CheckpointError if the directory belongs to another
    training.
    """
    config = _run_config(pipeline, tokens, tokens_path, _name_start(start))
    if (run.path / "config.json").exists():
        config = config.model_copy(update={"run_key": _run_key_as_recorded(pipeline, tokens, start, run.read_config())})
    run.prepare(config, start.weights if start else None)


def check_fits(pipeline: Pipeline, tokens: Tokens) -> None:
    """Check that the training is possible with this text on this machine.

    Raises CorpusError if the text is too short for the batches, ConfigError if the warm-up is too long for the budget
    or the model is too large for memory.
    """
    train, context = pipeline.train, pipeline.model.shape()["context_length"]
    stride = train.stride or context
    check_sizes(tokens, context, stride, train.batch_size * train.accumulation)
    batches = Batches(tokens.side("train"), context, stride, train.batch_size, train.accumulation, train.seed)
    if (problem := explain_long_warm_up(train.warmup_steps, steps_in_budget(train, batches))) is not None:
        raise ConfigError(f"train: {problem}.")
    memory.check(pipeline.model, train, tokens.n_vocab)


def find_unfinished(root: StateRoot, pipeline: Pipeline, sources_overridden: bool = False) -> Attempt | None:
    """Find the training that an earlier run began with the same settings, on any text, and did not complete.

    An `auto` of `pipeline` may mean something else on this machine; the attempt says what is different now. Return None
    if there is no such training, if it diverged (it would diverge again), or if its text or the weights that it started
    from were deleted. Makes damaged tokens again. Raises CheckpointError if the text was altered, or if the tokens
    cannot be made again. Raises ConfigError if the training does not fit into this machine's memory.
    """
    path = _current_run_directory(root.path / "runs" / pipeline.name, sources_overridden)
    if path is None:
        return None
    try:
        run = RunDirectory(path)
        config = run.read_config()
        tokens = read_manifest(Path(run.tokens_path()))
        snapshot = load_snapshot(root.fetch_corpus(manifest.read_about(tokens.path)["corpus_sha256"]))
        ancestors = _ancestors(root, config.start)
    except (ConfigError, CheckpointError, versions.UnknownVersion, versions.RegistryError):
        return None
    number = int(path.name.rpartition("-")[2])
    pipeline = keep_split(pipeline, snapshot.split)
    same = _run_key_as_recorded(pipeline, tokens, config.start, config) == config.run_key
    found = versions.find_by_run_key(root, pipeline.model_name, config.run_key, number)
    is_done = found is not None and _is_done(root, found, sources_overridden)
    has_diverged = isinstance(run.read_failure(), TrainingDiverged)
    if not same or is_done or has_diverged or not _is_start(root, pipeline, config.start):
        return None
    _verify_snapshot(snapshot, path.name)
    tokens = _repair_tokens(root, config, tokens, snapshot)
    train = resolve(pipeline.train, config.precision_so_far)
    if run.read_result() is None:
        memory.check(pipeline.model, train, tokens.n_vocab)
    run.prepare(config.with_train(train))
    return Attempt(
        run=run,
        run_key=config.run_key,
        number=number,
        snapshot=snapshot,
        tokens=tokens,
        ancestors=ancestors,
        train=train,
        changes=describe_changes(config.train, train),
    )


def explain_restart(root: StateRoot, pipeline: Pipeline, sources_overridden: bool = False) -> str:
    """Return why `find_unfinished` does not resume a training, if other settings are the reason. Empty otherwise.

    They may be settings that the file leaves to this release, or the arithmetic of this release.
    """
    path = _current_run_directory(root.path / "runs" / pipeline.name, sources_overridden)
    if path is None:
        return ""
    run = RunDirectory(path)
    try:
        config = run.read_config()
    except ConfigError:
        return ""
    if run.read_result() is not None or isinstance(run.read_failure(), TrainingDiverged):
        return ""
    left_open = ["threads", *(key for key, value in pipeline.train if value == "auto")]
    recorded = config.model_dump(mode="json", include={"model", "train"})
    changed = describe_changed_settings(pipeline, recorded, config, left_open)
    return f"the unfinished training {path.name} is not resumed: {changed}" if changed else ""


def _verify_snapshot(snapshot: Snapshot, run: str) -> None:
    """Raise CheckpointError if the text of an unfinished training was altered since it was ingested."""
    try:
        manifest.verify(snapshot.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the unfinished training {run} is not resumed: {error} Delete the directory {snapshot.path}. The next run "
            "reads the sources again, and resumes this training if they still hold the same text."
        ) from None


def _repair_tokens(root: StateRoot, config: RunConfig, tokens: Tokens, snapshot: Snapshot) -> Tokens:
    """Return the tokens of an unfinished training, made again from its snapshot if a file was altered."""
    try:
        return load_tokens(tokens.path)
    except NewerFormat:
        raise
    except CheckpointError as damage:
        vocabulary = ancestry.load_tokenizer(root, versions.resolve(root, config.start.uri)) if config.start else None
        made = tokenize(snapshot.path, tokens.tokenizer, root.tokens, vocabulary=vocabulary)
        if made.sha256 != config.tokens_sha256:
            raise CheckpointError(
                f"{damage} From the same text, this release makes tokens with the identity {made.sha256} (expected "
                f"{config.tokens_sha256}). Restore the files from a backup, or set retrain.unfinished: restart."
            ) from None
        return made


def read_current(directory: Path) -> dict[str, str]:
    """Read current.json from a pipeline's `directory` of run directories: names by "own" or "overridden"."""
    names = read_record(directory / CURRENT, dict[str, Any]) or {}
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _run_config(pipeline: Pipeline, tokens: Tokens, tokens_path: str, start: Start | None) -> RunConfig:
    return RunConfig(
        training_version=find_training_version(pipeline.train, is_warm_start=start is not None),
        tokens=tokens_path,
        tokens_sha256=tokens.sha256,
        model=pipeline.model,
        vocab_size=tokens.n_vocab,
        train=pipeline.train,
        run_key=_run_key(pipeline, tokens, start),
        start=start,
    )


def _name_start(start: WarmStart | None) -> Start | None:
    return Start(uri=start.uri, weights_sha256=start.weights_sha256) if start else None


def _run_key(pipeline: Pipeline, tokens: Tokens, start: WarmStart | Start | None) -> str:
    version = find_training_version(pipeline.train, is_warm_start=start is not None)
    return run_key(pipeline, tokens, version, start.weights_sha256 if start else None)


def _run_key_as_recorded(
    pipeline: Pipeline, tokens: Tokens, start: WarmStart | Start | None, recorded: RunConfig
) -> str:
    """Return the run key that a recorded training has if it is what `pipeline` requests.

    How a training is executed is not part of what it is. So `auto`, and any number of threads, stand for the values
    that the recorded training began with.
    """
    train = recorded.machine_in_run_key.fill_in(pipeline.train)
    return _run_key(pipeline.model_copy(update={"train": train}), tokens, start)


def _is_done(root: StateRoot, version: ModelVersion, sources_overridden: bool) -> bool:
    """Whether the version has its verdict, and its MLflow run has all its results."""
    # If the text of an experiment becomes the text of the pipeline, its version has yet to compete.
    tags = VersionTags.from_tags(version.tags)
    has_yet_to_compete = tags.gate_kind == verdict.SOURCES_OVERRIDDEN and not sources_overridden
    return tags.verdict is not None and not has_yet_to_compete and runs.is_finished(root, version.run_id or "")


def _is_start(root: StateRoot, pipeline: Pipeline, began_with: Start | None) -> bool:
    """Whether `train.start_from` still allows the version that the training began with. Any champion is allowed."""
    asked = pipeline.train.start_from
    if asked == versions.CHAMPION:
        return True
    if asked == ancestry.SCRATCH or began_with is None:
        return asked == ancestry.SCRATCH and began_with is None
    return began_with.uri == versions.uri_of(versions.resolve(root, asked))


def _ancestors(root: StateRoot, began_with: Start | None) -> tuple[Ancestor, ...]:
    return tuple(ancestry.read_ancestry(root, versions.resolve(root, began_with.uri))) if began_with else ()


def is_judged(root: StateRoot, pipeline: Pipeline, key: str, run: str, sources_overridden: bool) -> bool:
    """Whether the run directory named `run`, of this key, became a version with a verdict and all its results."""
    found = versions.find_by_run_key(root, pipeline.model_name, key, int(run.rpartition("-")[2]))
    return found is not None and _is_done(root, found, sources_overridden)


def write_current(run: Path, sources_overridden: bool) -> None:
    """Record in current.json that the pipeline works on this run directory."""
    body: dict[str, Any] = {**read_current(run.parent), current_key(sources_overridden): run.name}
    write_atomically(run.parent / CURRENT, json.dumps(body) + "\n")


def _current_run_directory(directory: Path, sources_overridden: bool) -> Path | None:
    name = read_current(directory).get(current_key(sources_overridden))
    return directory / name if name and Path(name).name == name != ".." else None


def current_key(sources_overridden: bool) -> str:
    """Return the key of current.json for a run of the pipeline's own sources, or of overridden ones."""
    return "overridden" if sources_overridden else "own"

"""Differences between the day on which a version was trained and today.

Equal text, settings, seed, arithmetic, packages and machine train equal weights, bit for bit. Before a version is
trained again, this module compares everything that the version's lineage records with today.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.registry import lineage, versions
from flows.registry.ancestry import load_tokenizer
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS
from gptcore.config import RunConfig, TrainConfig
from gptcore.corpus.snapshot import DOCUMENTS, Snapshot, load_snapshot
from gptcore.devices import choose_usable_device, count_devices
from gptcore.errors import CheckpointError, GPTCoreError
from gptcore.sections import parse_recorded
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.resolve import find_training_version, resolve

Lineage = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One thing that has changed since the training."""

    what: str
    then: str
    now: str
    is_decisive: bool = True
    """Whether it can change the weights. Moved or reworded code cannot: the training version names the arithmetic."""


@dataclass(frozen=True)
class Materials:
    """What a training needs. A field is None if it has been deleted."""

    snapshot: Snapshot | None
    tokens: Tokens | None
    start: Path | None
    """Weights that the training starts from. None if it starts from scratch, or if they were deleted."""


def differences(then: Lineage) -> list[Difference]:
    """Compare packages, code, settings and machine with the recorded ones."""
    return [*_packages(then), *_code(then), *_settings(then), *_machine(then)]


def materials(root: StateRoot, then: Lineage, work: Path) -> tuple[Materials, list[Difference]]:
    """Find snapshot, tokens and the weights to start from, and list which of them are missing or altered.

    Deleted tokens are made again from the snapshot, in the directory `work`.
    """
    snapshot, lost_text = _snapshot(root, then)
    tokens, lost_tokens = _tokens(root, then, snapshot, work)
    start, lost_start = _start(root, then)
    return Materials(snapshot, tokens, start), [*lost_text, *lost_tokens, *lost_start]


def usable_processes(recorded_device: str, recorded: int) -> int:
    """Return the recorded number of processes if each has a device, else 1."""
    device = str(choose_usable_device(recorded_device))
    has_room = device == "cpu" or (device == "cuda" and recorded <= count_devices("cuda"))
    return recorded if has_room else 1


def training_version_today(then: Lineage) -> int:
    """Return the version of today's arithmetic for the recorded settings."""
    recorded = parse_recorded(RunConfig, then["run_config"], "run_config of the lineage")
    return find_training_version(recorded.train, is_warm_start=recorded.start is not None)


def _packages(then: Lineage) -> Iterator[Difference]:
    recorded = then["packages"]
    for name, now in lineage.packages(list(recorded)).items():
        for difference in _compare(f"package {name}", recorded[name], now or "not installed"):
            yield replace(difference, is_decisive=name != "gptflow")
    yield from _compare("python", then["python"], platform.python_version())


def _code(then: Lineage) -> Iterator[Difference]:
    now = lineage.code()
    for key, what in (("gptcore_sha256", "source of gptcore"), ("code_commit", "commit"), ("code_dirty", "edited")):
        for difference in _compare(what, then.get(key), now[key]):
            yield replace(difference, is_decisive=False)
    yield from _compare("training version", then["run_config"]["training_version"], training_version_today(then))


def _settings(then: Lineage) -> Iterator[Difference]:
    if seconds := then["run_config"]["train"]["max_seconds"]:
        ended = f"{seconds:g} s, ended by {then['stopped_by']} after {then['steps']:,} steps"
        yield Difference("train.max_seconds", ended, "a budget in seconds does not end after the same step again")


def _machine(then: Lineage) -> Iterator[Difference]:
    recorded = then["hardware"]
    now = lineage.hardware(str(choose_usable_device(recorded["device"])), recorded["threads"])
    for key in ("machine", "processor", "device", "device_name"):
        yield from _compare(key.replace("_", " "), recorded[key], now[key])
    processes = recorded.get("processes", 1)
    if (usable := usable_processes(recorded["device"], processes)) != processes:
        yield Difference("processes", str(processes), f"GPUs for them: {usable}")
    executions = then.get("executions", [])
    if len(executions) > 1:
        started = "; then ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in executions)
        yield Difference("execution", started, "all updates as the last ones")
    cores = int(resolve(TrainConfig()).threads)
    if recorded["threads"] > cores:
        yield Difference("threads", str(recorded["threads"]), f"cores to run them on: {cores}")


def _compare(what: str, then: Any, now: Any) -> Iterator[Difference]:
    if then != now:
        before, today = ("not recorded" if value is None else str(value) for value in (then, now))
        yield Difference(what, before, today)


def _snapshot(root: StateRoot, then: Lineage) -> tuple[Snapshot | None, list[Difference]]:
    what, sha256 = "corpus snapshot", then["corpus_sha256"]
    path = root.fetch_corpus(sha256)
    if not manifest.is_committed(path):
        return None, [Difference(what, sha256, f"{path} is gone")]
    problems: list[Difference] = []
    try:
        problems += _compare(what, sha256, manifest.verify(path)["sha256"])
        problems += _compare("documents", then["documents_sha256"], manifest.sha256_of_file(path / DOCUMENTS))
    except CheckpointError as error:
        problems.append(Difference(what, sha256, str(error)))
    with suppress(CheckpointError):
        return load_snapshot(path), problems
    return None, problems


def _tokens(
    root: StateRoot, then: Lineage, snapshot: Snapshot | None, work: Path
) -> tuple[Tokens | None, list[Difference]]:
    what, sha256 = "tokens", then["tokens_sha256"]
    there = root.fetch_tokens(sha256)
    with suppress(CheckpointError):
        if (tokens := load_tokens(there)).sha256 == sha256:
            return tokens, []
    if snapshot is None:
        return None, [Difference(what, sha256, f"{there} is gone, and so is the text to make it from")]
    try:
        made = tokenize(snapshot.path, then["config"]["corpus"]["tokenizer"], work, vocabulary=_vocabulary(root, then))
    except GPTCoreError as error:
        return None, [Difference(what, sha256, f"cannot be made again: {error}")]
    vocabulary = manifest.read_about(made.path)["tokenizer_sha256"]
    return made, [
        *_compare(what, sha256, made.sha256),
        *_compare("vocabulary", then["tokenizer_sha256"], vocabulary),
    ]


def _vocabulary(root: StateRoot, then: Lineage) -> Tokenizer | None:
    """Return the vocabulary that a warm start kept. None from scratch: then it is made from the text."""
    if not then["ancestors"]:
        return None
    return load_tokenizer(root, versions.resolve(root, then["uri"]))


def _start(root: StateRoot, then: Lineage) -> tuple[Path | None, list[Difference]]:
    if not then["ancestors"]:
        return None, []
    nearest = then["ancestors"][0]
    what, sha256 = f"weights of {nearest['uri']}", nearest["weights_sha256"]
    try:
        found = versions.resolve(root, nearest["uri"])
        path = versions.fetch_bundle(root, found.name, str(found.version)) / WEIGHTS
        return path, list(_compare(what, sha256, manifest.sha256_of_file(path)))
    except (GPTCoreError, OSError) as error:
        return None, [Difference(what, sha256, f"gone: {error}")]

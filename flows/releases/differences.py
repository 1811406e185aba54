"""What is different between the day on which a version was trained and today.

Equal text, settings, seed, code, packages and machine train equal weights, bit for bit. So before a version is trained
again everything that its lineage names is looked up here: what of it is not as it was has a name, a then and a now.
"""

import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flows.releases import lineage, registry
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS
from gptcore.config import TrainConfig
from gptcore.corpus import DOCUMENTS, Snapshot, load_snapshot
from gptcore.data import Tokens, load_tokens, tokenize
from gptcore.errors import CheckpointError, GPTCoreError
from gptcore.tokenizer import Tokenizer
from gptcore.train import TRAINING_VERSION, resolve

Lineage = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was."""

    what: str
    then: str
    now: str
    is_decisive: bool = True
    """Whether other weights may come of it. A commit does not matter where gptcore's source is the same."""


@dataclass(frozen=True)
class Materials:
    """What a training is made from, as far as it is still there."""

    snapshot: Snapshot | None
    tokens: Tokens | None
    start: Path | None
    """Weights that the training starts from; None if it starts from scratch, or if they are gone."""


def differences(then: Lineage) -> list[Difference]:
    """How packages, code, settings and machine differ from what the lineage says of them."""
    return [*_packages(then), *_code(then), *_settings(then), *_machine(then)]


def materials(root: StateRoot, then: Lineage, work: Path) -> tuple[Materials, list[Difference]]:
    """Finds snapshot, tokens and the weights to start from, and says what of them is missing or altered.

    Tokens that are gone are made again from the snapshot, in the directory `work`.
    """
    snapshot, lost_text = _snapshot(root, then)
    tokens, lost_tokens = _tokens(root, then, snapshot, work)
    start, lost_start = _start(root, then)
    return Materials(snapshot, tokens, start), [*lost_text, *lost_tokens, *lost_start]


def usable_device(recorded: str) -> str:
    """The recorded device if this machine has it, else the one that `auto` stands for here."""
    kind, _, index = recorded.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    return recorded if int(index or 0) < counts.get(kind, 0) else resolve(TrainConfig()).device


def usable_processes(recorded_device: str, recorded: int) -> int:
    """The recorded number of processes if there is a device for each, else one."""
    device = usable_device(recorded_device)
    has_room = device == "cpu" or (device == "cuda" and recorded <= torch.cuda.device_count())
    return recorded if has_room else 1


def _packages(then: Lineage) -> Iterator[Difference]:
    recorded = then["packages"]
    for name, now in lineage.packages(list(recorded)).items():
        yield from _compared(f"package {name}", recorded[name], now or "not installed")
    yield from _compared("python", then["python"], platform.python_version())


def _code(then: Lineage) -> Iterator[Difference]:
    now = lineage.code()
    for key, what in (("gptcore_sha256", "source of gptcore"), ("code_commit", "commit"), ("code_dirty", "edited")):
        for found in _compared(what, then.get(key), now[key]):
            yield replace(found, is_decisive=key == "gptcore_sha256")
    yield from _compared("training version", then["run_config"]["training_version"], TRAINING_VERSION)


def _settings(then: Lineage) -> Iterator[Difference]:
    if seconds := then["run_config"]["train"]["max_seconds"]:
        ended = f"{seconds:g} s, ended by {then['stopped_by']} after {then['steps']:,} steps"
        yield Difference("train.max_seconds", ended, "a budget in seconds does not end after the same step again")


def _machine(then: Lineage) -> Iterator[Difference]:
    recorded = then["hardware"]
    now = lineage.hardware(usable_device(recorded["device"]), recorded["threads"])
    for key in ("machine", "processor", "device", "device_name"):
        yield from _compared(key.replace("_", " "), recorded[key], now[key])
    processes = recorded.get("processes", 1)
    if (usable := usable_processes(recorded["device"], processes)) != processes:
        yield Difference("processes", str(processes), f"GPUs for them: {usable}")
    cores = int(resolve(TrainConfig()).threads)
    if recorded["threads"] > cores:
        yield Difference("threads", str(recorded["threads"]), f"cores to run them on: {cores}")


def _compared(what: str, then: Any, now: Any) -> Iterator[Difference]:
    if then != now:
        before, today = ("not recorded" if value is None else str(value) for value in (then, now))
        yield Difference(what, before, today)


def _snapshot(root: StateRoot, then: Lineage) -> tuple[Snapshot | None, list[Difference]]:
    what, sha256 = "corpus snapshot", then["corpus_sha256"]
    path = root.corpus(sha256)
    if not manifest.is_committed(path):
        return None, [Difference(what, sha256, f"{path} is gone")]
    problems: list[Difference] = []
    try:
        problems += _compared(what, sha256, manifest.verify(path)["sha256"])
        problems += _compared("documents", then["documents_sha256"], manifest.sha256_of_file(path / DOCUMENTS))
    except CheckpointError as error:
        problems.append(Difference(what, sha256, str(error)))
    with suppress(CheckpointError):
        return load_snapshot(path), problems
    return None, problems


def _tokens(
    root: StateRoot, then: Lineage, snapshot: Snapshot | None, work: Path
) -> tuple[Tokens | None, list[Difference]]:
    what, sha256 = "tokens", then["tokens_sha256"]
    there = root.token_files(sha256)
    with suppress(CheckpointError):
        if manifest.verify(there)["sha256"] == sha256:
            return load_tokens(there), []
    if snapshot is None:
        return None, [Difference(what, sha256, f"{there} is gone, and so is the text to make it from")]
    try:
        made = tokenize(snapshot.path, then["config"]["corpus"]["tokenizer"], work, vocabulary=_vocabulary(root, then))
    except GPTCoreError as error:
        return None, [Difference(what, sha256, f"cannot be made again: {error}")]
    vocabulary = manifest.about(made.path)["tokenizer_sha256"]
    return made, [
        *_compared(what, sha256, made.sha256),
        *_compared("vocabulary", then["tokenizer_sha256"], vocabulary),
    ]


def _vocabulary(root: StateRoot, then: Lineage) -> Tokenizer | None:
    """The vocabulary that a warm start kept; from scratch, one is made from the text."""
    if not then["ancestors"]:
        return None
    return Tokenizer.load(registry.bundle_path(root, then["model"], str(then["version"])) / "tokenizer")


def _start(root: StateRoot, then: Lineage) -> tuple[Path | None, list[Difference]]:
    if not then["ancestors"]:
        return None, []
    nearest = then["ancestors"][0]
    what, sha256 = f"weights of {nearest['uri']}", nearest["weights_sha256"]
    try:
        found = registry.resolve(root, nearest["uri"])
        path = registry.bundle_path(root, found.name, str(found.version)) / WEIGHTS
        return path, list(_compared(what, sha256, manifest.sha256_of_file(path)))
    except (GPTCoreError, OSError) as error:
        return None, [Difference(what, sha256, f"gone: {error}")]

"""Checkpoints: everything that a training needs to go on as if it had never stopped.

A checkpoint is a committed directory `step-XXXXXXXX` (gptcore.manifest) of safetensors and JSON: weights, best weights,
optimiser, random states, counters. It is verified by hash before it is used. Nothing here can run code from a file.
It holds whole tensors and does not know how many processes wrote it: the first rank reads and writes for all.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptcore import manifest
from gptcore.errors import CheckpointError, NewerFormat
from gptcore.learning.spread import Tensors, deal, whole

if TYPE_CHECKING:
    from gptcore.learning.state import TrainState


def save(checkpoints: Path, state: "TrainState", identity: dict[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-XXXXXXXX atomically, then removes all but the `keep` newest.

    `identity` says what is being trained; `restore` compares it.
    """
    goal = checkpoints / f"step-{state.step:08d}"
    files = {
        "model": whole(state.ranks, state.model.state_dict()),
        "optimizer": whole(state.ranks, _optimizer_tensors(state.optimizer)),
        "random": _random_states(state.device),
    }
    if state.best is not None:
        files["best"] = state.best.weights
    state.ranks.first(lambda: _write(checkpoints, goal, files, identity, state.counters(), keep))
    return goal


def _write(
    checkpoints: Path,
    goal: Path,
    files: dict[str, Tensors],
    identity: dict[str, Any],
    counters: dict[str, Any],
    keep: int,
) -> None:
    if not manifest.is_committed(goal):
        with manifest.staging(checkpoints) as staged:
            with ThreadPoolExecutor() as threads:  # copying gigabytes into the page cache keeps a core busy
                list(threads.map(save_file, files.values(), [staged / f"{name}.safetensors" for name in files]))
            manifest.commit(staged, goal, {"kind": "checkpoint", "identity": identity, "counters": counters})
    prune(checkpoints, keep)


def restore(checkpoints: Path, state: "TrainState", identity: dict[str, Any]) -> bool:
    """Brings `state` to the newest valid checkpoint and returns True, or returns False if there never was one.

    Each damaged checkpoint is named in a warning, passed over, and removed once an older one is loaded: it would stand
    where training saves again, and count among those that are kept. Raises CheckpointError if nothing that is there can
    be used, if the newest valid one belongs to another training, naming the key that differs and both values, if a
    newer release made it, or if it holds files of another kind, such as pickles, which are not read.
    """
    found: list[_Read] = []  # by the first rank
    counters = state.ranks.first(lambda: _newest(checkpoints, state, identity, found))
    if counters is None:
        return False
    read = found[0] if found else _Read()
    state.spread.load(read.model)
    _deal_optimizer(state, read.optimizer)
    state.set_counters(counters, read.best if counters["best"] else None)
    if read.random:
        _set_random_states(read.random, state.device)
    return True


@dataclass(frozen=True)
class _Read:
    """What the files of a checkpoint hold; nothing, on ranks that did not read it."""

    model: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    random: Tensors = field(default_factory=dict)


def _newest(
    checkpoints: Path, state: "TrainState", identity: dict[str, Any], found: list[_Read]
) -> dict[str, Any] | None:
    """Reads the newest valid checkpoint into `found`, and returns its counters."""
    damaged = []
    for directory in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            about = manifest.verify(directory)
        except NewerFormat:
            raise
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            damaged.append(directory)
            continue
        _compare(directory, about.get("identity", {}), identity)
        try:
            found.append(_read(directory, state))
        except SafetensorError as error:
            raise CheckpointError(f"a file in {directory} is not what its name says: {error}") from None
        for passed_over in damaged:
            manifest.remove(passed_over)
        return about["counters"]
    if unusable := sorted(path.name for path in checkpoints.glob("[!.]*")):
        raise CheckpointError(
            f"none of what is in {checkpoints} ({', '.join(unusable)}) can be used, and training does not start over. "
            "Restore a checkpoint from a backup, or remove the directory to train from the beginning."
        )
    return None


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what killed trainers left half-written."""
    for directory in sorted(checkpoints.glob("step-*"), reverse=True)[keep:]:
        manifest.remove(directory)
    manifest.sweep(checkpoints, older_than_seconds=0)


def _compare(directory: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise CheckpointError(
                f"{directory} belongs to another training: {key} is {there.get(key)!r} there and {here.get(key)!r} "
                "here. Use another run directory."
            )


def _read(directory: Path, state: "TrainState") -> _Read:
    device = "cpu" if state.spread.is_sharded else str(state.device)
    best = directory / "best.safetensors"
    return _Read(
        model=load_file(directory / "model.safetensors", device=device),
        optimizer=load_file(directory / "optimizer.safetensors", device=device),
        best=load_file(best) if best.exists() else {},
        random=load_file(directory / "random.safetensors"),
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state, each tensor named by its parameter's index and its own name: `3.exp_avg`."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def _deal_optimizer(state: "TrainState", tensors: Tensors) -> None:
    """Gives every rank its part of the optimiser's state, which the first one has read."""
    if state.ranks.size > 1:
        tensors = _dealt(state, tensors)
    by_parameter: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        by_parameter.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_parameter, "param_groups": groups})


def _dealt(state: "TrainState", tensors: Tensors) -> Tensors:
    listed = state.ranks.first(lambda: {key: list(value.shape) for key, value in tensors.items()})
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    dealt = {}
    for key, shape in listed.items():
        parameter = parameters[int(key.partition(".")[0])]
        # What is not of the parameter's shape, as a count of updates, every rank holds whole.
        is_shaped = tuple(shape) == parameter.shape
        own = torch.zeros_like(parameter) if is_shaped else torch.zeros(shape, device=state.device)
        deal(state.ranks, own, tensors.get(key))
        dealt[key] = own
    return dealt


def _random_states(device: torch.device) -> Tensors:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def _set_random_states(states: Tensors, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["device"])

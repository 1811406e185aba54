"""Checkpoints: everything that a training needs to go on as if it had never stopped.

A checkpoint is a committed directory `step-XXXXXXXX` (gptcore.manifest) of safetensors and JSON: weights, best weights,
optimiser, random states, counters. It is verified by hash before it is used. Nothing here can run code from a file.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore import manifest
from gptcore.errors import CheckpointError, NewerFormat

if TYPE_CHECKING:
    from gptcore.train import TrainState

Tensors = dict[str, Tensor]


def save(checkpoints: Path, state: "TrainState", identity: dict[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-XXXXXXXX atomically, then removes all but the `keep` newest.

    `identity` says what is being trained; `restore` compares it.
    """
    goal = checkpoints / f"step-{state.step:08d}"
    if not manifest.is_committed(goal):
        files = {
            "model": state.model.state_dict(),
            "optimizer": _optimizer_tensors(state.optimizer),
            "random": _random_states(state.device),
        }
        if state.best is not None:
            files["best"] = state.best.weights
        with manifest.staging(checkpoints) as staged:
            with ThreadPoolExecutor() as threads:  # copying gigabytes into the page cache keeps a core busy
                list(threads.map(save_file, files.values(), [staged / f"{name}.safetensors" for name in files]))
            manifest.commit(staged, goal, {"kind": "checkpoint", "identity": identity, "counters": state.counters()})
    prune(checkpoints, keep)
    return goal


def restore(checkpoints: Path, state: "TrainState", identity: dict[str, Any]) -> bool:
    """Brings `state` to the newest valid checkpoint and returns True, or returns False if there never was one.

    Each damaged checkpoint is named in a warning, passed over, and removed once an older one is loaded: it would stand
    where training saves again, and count among those that are kept. Raises CheckpointError if nothing that is there can
    be used, if the newest valid one belongs to another training, naming the key that differs and both values, if a
    newer release made it, or if it holds files of another kind, such as pickles, which are not read.
    """
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
            _load(directory, state, about["counters"])
        except SafetensorError as error:
            raise CheckpointError(f"a file in {directory} is not what its name says: {error}") from None
        for passed_over in damaged:
            manifest.remove(passed_over)
        return True
    if unusable := sorted(path.name for path in checkpoints.glob("[!.]*")):
        raise CheckpointError(
            f"none of what is in {checkpoints} ({', '.join(unusable)}) can be used, and training does not start over. "
            "Restore a checkpoint from a backup, or remove the directory to train from the beginning."
        )
    return False


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


def _load(directory: Path, state: "TrainState", counters: dict[str, Any]) -> None:
    device = str(state.device)
    state.model.load_state_dict(load_file(directory / "model.safetensors", device=device))
    _load_optimizer(state.optimizer, load_file(directory / "optimizer.safetensors", device=device))
    best = directory / "best.safetensors"
    state.set_counters(counters, load_file(best) if best.exists() else None)
    _set_random_states(load_file(directory / "random.safetensors"), state.device)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state, each tensor named by its parameter's index and its own name: `3.exp_avg`."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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

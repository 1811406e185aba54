"""Checkpoints: everything that a training needs to resume as if it had never stopped.

A checkpoint is a committed directory `step-XXXXXXXX` (gptcore.manifest) of safetensors and JSON: weights, best weights,
optimizer, random states, counters. Its hashes are verified before it is used, and nothing here can run code from a
file. It holds complete tensors, so it does not depend on the number of ranks: rank 0 reads and writes for all.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptcore import manifest
from gptcore.errors import CheckpointError, NewerFormat
from gptcore.training.parallel import Tensors, gather_to_rank_0, scatter
from gptcore.training.state import TrainState


def save(checkpoints: Path, state: TrainState, identity: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-XXXXXXXX atomically, then remove all but the `keep` newest.

    `identity` describes the training; `restore` compares it. All ranks have to call this.
    """
    target = checkpoints / f"step-{state.step:08d}"
    files = {
        "model": gather_to_rank_0(state.ranks, state.model.state_dict()),
        "optimizer": gather_to_rank_0(state.ranks, _optimizer_tensors(state.optimizer)),
        "random": _random_states(state.device),
    }
    if state.best is not None:
        files["best"] = state.best.weights

    def fill(staged: Path) -> dict[str, Any]:
        with ThreadPoolExecutor() as threads:  # copying gigabytes into the page cache keeps a core busy
            list(threads.map(save_file, files.values(), [staged / f"{name}.safetensors" for name in files]))
        return {"kind": "checkpoint", "identity": identity, "counters": state.counters()}

    def write() -> None:
        manifest.make_once(target, fill)
        prune(checkpoints, keep)

    state.ranks.run_on_rank_0(write)
    return target


@dataclass(frozen=True)
class _Checkpoint:
    """The content of a checkpoint."""

    counters: dict[str, Any]
    model: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    random: Tensors = field(default_factory=dict)


def restore(checkpoints: Path, state: TrainState, identity: dict[str, Any]) -> bool:
    """Set `state` to the newest valid checkpoint and return True. Return False if the directory never had one.

    Warns about each damaged checkpoint and skips it. Removes the damaged ones once an older one is loaded: training
    would save under the same name again, and they would count among those to keep. Raises CheckpointError in these
    cases:
    - The directory holds something, but nothing that can be used.
    - The newest valid checkpoint belongs to another training. The error names the key that differs and both values.
    - A newer release wrote it.
    - It holds files other than safetensors, such as pickles, which are not read.
    """
    ranks = state.ranks
    loaded = ranks.run_on_rank_0_only(lambda: _load_newest(checkpoints, state, identity))
    counters = ranks.run_on_rank_0(lambda: None if loaded is None else loaded.counters)
    if counters is None:
        return False
    if loaded is None:  # on ranks other than 0, which receive the tensors
        loaded = _Checkpoint(counters)
    state.parallel.load_weights(loaded.model)
    _load_optimizer(state, loaded.optimizer)
    state.set_counters(counters, loaded.best if counters["best"] else None)
    if loaded.random:
        _set_random_states(_keep_usable(loaded.random, counters, state.device), state.device)
    return True


def _load_newest(checkpoints: Path, state: TrainState, identity: dict[str, Any]) -> _Checkpoint | None:
    """Read the newest valid checkpoint, or return None if there is nothing to read. Removes newer, damaged ones."""
    damaged = []
    for directory in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            about = manifest.verify(directory)
        except NewerFormat:
            raise
        except CheckpointError as error:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
            damaged.append(directory)
            continue
        _compare(directory, saved=about.get("identity", {}), expected=identity)
        try:
            loaded = _read(directory, state, about["counters"])
        except SafetensorError as error:
            raise CheckpointError(f"a file in {directory} is not a safetensors file: {error}") from None
        for skipped in damaged:
            manifest.remove(skipped)
        return loaded
    if unusable := sorted(path.name for path in checkpoints.glob("[!.]*")):
        raise CheckpointError(
            f"nothing in {checkpoints} ({', '.join(unusable)}) can be used, and training does not start over. "
            "Restore a checkpoint from a backup, or remove the directory to train from the beginning."
        )
    return None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and the incomplete directories of killed trainers."""
    for directory in sorted(checkpoints.glob("step-*"), reverse=True)[keep:]:
        manifest.remove(directory)
    manifest.sweep(checkpoints, older_than_seconds=0)


def _compare(directory: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in sorted({*saved, *expected}):
        if saved.get(key) != expected.get(key):
            raise CheckpointError(
                f"{directory} belongs to another training: its {key} is {saved.get(key)!r}, this training has "
                f"{expected.get(key)!r}. Use another run directory."
            )


def _read(directory: Path, state: TrainState, counters: dict[str, Any]) -> _Checkpoint:
    device = "cpu" if state.parallel.is_sharded else str(state.device)
    best = directory / "best.safetensors"
    return _Checkpoint(
        counters=counters,
        model=load_file(directory / "model.safetensors", device=device),
        optimizer=load_file(directory / "optimizer.safetensors", device=device),
        best=load_file(best) if best.exists() else {},
        random=load_file(directory / "random.safetensors"),
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimizer's state. A tensor's name is its parameter's index and its own name: `3.exp_avg`."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def _load_optimizer(state: TrainState, tensors: Tensors) -> None:
    """Give every rank its shard (or copy) of the optimizer's state, which rank 0 passes as `tensors`."""
    if state.ranks.size > 1:
        tensors = _scatter_optimizer(state, tensors)
    by_parameter: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        by_parameter.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_parameter, "param_groups": groups})


def _scatter_optimizer(state: TrainState, tensors: Tensors) -> Tensors:
    shapes = state.ranks.run_on_rank_0(lambda: {key: list(value.shape) for key, value in tensors.items()})
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    own_tensors = {}
    for key, shape in shapes.items():
        parameter = parameters[int(key.partition(".")[0])]
        # Every rank holds a complete copy of tensors of other shapes, such as a count of updates.
        has_parameter_shape = tuple(shape) == parameter.shape
        own = torch.zeros_like(parameter) if has_parameter_shape else torch.zeros(shape, device=state.device)
        scatter(state.ranks, own, tensors.get(key))
        own_tensors[key] = own
    return own_tensors


def _random_states(device: torch.device) -> Tensors:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def _keep_usable(states: Tensors, counters: dict[str, Any], device: torch.device) -> Tensors:
    """Return the random states without that of the device, if a device of another kind saved the checkpoint."""
    executions = counters.get("executions")
    is_same_kind = not executions or executions[-1]["device"].partition(":")[0] == device.type
    return states if is_same_kind else {"cpu": states["cpu"]}


def _set_random_states(states: Tensors, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" not in states:  # a device that takes over from a CPU keeps the state that the seed gave it
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["device"])

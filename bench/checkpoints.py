"""What saving costs: the seconds of one checkpoint at GPT-2's smallest shape, and their share of a training.

    python -m bench.checkpoints --saves 5

The state is that of a training in progress: weights, both moments of AdamW, the best weights so far, random states. The
model has an output head of its own, so GPT-2's 124M parameters are 163M here. The benchmark needs 8 GB of memory, and
disk for three checkpoints of 2.6 GB.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptcore import manifest
from gptcore.config import ModelConfig, TrainConfig
from gptcore.training import checkpoint
from gptcore.training.state import TrainState

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Cost:
    """The times of one save, in seconds. Writing, hashing and flushing are summed over threads that work at once."""

    total: float
    cpu: float
    """Processor seconds of all cores together, including system time."""
    writing: float
    hashing: float
    flushing: float
    num_bytes: int

    def share(self, interval: float) -> float:
        """Return the share of the time between the ends of two saves that is spent saving."""
        return self.total / (interval + self.total)


def state_in_progress(model: ModelConfig, train: TrainConfig) -> TrainState:
    """Return the state after one update of random gradients and one evaluation."""
    state = TrainState.initial(model.build_cfg(GPT2_VOCABULARY), train)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.record_evaluation(1.0)
    return state


def save_timed(checkpoints: Path, state: TrainState, keep: int) -> Cost:
    """Save once and measure it."""
    with (
        timed(checkpoint, "save_file") as writing,
        timed(manifest, "sha256_of_file") as hashing,
        timed(manifest, "flush") as flushing,
    ):
        began, worked = time.perf_counter(), time.process_time()
        made = checkpoint.save(checkpoints, state, {}, keep)
        total, cpu = time.perf_counter() - began, time.process_time() - worked
    num_bytes = sum(path.stat().st_size for path in made.iterdir())
    return Cost(total, cpu, sum(writing), sum(hashing), sum(flushing), num_bytes)


@contextmanager
def timed(module: Any, name: str) -> Iterator[list[float]]:
    """Collect the seconds of each call of `module.name`."""
    inner: Callable[..., Any] = getattr(module, name)
    seconds: list[float] = []

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(module, name, measured)
    try:
        yield seconds
    finally:
        setattr(module, name, inner)


def measure(saves: int, size: str, root: Path) -> list[Cost]:
    """Return the cost of each of `saves` saves, one after the other."""
    train = TrainConfig(device="cpu", precision="fp32", threads=torch.get_num_threads())
    state = state_in_progress(ModelConfig.model_validate({"size": size}), train)
    costs = []
    for step in range(1, saves + 1):
        state.step = step
        costs.append(save_timed(root, state, train.keep_checkpoints))
    return costs


def main() -> None:
    """Print each save, the median, and its share at the default interval."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description="What saving costs.")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--dir", type=Path, help="on the disk to be measured; a temporary directory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    interval = TrainConfig().checkpoint_seconds
    assert interval is not None, "checkpoint_seconds has a default"
    with tempfile.TemporaryDirectory(dir=given.dir) as root:
        costs = measure(given.saves, given.size, Path(root) / "checkpoints")
    for cost in costs:
        print(
            f"{cost.total:.2f} s for {cost.num_bytes / 1e9:.2f} GB, {cost.cpu:.2f} s of CPU: "
            f"writing {cost.writing:.2f}, sha256 {cost.hashing:.2f}, fsync {cost.flushing:.2f}"
        )
    middle = statistics.median(cost.total for cost in costs)
    share = statistics.median(cost.share(interval) for cost in costs)
    print(f"median {middle:.2f} s: {share:.2%} of a training that saves every {interval:.0f} s")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()

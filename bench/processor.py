"""Measure what fixed rules decide on CPUs, and say which of them should choose otherwise on this processor.

    python -m bench.processor

Two libraries multiply a few rows with matrices of GPT-2's sizes, in turn (gptcore/processor.py). Training steps in fp32
and in bf16 take turns at the shapes S, C and M (gptcore/training/resolve.py). bf16 is left out if the processor has no
instructions for it: it is then hundreds of times slower. A rule is named if the other choice takes less than 0.9 times
as long. Takes about three minutes on 2 cores.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.report import table
from bench.shapes import LEARNING_RATE, SEED, SHAPES, WEIGHT_DECAY, Shape
from gptcore.config import TrainConfig
from gptcore.processes import count_cpus
from gptcore.processor import choose_min_rows, find_processor
from gptcore.training import memory
from gptcore.training.loop import update_weights
from gptcore.training.resolve import resolve
from gptcore.training.state import TrainState

MATRICES = ((384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072), (50257, 384), (50257, 768))
"""(outputs, inputs) of GPT-2's layers at the widths 384 and 768."""
ROWS = (1, 2, 4, 8, 32)
_CLEARLY = 0.9
_PRODUCT_SECONDS = 0.02


@dataclass(frozen=True)
class Choice:
    """Two ways to compute the same, the one that a rule chooses, and their seconds."""

    work: str
    seconds: dict[str, float]
    """Median seconds of each way."""
    chosen: str

    @property
    def is_wrong(self) -> bool:
        """Whether another way takes clearly less time than the chosen one."""
        return min(self.seconds.values()) < _CLEARLY * self.seconds[self.chosen]


def measure_in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way, which take turns. The first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            if number > 0:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def measure_products(matrices: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int) -> list[Choice]:
    """Multiply rows with matrices by MKL and by oneDNN."""
    found = []
    for outputs, inputs in matrices:
        weight = torch.randn(outputs, inputs)
        least = choose_min_rows(weight.numel())
        for count in rows:
            chosen = "onednn" if least is not None and count >= least else "mkl"
            with torch.inference_mode():
                seconds = _measure_product(torch.randn(count, inputs), weight, rounds)
            found.append(Choice(f"{count} x {inputs} by {outputs} x {inputs}", seconds, chosen))
    return found


def _measure_product(x: Tensor, weight: Tensor, rounds: int) -> dict[str, float]:
    """Return the seconds of one product of x (rows, inputs) and weight (outputs, inputs) by each library."""
    onednn: Any = torch.ops.mkldnn._linear_pointwise.default
    ways = {"mkl": lambda: F.linear(x, weight), "onednn": lambda: onednn(x, weight, None, "none", [], "")}
    times = max(1, int(_PRODUCT_SECONDS / measure_in_turn(ways, 2)["mkl"]))

    def repeat(product: Callable[[], object]) -> Callable[[], object]:
        return lambda: [product() for _ in range(times)]

    taken = measure_in_turn({name: repeat(product) for name, product in ways.items()}, rounds)
    return {name: seconds / times for name, seconds in taken.items()}


def measure_precisions(shapes: Sequence[Shape], rounds: int) -> list[Choice]:
    """Take training steps in fp32 and in bf16. Without instructions for bf16, return nothing."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        return []
    return [
        Choice(
            f"training step at {shape.name}",
            measure_in_turn({name: _training(shape, name) for name in ("fp32", "bf16")}, rounds),
            str(resolve(TrainConfig(device="cpu")).precision),
        )
        for shape in shapes
    ]


def _training(shape: Shape, precision: Any) -> Callable[[], object]:
    """Return a function that takes one training step."""
    train = TrainConfig(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        batch_size=shape.batch_size,
        threads=torch.get_num_threads(),
        device="cpu",
        precision=precision,
        compile=False,
        seed=SEED,
    )
    state, batch = TrainState.initial(shape.cfg(0.0), train), shape.batch(0)
    return lambda: update_weights(state, [batch], LEARNING_RATE, train)


def main() -> None:
    """Measure, print a table, and name the rules that would choose otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=count_cpus())
    parser.add_argument("--shapes", nargs="*", default=["S", "C", "M"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--matrices", type=int, default=len(MATRICES), help="how many matrices, the smallest first")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    memory.keep_freed_memory()
    found = measure_products(MATRICES[: asked.matrices], ROWS, asked.rounds)
    found += measure_precisions([SHAPES[name] for name in asked.shapes], asked.rounds)
    print(torch.cpu.get_capabilities().get("cpu_name"), find_processor(), f"{asked.threads} threads")
    rows = [
        (
            choice.work,
            ", ".join(f"{name} {1e6 * seconds:,.0f} µs" for name, seconds in choice.seconds.items()),
            choice.chosen,
            "the other is faster" if choice.is_wrong else "",
        )
        for choice in found
    ]
    print(table(("work", "median", "rule", ""), rows))
    wrong = sum(choice.is_wrong for choice in found)
    print(f"{wrong} of {len(found)} choices would be otherwise here" if wrong else "every rule chooses well here")


if __name__ == "__main__":
    main()

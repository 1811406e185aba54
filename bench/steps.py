"""One training step of every contender in turn, round after round, compared with the machine's fastest matmul.

A shared machine gets faster and slower while it is measured. The result is therefore ratios between steps that follow
each other, and medians over the rounds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.contender import MACHINE
from bench.peers import LITGPT, OURS, has_our_losses
from bench.shapes import Shape
from bench.workers import workers

MODULE = "bench.contender"
WARM_UP = 2
"""Steps of each contender that are not timed. Their losses are compared."""
LOSS_TOLERANCE = 1e-4
_LOADS = 50


@dataclass(frozen=True)
class Timed:
    """The steps of one contender at one shape."""

    name: str
    seconds: tuple[float, ...]
    """The seconds of the step of each round."""
    losses: tuple[float, ...]
    """Nats per token before each step, those of the warm-up first."""
    peak_mb: float
    """The peak of resident memory of its process, including libraries."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Steps:
    """All contenders at one shape."""

    shape: Shape
    drop_rate: float
    matmul_gflops: tuple[float, ...]
    """The speed of a large matmul in each round."""
    contenders: tuple[Timed, ...]
    """Ours first."""

    @property
    def ours(self) -> Timed:
        return self.contenders[0]

    @property
    def best(self) -> Timed:
        """Return the fastest peer."""
        return min(self.contenders[1:], key=lambda one: one.median)

    @property
    def ratio(self) -> float:
        """Return the ratio of the fastest peer's median time to ours."""
        return self.best.median / self.ours.median

    @property
    def ratio_by_round(self) -> float:
        """Return the same ratio as the median of the ratios of the rounds."""
        return statistics.median(theirs / ours for theirs, ours in zip(self.best.seconds, self.ours.seconds))

    @property
    def memory_share(self) -> float:
        """Return the ratio of our peak memory to that of the fastest peer."""
        return self.ours.peak_mb / self.best.peak_mb

    def gflops(self, one: Timed) -> float:
        """Return the 10^9 operations per second, by the formula for the arithmetic that a step needs."""
        return self.shape.step_flops / one.median / 1e9

    @property
    def ceiling(self) -> float:
        return statistics.median(self.matmul_gflops)

    def loss_difference(self, one: Timed) -> float | None:
        """Return the largest relative difference of a loss from ours, or None if the losses may differ."""
        if self.drop_rate or not has_our_losses(one.name):
            return None
        return max(abs(theirs - ours) / abs(ours) for theirs, ours in zip(one.losses, self.ours.losses))

    def to_json(self) -> dict[str, Any]:
        figures = {
            one.name: {
                **asdict(one),
                "median_seconds": one.median,
                "gflops": self.gflops(one),
                "share_of_matmul": self.gflops(one) / self.ceiling,
                "loss_difference": self.loss_difference(one),
            }
            for one in self.contenders
        }
        return {
            "shape": asdict(self.shape),
            "drop_rate": self.drop_rate,
            "step_flops": self.shape.step_flops,
            "matmul_gflops": self.ceiling,
            "contenders": figures,
            "best_peer": self.best.name,
            "ratio": self.ratio,
            "ratio_by_round": self.ratio_by_round,
            "memory_share": self.memory_share,
        }


def measure_steps(
    shape: Shape, names: Sequence[str], drop_rate: float, rounds: int, threads: int, nanogpt: str | None
) -> Steps:
    """Start every contender of `names`, ours first, and measure them in turn."""
    taking_part = [name for name in names if not (drop_rate and name == LITGPT)]
    specs = {name: spec_of(name, shape, drop_rate, threads, nanogpt) for name in (*taking_part, MACHINE)}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    with workers(MODULE, specs) as started:
        for index in range(WARM_UP + rounds):
            for name, worker in started.items():
                answers[name].append(worker.ask("matmul") if name == MACHINE else worker.ask("step", index=index))
        peaks = {name: worker.peak_mb() for name, worker in started.items()}
    timed = (
        Timed(
            name,
            tuple(answer["seconds"] for answer in answers[name][WARM_UP:]),
            tuple(answer["loss"] for answer in answers[name]),
            peaks[name],
        )
        for name in taking_part
    )
    ceiling = tuple(answer["gflops"] for answer in answers[MACHINE][WARM_UP:])
    return Steps(shape, drop_rate, ceiling, tuple(timed))


@dataclass(frozen=True)
class Loader:
    """The cost of the batch of a training step, compared with the step."""

    shape: Shape
    batch_seconds: float
    step_seconds: float

    @property
    def share(self) -> float:
        """Return the share of the batch in the time of a step and its batch."""
        return self.batch_seconds / (self.batch_seconds + self.step_seconds)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def measure_loader(shape: Shape, rounds: int, threads: int) -> Loader:
    """Measure medians of our steps and batches in turn. Batches come from a token file, as in the trainer."""
    with workers(MODULE, {OURS: spec_of(OURS, shape, 0.0, threads, None)}) as started:
        ours = started[OURS]
        steps, loads = [], []
        for index in range(WARM_UP + rounds):
            steps.append(ours.ask("step", index=index)["seconds"])
            loads.append(ours.ask("load", first=index * _LOADS, count=_LOADS)["seconds"])
    return Loader(shape, statistics.median(loads[WARM_UP:]), statistics.median(steps[WARM_UP:]))


def spec_of(
    name: str, shape: Shape, drop_rate: float, threads: int, nanogpt: str | None, trains: bool = True
) -> dict[str, Any]:
    """Return the specification for the process of a contender."""
    about = {"name": name, "shape": asdict(shape), "drop_rate": drop_rate}
    return {**about, "threads": threads, "nanogpt": nanogpt, "trains": trains}

"""Greedy generation by every contender in turn, compared with what the memory allows.

Each new token of one text reads every weight once. The speed of memory divided by the bytes of the weights is therefore
a bound of the tokens per second. If several texts are written together, the arithmetic may be the bound instead. Every
contender continues the same 16 tokens: one text by 200 tokens, several texts by 60 each. The plain one has no cache and
is slow. It writes 4 tokens after 114 for one text, which gives the same mean length, and after 44 for several texts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.contender import MACHINE
from bench.peers import HF, LITGPT, OURS, OURS_INT8, PLAIN
from bench.shapes import Shape
from bench.steps import MODULE, spec_of
from bench.workers import workers

SHAPES, BATCHES = ("M", "L"), (1, 8)
CONTENDERS = (OURS, PLAIN, HF, LITGPT)
_PROMPT = 16
_NEW = {1: 200, 8: 60}
_PLAIN_NEW = 4
_WARM_UP = {"batch": 1, "prompt": 4, "new": 4}


@dataclass(frozen=True)
class Written:
    """The speed and the text of one contender."""

    name: str
    rates: tuple[float, ...]
    """Tokens per second in each round, of all texts together."""
    same_tokens: int | None
    """The number of tokens at the start of the first text that equal ours; None if they may differ."""

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Generation:
    """All contenders at one shape and number of texts."""

    shape: Shape
    batch: int
    read_gb_per_second: float
    contenders: tuple[Written, ...]
    """Ours first."""
    int8: Written
    """Ours with rounded weights, whose texts differ."""

    @property
    def limit(self) -> float | None:
        """Return the tokens per second at which the weights can be read, for a single text."""
        return self.read_gb_per_second * 1e9 / self.shape.weight_bytes if self.batch == 1 else None

    @property
    def ours(self) -> Written:
        return self.contenders[0]

    @property
    def best(self) -> Written:
        """Return the fastest peer."""
        return max(self.contenders[1:], key=lambda one: one.median)

    @property
    def ratio(self) -> float:
        """Return the ratio of our median tokens per second to that of the fastest peer."""
        return self.ours.median / self.best.median

    @property
    def ratio_by_round(self) -> float:
        """Return the same ratio as the median of the ratios of the rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours.rates, self.best.rates))

    @property
    def int8_ratio(self) -> float:
        """Return the ratio of tokens with rounded weights to ours, as the median of the ratios of the rounds."""
        return statistics.median(rounded / ours for rounded, ours in zip(self.int8.rates, self.ours.rates))

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "batch": self.batch,
            "read_gb_per_second": self.read_gb_per_second,
            "limit": self.limit,
            "contenders": {one.name: {**asdict(one), "tokens_per_second": one.median} for one in self.contenders},
            "int8": {**asdict(self.int8), "tokens_per_second": self.int8.median, "of_ours": self.int8_ratio},
            "best_peer": self.best.name,
            "ratio": self.ratio,
            "ratio_by_round": self.ratio_by_round,
        }


def measure_generation(
    shape: Shape, names: Sequence[str], rounds: int, threads: int, new: int | None = None
) -> list[Generation]:
    """Measure the CONTENDERS in `names`, in turn, for each of BATCHES. `new` replaces the usual number of tokens."""
    taking_part = [name for name in CONTENDERS if name in names]
    asked = (*taking_part, OURS_INT8)
    specs = {name: spec_of(name, shape, 0.0, threads, None, trains=False) for name in (*asked, MACHINE)}
    with workers(MODULE, specs) as started:
        for name in asked:
            started[name].ask("generate", **_WARM_UP)
        made = []
        for batch in BATCHES:
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
            reads = []
            for _ in range(rounds):
                for name in asked:
                    answers[name].append(started[name].ask("generate", batch=batch, **_lengths(name, batch, new)))
                reads.append(started[MACHINE].ask("read")["gb_per_second"])
            ours = answers[OURS][0]["ids"]
            *written, rounded = (_written(name, answers[name], ours) for name in asked)
            made.append(Generation(shape, batch, statistics.median(reads), tuple(written), rounded))
    return made


def _lengths(name: str, batch: int, new: int | None) -> dict[str, int]:
    new = new or _NEW[batch]
    if name == PLAIN and new > _PLAIN_NEW:
        return {"prompt": _PROMPT + (new - _PLAIN_NEW) // 2, "new": _PLAIN_NEW}
    return {"prompt": _PROMPT, "new": new}


def _written(name: str, answers: Sequence[dict[str, Any]], ours: list[list[int]]) -> Written:
    ids = answers[0]["ids"]
    count = len(ids) * len(ids[0])
    same = None if name in (PLAIN, LITGPT) else _common(ids[0], ours[0])
    return Written(name, tuple(count / answer["seconds"] for answer in answers), same)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((index for index, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))

"""Which of two models is the better one, and how sure one can be of it: a paired comparison on the same blocks.

Both models are scored on every block, so what is uncertain is only how the blocks happened to fall. The bootstrap draws
blocks anew, with replacement, and sees how much the difference moves: Koehn 2004, "Statistical significance tests for
machine translation evaluation"; Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13. Blocks of one
document resemble each other, so documents are drawn whole where there are enough of them. Which blocks may count stands
in clean.py; what follows from a comparison, in whoever asks for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
MIN_BLOCKS = 20
"""With fewer blocks no interval is given: the evidence is insufficient."""
MIN_DOCUMENTS = 30
"""With fewer documents the blocks are drawn one by one."""
_SEED = 20_040_725
_CELLS = 1 << 20  # drawn indices that are held at once: some 40 MB

Floats = npt.NDArray[np.float64]
Finding = Literal["better", "worse", "tie within noise", "not finite", "insufficient evidence"]


@dataclass(frozen=True)
class Comparison:
    """A challenger beside a champion, in bits per byte on the same blocks."""

    challenger: float
    """NaN where there is no block."""
    champion: float
    blocks: int
    bytes: int
    drawn_by: Literal["document", "block"]
    confidence: float
    low: float | None
    """The improvement, champion less challenger, is above this with the given confidence. None without evidence."""
    high: float | None
    """It is below this with the same confidence."""

    @property
    def improvement(self) -> float:
        """By how much the challenger needs fewer bits per byte."""
        return self.champion - self.challenger

    def finding(self, margin: float) -> Finding:
        """What the numbers say of the challenger.

        It is better only where the lower bound of its improvement is above `margin`: a test of superiority by a margin.
        The alternative, a lower bound above zero and a mean above the margin, would let an equal challenger through in
        up to 1 of 20 nights. Here one that is better by no more than the margin gets through so seldom, and an equal
        one hardly ever. Little is lost: the champion stays the same until it is beaten, so small gains add up against
        it. A margin of 0 is the plain one-sided test. A score that is not finite never wins.
        """
        if self.blocks and not (math.isfinite(self.challenger) and math.isfinite(self.champion)):
            return "not finite"
        if self.low is None or self.high is None:
            return "insufficient evidence"
        if self.low > margin:
            return "better"
        return "worse" if self.high < 0 else "tie within noise"


def compare(
    challenger: Sequence[Mapping[str, Any]], champion: Sequence[Mapping[str, Any]], confidence: float
) -> Comparison:
    """Compares two models' `Evaluation.per_block`, made of the same blocks in the same order.

    The bounds are percentiles of the bootstrap, each one-sided at `confidence`.
    """
    assert [b["sha256"] for b in challenger] == [b["sha256"] for b in champion], "both models score the same blocks"
    sizes, documents = (np.array([block[key] for block in challenger], np.int64) for key in ("bytes", "document"))
    own, other = (np.array([block["nats"] for block in each], float) / math.log(2) for each in (challenger, champion))
    total = int(sizes.sum())
    is_by_document = len(np.unique(documents)) >= MIN_DOCUMENTS
    clusters = documents if is_by_document else np.arange(len(sizes))
    low = high = None
    if len(sizes) >= MIN_BLOCKS and np.isfinite(own).all() and np.isfinite(other).all():
        drawn = bootstrap(_per_cluster(other - own, clusters), _per_cluster(sizes, clusters))
        low, high = (float(bound) for bound in np.quantile(drawn, [1 - confidence, confidence], method="inverted_cdf"))
    return Comparison(
        challenger=float(own.sum() / total) if total else math.nan,
        champion=float(other.sum() / total) if total else math.nan,
        blocks=len(sizes),
        bytes=total,
        drawn_by="document" if is_by_document else "block",
        confidence=confidence,
        low=low,
        high=high,
    )


def gains(challenger: Sequence[Mapping[str, Any]], champion: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """By how many bits per byte the challenger is better on each block; of two models' `Evaluation.per_block`."""
    pairs = zip(challenger, champion, strict=True)
    return tuple((theirs["nats"] - own["nats"]) / math.log(2) / own["bytes"] for own, theirs in pairs)


def bootstrap(gains: Floats, sizes: Floats, draws: int = DRAWS) -> Floats:
    """(draws,) the improvement in bits per byte when as many clusters are drawn anew, with replacement.

    `gains` (clusters,) are in bits and `sizes` (clusters,) in bytes; a draw's improvement is the ratio of its sums. The
    seed is fixed. Time grows with clusters x draws, 1e8 in about a second; memory does not.
    """
    random = np.random.Generator(np.random.PCG64(_SEED))
    rows = max(1, _CELLS // len(gains))
    improvements = [
        gains[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
        for begin in range(0, draws, rows)
        for chosen in [random.integers(0, len(gains), (min(rows, draws - begin), len(gains)), np.int32)]
    ]
    return np.concatenate(improvements)


def _per_cluster(values: npt.ArrayLike, clusters: npt.NDArray[np.int64]) -> Floats:
    """(clusters,) sums of the values of each cluster."""
    return np.bincount(np.unique(clusters, return_inverse=True)[1], np.asarray(values, float)).astype(float)

"""Which of two models is better, and how sure the answer is: a paired comparison on the same blocks of text.

Both models are scored on every block, so the only uncertainty is which blocks happened to be held out. The bootstrap
draws blocks again and again, with replacement, and measures how much the difference varies: Koehn 2004, "Statistical
significance tests for machine translation evaluation"; Efron & Tibshirani 1993, "An introduction to the bootstrap",
chapter 13.
Blocks of one document resemble each other, so whole documents are drawn if there are enough of them. clean_blocks.py
selects the blocks that may count. The callers decide what follows from a comparison.

A comparison on all blocks together can mislead. Suppose that the corpus gains a kind of text that the champion never
met, perhaps garbage. The holdout gains that kind too, and the challenger improves so much on it that a loss on all
other text does not show. So the blocks that were in the champion's corpus already (old) and the others (new) can also
be compared separately: see `Comparison.classify`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
MIN_BLOCKS = 20
"""Fewer blocks give no interval: the evidence is insufficient."""
MIN_DOCUMENTS = 30
"""With fewer documents, single blocks are drawn."""
_SEED = 20_040_725
_CELLS = 1 << 20  # indices drawn at the same time: about 40 MB

Floats = npt.NDArray[np.float64]
Finding = Literal["better", "worse", "tie within noise", "worse on old text", "not finite", "insufficient evidence"]


@dataclass(frozen=True)
class Comparison:
    """A challenger beside a champion, in bits per byte on the same blocks."""

    challenger: float
    """NaN if there is no block."""
    champion: float
    blocks: int
    bytes: int
    drawn_by: Literal["document", "block"]
    confidence: float
    low: float | None
    """Lower bound of the improvement with the given confidence. None without sufficient evidence."""
    high: float | None
    """Upper bound of the improvement with the same confidence. None without sufficient evidence."""
    old: "Comparison | None" = None
    """The comparison on the old blocks alone. None if it is unknown which blocks are old."""
    new: "Comparison | None" = None
    """The comparison on the other blocks alone."""
    available_bytes: int | None = None
    """Bytes of the text that the blocks are a sample of; `bytes` if all of it was scored. None if an earlier release
    made the comparison, which scored everything."""

    @property
    def improvement(self) -> float:
        """Return how many bits per byte fewer the challenger needs: champion minus challenger."""
        return self.champion - self.challenger

    def is_worse_by(self, margin: float) -> bool:
        """Whether the upper bound of the improvement is below -`margin` bits per byte. False with too few blocks."""
        return self.high is not None and self.high < -margin

    def classify(self, margin: float, forget: float) -> Finding:
        """Classify the challenger: better, worse, a tie, or not comparable. A score that is not finite never wins.

        The challenger is better only if the lower bound of its improvement is above `margin`: a test of superiority
        by a margin. A margin of 0 is the plain one-sided test.

        The alternative test asks for a lower bound above zero and a mean above the margin. It would promote an equal
        challenger in up to 1 of 20 nights. The test here promotes a challenger that is better by no more than the
        margin that rarely, and an equal one hardly ever. This strictness costs little: the champion stays until it is
        beaten, so small gains of the challengers add up.

        A better challenger is `worse on old text` if it is worse by `forget` on the old blocks. Block i has b_i bytes,
        on which the challenger saves g_i bits. On the old blocks the improvement is d = sum(g_i) / sum(b_i), and U is
        the upper bound of d, one-sided, from the same bootstrap at the same confidence. The challenger is worse by
        `forget` if there are at least `MIN_BLOCKS` old blocks and U < -forget. This is a test of inferiority by a
        margin: the whole interval is beyond the margin (Piaggio et al. 2012, "Reporting of noninferiority and
        equivalence randomized trials", JAMA 308:2594). So a challenger that is as good on old text as the champion is
        stopped in at most 1 of 20 nights with a confidence of 0.95 and `forget` 0, and more rarely with a larger
        `forget`.
        """
        if self.blocks and not (math.isfinite(self.challenger) and math.isfinite(self.champion)):
            return "not finite"
        if self.low is None or self.high is None:
            return "insufficient evidence"
        if self.low > margin:
            return "worse on old text" if self.old is not None and self.old.is_worse_by(forget) else "better"
        return "worse" if self.high < 0 else "tie within noise"


def compare(
    challenger: Sequence[Mapping[str, Any]],
    champion: Sequence[Mapping[str, Any]],
    confidence: float,
    weights: Sequence[float] | None = None,
) -> Comparison:
    """Compare two models by their `Evaluation.per_block`, both made of the same blocks in the same order.

    The bounds are percentiles of the bootstrap, each one-sided at `confidence`. A block of weight w, of `weights`
    (blocks,), counts as w blocks with the same scores: it is one of a sample. By default all blocks have weight 1.
    """
    assert [b["sha256"] for b in challenger] == [b["sha256"] for b in champion], "both models score the same blocks"
    factors = np.ones(len(challenger)) if weights is None else np.asarray(weights, float)  # (blocks,)
    sizes = np.array([block["bytes"] for block in challenger], np.int64) * factors  # (blocks,) of the text stood for
    challenger_bits, champion_bits = (_bits_per_block(scores) * factors for scores in (challenger, champion))
    total = float(sizes.sum())
    clusters, is_by_document = _choose_clusters(challenger)  # (blocks,)
    low = high = None
    if len(sizes) >= MIN_BLOCKS and np.isfinite(challenger_bits).all() and np.isfinite(champion_bits).all():
        gains = _sum_by_cluster(champion_bits - challenger_bits, clusters)  # (clusters,)
        drawn = bootstrap(gains, _sum_by_cluster(sizes, clusters))  # (draws,)
        low, high = (float(bound) for bound in np.quantile(drawn, [1 - confidence, confidence], method="inverted_cdf"))
    return Comparison(
        challenger=float(challenger_bits.sum() / total) if total else math.nan,
        champion=float(champion_bits.sum() / total) if total else math.nan,
        blocks=len(sizes),
        bytes=sum(block["bytes"] for block in challenger),
        drawn_by="document" if is_by_document else "block",
        confidence=confidence,
        low=low,
        high=high,
        available_bytes=round(total),
    )


def compare_by_age(
    challenger: Sequence[Mapping[str, Any]],
    champion: Sequence[Mapping[str, Any]],
    confidence: float,
    is_old: Sequence[bool],
    weights: Sequence[float] | None = None,
) -> Comparison:
    """Compare two models as `compare` does: on all blocks, on the old ones alone, and on the new ones alone.

    `is_old`, (blocks,), says which blocks are old. By `weights`, (blocks,), old and new text count as much as they have
    text, even if a larger share of the new text is scored.
    """
    weights = [1.0] * len(is_old) if weights is None else weights
    old, new = (
        compare(
            list(compress(challenger, chosen)),
            list(compress(champion, chosen)),
            confidence,
            list(compress(weights, chosen)),
        )
        for chosen in (is_old, [not old for old in is_old])
    )
    return replace(compare(challenger, champion, confidence, weights), old=old, new=new)


def measure_interval(per_block: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the bounds, in bits per byte, between which a score lies with a confidence of 95 percent.

    `per_block` is an `Evaluation.per_block`. The bounds are percentiles of the bootstrap, two-sided. None with fewer
    than `MIN_BLOCKS` blocks, or if a score is not finite.
    """
    bits = _bits_per_block(per_block)  # (blocks,)
    if len(bits) < MIN_BLOCKS or not np.isfinite(bits).all():
        return None
    clusters, _ = _choose_clusters(per_block)
    sizes = _sum_by_cluster([block["bytes"] for block in per_block], clusters)  # (clusters,)
    low, high = np.quantile(bootstrap(_sum_by_cluster(bits, clusters), sizes), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def compute_gains(challenger: Sequence[Mapping[str, Any]], champion: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return how many bits per byte fewer the challenger needs on each block. Both are `Evaluation.per_block`."""
    pairs = zip(challenger, champion, strict=True)
    return tuple((theirs["nats"] - own["nats"]) / math.log(2) / own["bytes"] for own, theirs in pairs)


def bootstrap(gains: Floats, sizes: Floats, draws: int = DRAWS) -> Floats:
    """Return (draws,) the improvement in bits per byte in each draw of as many clusters, with replacement.

    `gains` (clusters,) are in bits, `sizes` (clusters,) in bytes. A draw's improvement is the sum of its gains divided
    by the sum of its sizes. The seed is fixed. The time grows with clusters x draws, 1e8 in about a second; the memory
    does not grow.
    """
    random = np.random.Generator(np.random.PCG64(_SEED))
    rows = max(1, _CELLS // len(gains))
    improvements = []
    for begin in range(0, draws, rows):
        shape = (min(rows, draws - begin), len(gains))
        chosen = random.integers(0, len(gains), shape, np.int32)  # (rows, clusters)
        improvements.append(gains[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))  # (rows,)
    return np.concatenate(improvements)


def _choose_clusters(per_block: Sequence[Mapping[str, Any]]) -> tuple[npt.NDArray[np.int64], bool]:
    """Return (blocks,) the cluster that each block is drawn with, and whether the clusters are documents."""
    documents = np.array([block["document"] for block in per_block], np.int64)  # (blocks,)
    is_by_document = len(np.unique(documents)) >= MIN_DOCUMENTS
    return documents if is_by_document else np.arange(len(documents)), is_by_document


def _bits_per_block(per_block: Sequence[Mapping[str, Any]]) -> Floats:
    return np.array([block["nats"] for block in per_block], float) / math.log(2)


def _sum_by_cluster(values: npt.ArrayLike, clusters: npt.NDArray[np.int64]) -> Floats:
    """Return (clusters,) the sum of each cluster's values. `values` and `clusters` are (blocks,)."""
    return np.bincount(np.unique(clusters, return_inverse=True)[1], np.asarray(values, float)).astype(float)

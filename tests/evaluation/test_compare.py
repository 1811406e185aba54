"""The paired comparison against all possible resamples, the normal approximation, and simulations of known truth."""

import itertools
import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gptcore.evaluation.compare import MIN_BLOCKS, bootstrap, compare, compare_by_age, measure_interval


def per_block(nats: Sequence[float], documents: Sequence[int] | None = None, size: int = 1000) -> list[dict[str, Any]]:
    """Return scores in the form of `Evaluation.per_block`."""
    numbers = range(len(nats)) if documents is None else documents
    return [
        {"sha256": str(index), "document": int(document), "bytes": size, "nats": float(value), "tokens": 1}
        for index, (value, document) in enumerate(zip(nats, numbers, strict=True))
    ]


def pair(gains: Sequence[float], documents: Sequence[int] | None = None) -> tuple[Any, Any]:
    """Return a challenger and a champion with these gains in bits per byte, on blocks whose scores differ much."""
    champion = np.random.default_rng(5).uniform(500, 3000, len(gains))
    challenger = champion - np.asarray(gains) * 1000 * math.log(2)
    return per_block(challenger.tolist(), documents), per_block(champion.tolist(), documents)


def test_with_few_clusters_the_bootstrap_matches_the_exact_distribution_of_all_resamples() -> None:
    gains, sizes = np.array([3.0, -1.0, 0.5, 8.0]), np.array([10.0, 40.0, 20.0, 30.0])
    every = [list(chosen) for chosen in itertools.product(range(4), repeat=4)]
    exact = np.sort([gains[chosen].sum() / sizes[chosen].sum() for chosen in every])
    drawn = np.sort(bootstrap(gains, sizes))
    at = np.unique(exact) + 1e-9
    expected, seen = (np.searchsorted(values, at) / len(values) for values in (exact, drawn))
    assert np.abs(expected - seen).max() < 4 * 0.5 / math.sqrt(len(drawn))  # four standard errors


def test_many_blocks_give_the_bounds_of_the_normal_approximation() -> None:
    gains = np.random.default_rng(1).normal(0.02, 0.3, 4000)
    found = compare(*pair(gains.tolist()), confidence=0.95)
    error = gains.std() / math.sqrt(len(gains))
    assert found.drawn_by == "document" and found.low is not None and found.high is not None
    assert found.improvement == pytest.approx(gains.mean())
    assert found.low == pytest.approx(gains.mean() - 1.6449 * error, abs=0.06 * error)
    assert found.high == pytest.approx(gains.mean() + 1.6449 * error, abs=0.06 * error)


def test_scores_are_bits_per_byte_over_all_blocks_of_any_length() -> None:
    blocks = [per_block([value], size=size)[0] for value, size in ((100.0, 100), (900.0, 400), (50.0, 20))]
    found = compare(blocks, blocks, confidence=0.95)
    assert found.challenger == found.champion == pytest.approx(1050 / math.log(2) / 520)
    assert (found.blocks, found.bytes, found.low) == (3, 520, None)


def test_the_lower_bound_is_below_the_truth_in_19_of_20_simulations_even_if_blocks_of_a_document_are_alike() -> None:
    documents = np.repeat(np.arange(40), 4)
    random = np.random.default_rng(2)
    below_by_document = below_by_block = 0
    for _ in range(300):
        gains = 0.01 + random.normal(0, 0.05, 40)[documents] + random.normal(0, 0.02, 160)
        drawn = bootstrap(np.bincount(documents, gains), np.full(40, 4.0), draws=1000)
        below_by_document += np.quantile(drawn, 0.05) < 0.01
        below_by_block += np.quantile(bootstrap(gains, np.ones(160), draws=1000), 0.05) < 0.01
    assert 0.91 <= below_by_document / 300 <= 0.98
    assert below_by_block / 300 < 0.88  # this is why whole documents are drawn


def test_an_equal_challenger_rarely_wins_or_falls_behind_and_one_better_by_the_margin_wins_in_1_of_20() -> None:
    random = np.random.default_rng(3)
    wins = {0.0: 0, 0.005: 0}
    behind = {0.0: 0, 0.005: 0}
    for _ in range(150):
        noise = random.normal(0, 0.03, 100)
        for truth in wins:
            found = compare(*pair((truth + noise).tolist()), confidence=0.95)
            wins[truth] += found.classify(0.005, 0.005) == "better"
            if truth == 0.0:
                for forget in behind:
                    behind[forget] += found.is_worse_by(forget)
    assert wins[0.0] <= 4 and wins[0.005] <= 16
    assert behind[0.005] <= 4 and 1 <= behind[0.0] <= 16


@pytest.mark.parametrize(
    ("gains", "finding"),
    [
        ([0.5] * 40, "better"),
        ([0.006] * 40, "better"),
        ([0.005 - 1e-9] * 40, "tie within noise"),
        ([0.0] * 40, "tie within noise"),
        ([0.3, -0.2] * 20, "tie within noise"),
        ([-0.3, 0.2] * 20, "tie within noise"),
        ([-0.5] * 40, "worse"),
        ([0.5] * (MIN_BLOCKS - 1), "insufficient evidence"),
        ([0.5] * MIN_BLOCKS, "better"),
        ([], "insufficient evidence"),
        ([math.nan] + [0.5] * 39, "not finite"),
        ([-math.inf] + [0.5] * 39, "not finite"),
        ([math.nan] * 3, "not finite"),
    ],
)
def test_a_challenger_is_better_only_beyond_the_margin_and_the_noise(gains: list[float], finding: str) -> None:
    assert compare(*pair(gains), confidence=0.95).classify(0.005, 0.005) == finding


@pytest.mark.parametrize(
    ("old", "forget", "finding"),
    [
        ([-0.3] * 20, 0.005, "worse on old text"),
        ([-0.3] * 20, 0.3 - 1e-9, "worse on old text"),
        ([-0.3] * 20, 0.3 + 1e-9, "better"),
        ([-0.3] * 19, 0.005, "better"),
        ([-0.3, 0.3] * 10, 0.0, "better"),
        ([0.3] * 20, 0.0, "better"),
        ([-0.9] * 40, 0.005, "tie within noise"),
        ([-9.0] * 40, 0.005, "worse"),
        ([], 0.005, "better"),
    ],
)
def test_a_better_challenger_does_not_win_if_it_is_surely_worse_on_20_old_blocks(
    old: list[float], forget: float, finding: str
) -> None:
    gains = [*old, *[1.0] * 30]
    found = compare_by_age(*pair(gains), confidence=0.95, is_old=[number < len(old) for number in range(len(gains))])
    assert found.classify(0.005, forget) == finding
    assert found.old and found.new and (found.old.blocks, found.new.blocks) == (len(old), 30)
    assert found.new.improvement == pytest.approx(1.0) and found.improvement == pytest.approx(np.mean(gains))
    assert not old or found.old.improvement == pytest.approx(np.mean(old))


def test_old_and_new_text_count_as_much_as_there_is_even_if_all_of_the_new_text_is_scored() -> None:
    gains = [0.01] * 40 + [0.5] * 40
    is_old = [number < 40 for number in range(80)]
    found = compare_by_age(*pair(gains), confidence=0.95, is_old=is_old, weights=[49.0] * 40 + [1.0] * 40)
    assert found.improvement == pytest.approx(0.98 * 0.01 + 0.02 * 0.5)
    assert found.low is not None and found.high is not None and found.low < found.improvement < found.high
    assert found.old and found.new
    assert (found.old.improvement, found.new.improvement) == (pytest.approx(0.01), pytest.approx(0.5))
    assert (found.bytes, found.available_bytes) == (80_000, 2_000_000)
    assert (found.old.bytes, found.old.available_bytes) == (40_000, 1_960_000)
    assert found.new.available_bytes == found.new.bytes == 40_000


def test_without_weights_all_of_the_text_was_scored() -> None:
    models = pair(np.random.default_rng(8).normal(0.01, 0.1, 60).tolist())
    found = compare(*models, confidence=0.95)
    assert found == compare(*models, confidence=0.95, weights=[1.0] * 60)
    assert found.available_bytes == found.bytes == 60_000


def test_the_interval_of_a_score_is_that_of_the_normal_approximation() -> None:
    nats = np.random.default_rng(9).normal(1000, 200, 2000)
    found = measure_interval(per_block(nats.tolist()))
    assert found is not None
    bits = nats / 1000 / math.log(2)
    error = bits.std() / math.sqrt(len(bits))
    assert found[0] == pytest.approx(bits.mean() - 1.96 * error, abs=0.06 * error)
    assert found[1] == pytest.approx(bits.mean() + 1.96 * error, abs=0.06 * error)
    assert measure_interval(per_block([1000.0] * (MIN_BLOCKS - 1))) is None
    assert measure_interval(per_block([math.nan] * 40)) is None


def test_a_challenger_does_not_win_because_the_champion_s_score_is_not_finite() -> None:
    challenger, champion = pair([0.5] * 40)
    champion[3]["nats"] = math.inf
    assert compare(challenger, champion, confidence=0.95).classify(0.005, 0.005) == "not finite"


def test_whole_documents_are_drawn_from_30_on_and_single_blocks_below_30() -> None:
    for count, unit in ((29, "block"), (30, "document")):
        documents = np.repeat(np.arange(count), 2)
        assert compare(*pair([0.1] * len(documents), documents.tolist()), confidence=0.95).drawn_by == unit


def test_the_same_scores_give_the_same_bounds_and_swapped_models_give_mirrored_bounds() -> None:
    challenger, champion = pair(np.random.default_rng(4).normal(0.01, 0.1, 50).tolist())
    found, again, mirrored = (
        compare(*models, confidence=0.95)
        for models in ((challenger, champion), (challenger, champion), (champion, challenger))
    )
    assert found == again
    assert found.low is not None and mirrored.high is not None
    assert found.low == pytest.approx(-mirrored.high, abs=1e-3)
    assert found.improvement == -mirrored.improvement


def test_the_lower_bound_falls_as_confidence_rises() -> None:
    models = pair(np.random.default_rng(6).normal(0.01, 0.1, 60).tolist())
    lows = [compare(*models, confidence=confidence).low or math.nan for confidence in (0.5, 0.9, 0.95, 0.999)]
    assert lows == sorted(lows, reverse=True) and len(set(lows)) == 4


def test_the_bootstrap_of_ten_thousand_blocks_takes_less_than_64_mib() -> None:
    gains = np.random.default_rng(7).normal(0, 1, 10_000)
    tracemalloc.start()
    bootstrap(gains, np.ones(10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20

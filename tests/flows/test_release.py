"""The gate's verdict on scores."""

import math
from types import SimpleNamespace
from typing import cast

import pytest

from flows.release import decide
from gptcore.dossier import Scores

SCORES = cast(
    Scores, SimpleNamespace(baselines=SimpleNamespace(unigram_bits_per_byte=2.5), reported=SimpleNamespace(blocks=40))
)


@pytest.mark.parametrize(
    ("challenger", "champion", "is_promoted"),
    [
        (1.9, 2.0, True),
        (2.0, 2.0, False),
        (2.1, 2.0, False),
        (math.nan, 2.0, False),
        (math.inf, 2.0, False),
        (2.4, None, True),
        (2.5, None, False),
        (3.0, None, False),
        (math.nan, None, False),
        (math.inf, None, False),
    ],
)
def test_only_a_finite_and_better_score_wins(challenger: float, champion: float | None, is_promoted: bool) -> None:
    verdict = decide(challenger, champion, SCORES, None if champion is None else "7")
    assert verdict.promoted is is_promoted
    assert "40 blocks" in verdict.reason
    assert ("the unigram model" if champion is None else "version 7") in verdict.reason

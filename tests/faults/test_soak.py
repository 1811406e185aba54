"""Eight nights of the soak that `make soak` lives fifty of: something is killed on each."""

from pathlib import Path

import pytest

from bench.soak import KINDS, NOTHING, soak, summary

SEED = 13
"""Deals every kind of kill in the first six nights, and one in a training of the night itself."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_eight_nights_of_kills_leave_no_orphan_no_double_and_always_a_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    done = soak(tmp_path, nights=8, seed=SEED, kill_share=1.0)
    assert done.violations == [], summary(done)
    fell = {lived.kill for lived in done.lived if lived.kill and lived.fell != NOTHING}
    assert len(fell) >= len(KINDS) - 2, summary(done)  # one that comes too late falls into nothing
    assert done.promotions >= 1 and done.twins and done.looks > 50, summary(done)

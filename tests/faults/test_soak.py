"""Six nights of the soak that `make soak` lives fifty of: each kind of kill falls on one of them."""

from pathlib import Path

import pytest

from bench.soak import KINDS, NOTHING, soak, summary

SEED = 18
"""Deals each kind of kill once, that of the trainer on the first night, when nothing is finished that it could find."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_six_nights_of_kills_leave_no_orphan_no_double_and_always_a_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    done = soak(tmp_path, nights=6, seed=SEED, kill_share=1.0)
    assert done.violations == [], summary(done)
    fell = {lived.kill for lived in done.lived if lived.kill and lived.fell != NOTHING}
    assert len(fell) >= len(KINDS) - 1, summary(done)  # one may find nobody to hit
    assert done.promotions >= 1 and done.twins and done.looks > 50, summary(done)
    print(summary(done))

"""Eight nights of the soak that `make soak` lives fifty of: something is killed on each."""

from pathlib import Path

import pytest

from bench.soak import KINDS, NOTHING, soak, summary
from tests import databases

SEED = 18
"""Draws each kind once and two again, the trainer's first, while no run has finished that could be hit instead."""


@pytest.mark.timeout(1500)
@pytest.mark.deep
def test_eight_nights_of_kills_leave_no_orphan_no_double_and_always_a_champion(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    databases.give(tmp_path / "mlruns", migrated)
    done = soak(tmp_path, nights=8, seed=SEED, kill_share=1.0)
    assert done.violations == [], summary(done)
    fell = {lived.kill for lived in done.lived if lived.kill and lived.fell != NOTHING}
    assert len(fell) >= len(KINDS) - 1, summary(done)  # one may find nothing to kill
    assert done.promotions >= 1 and done.twins and done.looks > 50, summary(done)
    print(summary(done))

"""Eight nights of the soak test (`make soak` runs fifty): something is killed in each night."""

from pathlib import Path

import pytest

from bench.soak import KINDS, NOTHING, soak, summary
from tests import databases

SEED = 18
"""Draws each kind once and two kinds twice. The trainer comes first, when no finished run can be hit instead."""


@pytest.mark.timeout(1500)
@pytest.mark.deep
def test_eight_nights_of_kills_leave_no_orphan_and_no_duplicate_and_always_a_champion(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    databases.give(tmp_path / "mlruns", migrated)
    done = soak(tmp_path, nights=8, seed=SEED, kill_share=1.0)
    assert done.violations == [], summary(done)
    fell = {lived.kill for lived in done.lived if lived.kill and lived.fell != NOTHING}
    assert len(fell) >= len(KINDS) - 1, summary(done)  # one kind may find nothing to kill
    assert done.promotions >= 1 and done.twins and done.looks > 50, summary(done)
    print(summary(done))

"""A short soak: every kill once, and everything is in order afterwards. `make soak` lives through many more nights."""

from pathlib import Path

import pytest

from bench.soak import KILLS, plan, soak, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NIGHTS = len(KILLS) + 1


def test_after_nights_with_every_kill_nothing_is_unfinished_double_or_unbounded(tmp_path: Path) -> None:
    found = soak(NIGHTS, 1, tmp_path)
    print(table(found))
    assert found.problems == []
    assert {night.kill for night in plan(NIGHTS, 1)} == {None, *KILLS}
    assert sum(bool(lived.where) for lived in found.nights) > len(KILLS) // 2, "most kills found something to kill"
    assert found.looks > 20 and found.versions > 1 and found.promotions > 0

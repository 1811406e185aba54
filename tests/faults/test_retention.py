"""Retention never takes away what a rollback may go back to."""

from typing import Any

from flows.releases.champion import GATE, promote, rollback
from flows.releases.prune import prune
from flows.releases.registry import bundle_path
from gptcore.bundle import load
from tests.flows.test_prune import MODEL, numbers


# FAULTS: a rollback whose `previous` was deleted by retention is impossible
def test_the_champion_and_everything_that_a_rollback_may_reach_survive_retention(tiny_registry: Any) -> None:
    root = tiny_registry.root
    for number in range(1, 9):
        tiny_registry.register()
        if number in (1, 3, 4, 6):
            promote(root, MODEL, str(number), "better", GATE)
    rollback(root, MODEL, "bad", "ann")
    prune(root, {MODEL: 1})
    assert numbers(root) == set("1348")
    for version in "134":
        load(bundle_path(root, MODEL, version))
    assert [rollback(root, MODEL, "bad", "ann").target for _ in range(2)] == ["3", "1"]
    prune(root, {MODEL: 1})
    assert numbers(root) == set("18")

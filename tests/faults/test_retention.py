"""Retention never deletes a version that a rollback may return to."""

from typing import Any

from flows.operations.retention import prune
from flows.registry.champion import GATE, promote, rollback
from flows.registry.versions import fetch_bundle
from gptcore.bundle import load
from tests.operations.test_retention import MODEL, numbers


def test_the_champion_and_every_version_that_a_rollback_may_reach_survive_retention(tiny_registry: Any) -> None:
    root = tiny_registry.root
    for number in range(1, 9):
        tiny_registry.register()
        if number in (1, 3, 4, 6):
            promote(root, MODEL, str(number), "better", GATE)
    rollback(root, MODEL, "bad", "ann")
    prune(root, {MODEL: 1})
    assert numbers(root) == set("1348")
    for version in "134":
        load(fetch_bundle(root, MODEL, version))
    assert [rollback(root, MODEL, "bad", "ann").target for _ in range(2)] == ["3", "1"]
    prune(root, {MODEL: 1})
    assert numbers(root) == set("18")

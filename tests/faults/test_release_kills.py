"""A release killed between any two of its steps: the champion is the old or the new one, and the next call finishes it.

A first process records every point at which the real functions commit a transaction or touch a file. Then a process is
killed at each of these points. The test prints them.
"""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.faults.release_points import Forker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EVERY = 3
"""The slow tests kill a registration before every third point: kills before all of them take three minutes."""


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("release"))
    forker.root.prepare()
    assert forker.do("empty") == 0, forker.log.read_text()
    shutil.move(forker.root.path / "mlflow.db", forker.database)
    yield forker
    forker.stop()


def begin(forker: Forker, template: Path) -> None:
    shutil.rmtree(forker.root.path, ignore_errors=True)
    shutil.copytree(template, forker.root.path)


def chosen(points: list[str], every: int) -> list[int]:
    """Choose the points to test: the last of directories made in a row and two of the copied sources represent all.

    Of these, take each `every`-th.
    """
    copies = [number for number, point in enumerate(points) if "/code/gptcore/" in point][1:-1]
    made = [point.startswith("mkdir") for point in points]
    nested = [number for number, (this, next_) in enumerate(pairwise(made)) if this and next_]
    return [number for number in range(len(points)) if number not in copies and number not in nested][::every]


@pytest.mark.parametrize(
    ("state", "action", "champions", "every"),
    [
        ("new", "register", (None, "1"), EVERY),
        pytest.param("new", "register", (None, "1"), 1, marks=pytest.mark.deep),
        ("registered", "promote", ("1", "2"), 1),
        ("promoted", "rollback", ("2", "1"), 1),
        ("moved_outside", "settle", ("2", "2"), 1),
    ],
)
def test_a_kill_between_any_two_steps_leaves_a_champion_that_loads_and_the_next_call_completes_the_release(
    forker: Forker, tmp_path: Path, state: str, action: str, champions: tuple[str | None, str], every: int
) -> None:
    shutil.rmtree(forker.root.path, ignore_errors=True)
    forker.root.prepare()
    shutil.copy(forker.database, forker.root.path)
    assert forker.do(state) == 0, forker.log.read_text()
    shutil.copytree(forker.root.path, tmp_path / "template")
    assert forker.do(action, "look_at_everything", notes=True) == 0, forker.log.read_text()
    (undisturbed,), points = forker.looked(), forker.points()
    fell = []
    for number in chosen(points, every):
        begin(forker, tmp_path / "template")
        assert forker.do(action, notes=True, kill_at=number) == -9, forker.log.read_text()
        point = forker.points()[-1]
        assert forker.do("look", action, "look_at_everything") == 0, f"killed before {point}: {forker.log.read_text()}"
        seen, in_the_end = forker.looked()
        assert seen in champions, f"killed before {point}"
        assert in_the_end == undisturbed, f"killed before {point}"
        fell.append(point)
    print(f"\n{len(fell)} kills of {action}, each before: {', '.join(fell)}")
    assert undisturbed["aliases"]["champion"] == champions[1]
    assert all(move[-1] for move in undisturbed["moves"])

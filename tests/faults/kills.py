"""Kill trainers at named points and at random times, and compare each training with a twin that was never killed.

    python -m tests.faults.kills --kills 200 --seed 1

Each scenario of tests.trainings gets an equal share of the kills: half at named points, half at random times.
The program prints the points of the kills. Its exit code is 1 if a killed training ended differently from its twin.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore import manifest
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import STOPPED, RunDirectory
from tests.faults.dying import Life, live, live_until
from tests.tiny import make_tokens
from tests.trainings import SCENARIOS, outcome, prepare


class Differs(AssertionError):
    """A killed training did not end like its twin, or left temporary files."""


@dataclass
class Tally:
    """The points at which trainers were killed."""

    fell: list[str] = field(default_factory=list)
    trainings: int = 0
    """Number of trainings that ended and were compared with their twins."""

    def __str__(self) -> str:
        where = ", ".join(f"{kind} ({count})" for kind, count in sorted(Counter(map(_kind, self.fell)).items()))
        return f"{len(self.fell)} kills in {self.trainings} trainings, each ending as its twin; they fell into {where}"


def _kind(point: str) -> str:
    """Return the name of a point without its update and its file."""
    phase, what = re.sub(r"( of update)? \d+", "", re.sub(r" \(\d+\)$", "", point)).split(" ", 1)
    return f"{phase} {re.sub(r'(?<=ing|.of|.to) .*', '', what)}"


class Twin:
    """A scenario's training that was never killed, with its outcome and every point that it passed."""

    def __init__(self, root: Path, scenario: str, tokens: Tokens) -> None:
        self.root, self.tokens, self.settings = root / scenario.replace(" ", "-"), tokens, SCENARIOS[scenario]
        self.made = 0
        run = self.another()
        lives = list(lives_to_its_end(run))
        self.seconds = max(life.seconds for life in lives)
        points = list(dict.fromkeys(point for life in lives for point in life.passed))
        self.outcome = outcome(run)
        self.points = [*_with(points, self._points_of_a_resumption(points))]

    def another(self) -> RunDirectory:
        """Prepare a new run directory of the same training."""
        self.made += 1
        return prepare(self.root / str(self.made) / "run", self.tokens, **self.settings)

    def _points_of_a_resumption(self, points: Sequence[str]) -> list[str]:
        run = self.another()
        saved = _last_of_first_save(points)
        assert killed_at(run, points[saved])
        passed = [point for life in lives_to_its_end(run) for point in life.passed]
        return [point for point in dict.fromkeys(passed) if point not in set(points)]

    def compare(self, run: RunDirectory) -> None:
        """Raise Differs if a run has another outcome than the twin, or left temporary files or checkpoints."""
        there = outcome(run)
        for key, expected in self.outcome.items():
            if there[key] != expected:
                raise Differs(f"{run.path}: {key} is {there[key]}, the twin has {expected}")
        manifest.verify(run.final)
        if left := [*run.path.rglob(f"{manifest.TEMPORARY}*"), *run.checkpoints.glob("*")]:
            raise Differs(f"{run.path}: {left} is left")


def _last_of_first_save(points: Sequence[str]) -> int:
    first = next(index for index, point in enumerate(points) if point.startswith("save"))
    phase = points[first].removesuffix(" begins")
    return max(index for index, point in enumerate(points) if point.startswith(f"{phase} "))


def _with(points: Sequence[str], resumption: Sequence[str]) -> Iterator[str]:
    """Yield the points in an order in which one training can be killed at each of them in turn."""
    saved = _last_of_first_save(points)
    yield from points[: saved + 1]
    yield from resumption
    yield from points[saved + 1 :]


def lives_to_its_end(run: RunDirectory) -> Iterator[Life]:
    """Run undisturbed trainers, session after session, until the training is finished."""
    while True:
        life = live(run)
        yield life
        if life.code == 0:
            return
        if life.code != STOPPED:
            raise Differs(f"{run.path} ended with {life.code}: {life.said}")


def killed_at(run: RunDirectory, point: str) -> bool:
    """Run sessions until a trainer dies at the point (True) or the training is finished (False)."""
    life = live(run, {point: "SIGKILL"})
    while life.code == STOPPED:
        life = live(run, {point: "SIGKILL"})
    if life.was_killed and life.last != point:
        raise Differs(f"{run.path}: killed at {life.last}, not at {point}")
    if not life.was_killed and life.code != 0:
        raise Differs(f"{run.path}: before {point} it ended with {life.code}: {life.said}")
    return life.was_killed


def at_each(twin: Twin, points: Iterable[str], strike: Callable[[RunDirectory, str], bool]) -> int:
    """Strike trainings at each of the ordered points, and compare each with its twin. Return the number of trainings.

    One training is struck at as many points as possible. `strike` starts a trainer that is disturbed at a point, and
    returns whether the trainer reached the point.
    """
    left, trainings = list(points), 0
    while left:
        run, later, is_new = twin.another(), [], True
        for point in left:
            if is_new and point.startswith("resume"):  # there has to be something to resume
                killed_at(run, "after update 1 begins")
            if _is_behind(run, point):
                later.append(point)
            elif strike(run, point):
                check_what_stands(run)
            elif is_new:
                raise Differs(f"{run.path}: {point} was not passed")
            else:
                later.append(point)
            is_new = False
        for _ in lives_to_its_end(run):
            pass
        twin.compare(run)
        trainings += 1
        left = later
    return trainings


def kill_at_points(twin: Twin, points: Iterable[str], tally: Tally) -> None:
    """Kill trainers at each of the points."""

    def strike(run: RunDirectory, point: str) -> bool:
        was_killed = killed_at(run, point)
        tally.fell += [point] * was_killed
        return was_killed

    tally.trainings += at_each(twin, points, strike)


def _is_behind(run: RunDirectory, point: str) -> bool:
    """Whether the next trainer will not pass the point, because its save, update or end is committed."""
    reached = max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)
    of_update = re.search(r"update (\d+)", point)
    return manifest.is_committed(run.final) or (of_update is not None and int(of_update[1]) <= reached)


def check_what_stands(run: RunDirectory) -> None:
    """Check after a kill that every directory with a final name is complete."""
    for directory in (*run.checkpoints.glob("step-*"), *run.path.glob("final")):
        manifest.verify(directory)


def kill_at_random_times(twin: Twin, kills: int, draw: random.Random, tally: Tally) -> None:
    """Kill trainers at times between their first file operation and their likely end, up to 5 in one training."""
    before = len(tally.fell)
    while len(tally.fell) < before + kills:
        run = twin.another()
        wanted = min(5, before + kills - len(tally.fell))
        while wanted and run.read_result() is None:
            life = live_until(run, draw.uniform(0, twin.seconds))
            if life.was_killed:
                wanted -= 1
                tally.fell.append(life.last)
                check_what_stands(run)
        for _ in lives_to_its_end(run):
            pass
        twin.compare(run)
        tally.trainings += 1


def sample(points: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Draw up to `count` of the points, and keep their order."""
    return [points[index] for index in sorted(draw.sample(range(len(points)), min(count, len(points))))]


def kill(root: Path, kills: int, seed: int, names: Sequence[str] = tuple(SCENARIOS)) -> Tally:
    """Kill trainers `kills` times in all. Raise Differs if a training does not end like its twin."""
    tally, tokens, draw = Tally(), make_tokens(root), random.Random(seed)
    for index, name in enumerate(names):
        share = kills // len(names) + (index < kills % len(names))
        twin = Twin(root, name, tokens)
        kill_at_points(twin, sample(twin.points, (share + 1) // 2, draw), tally)
        kill_at_random_times(twin, share // 2, draw, tally)
    return tally


def main() -> int:
    """Return 0 if every training ended like its twin, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description="Kill trainers; see above.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenario", choices=list(SCENARIOS), action="append", help="only these")
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        try:
            tally = kill(Path(root), given.kills, given.seed, given.scenario or list(SCENARIOS))
        except Differs as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for point, count in sorted(Counter(tally.fell).items()):
        print(f"{count:5} {point}")
    print(tally)
    return 0


if __name__ == "__main__":
    sys.exit(main())

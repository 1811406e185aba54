"""Trainers that are killed, stopped or out of disk space at every named point: each training ends like its twin."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptcore import manifest
from gptcore.errors import CheckpointError, DiskFull
from gptcore.tokens.directory import Tokens
from gptcore.training.batches import Batches
from gptcore.training.run_directory import STOPPED, RunDirectory
from tests.faults.dying import live
from tests.faults.kills import (
    Tally,
    Twin,
    at_each,
    check_what_stands,
    kill,
    kill_at_points,
    killed_at,
    lives_to_its_end,
)
from tests.trainings import SCENARIOS, prepare

SAID_OF_A_FULL_DISK = re.compile(r"error: .* is full: more than the [0-9,]+ bytes .* are needed and [0-9,]+ are free")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Twin:
    """The plain scenario; an epoch ends between its two saves."""
    assert Batches(tokens.side("train"), 32, 32, 6, 2, 123).steps_per_epoch == 7
    return Twin(tmp_path_factory.mktemp("twin"), "plain", tokens)


@pytest.fixture
def run(twin: Twin) -> RunDirectory:
    return twin.another()


def checkpoints(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.glob("*"))


def finish(twin: Twin, run: RunDirectory) -> None:
    """Train undisturbed to the end, and compare the outcome with the twin's."""
    for _ in lives_to_its_end(run):
        pass
    twin.compare(run)


# Kills.


def test_a_training_killed_before_any_of_its_file_operations_ends_like_its_twin(
    twin: Twin, record_property: Callable[[str, object], None]
) -> None:
    tally = Tally()
    kill_at_points(twin, twin.points, tally)
    record_property("kills", str(tally))
    assert tally.fell and sorted(tally.fell) == sorted(twin.points)
    for expected in (
        "start before open of lock",
        "after update 1 begins",
        "save of update 4 before mkdir of checkpoints",
        "save of update 4 half-way through writing manifest.json",
        "save of update 8 before writing optimizer.safetensors",
        "save of update 8 before fsync of checkpoints/.tmp-*/best.safetensors",
        "save of update 8 before rename to checkpoints/step-00000008",
        "save of update 8 before rename to checkpoints/.tmp-removed-step-00000004",
        "save of update 8 before remove of manifest.json",
        "after update 10 begins",
        "finish before rename to final",
        "finish before rmdir of checkpoints/.tmp-removed-step-00000008",
        "resume before rename to metrics.jsonl",
    ):
        assert expected in tally.fell


@pytest.mark.deep
def test_trainings_of_every_scenario_killed_at_any_point_and_time_end_like_their_twins(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    tally = kill(tmp_path, kills=12 * len(SCENARIOS), seed=1)
    record_property("kills", str(tally))
    assert len(tally.fell) == 12 * len(SCENARIOS)


def test_an_incomplete_last_line_of_the_metrics_is_written_again(twin: Twin, run: RunDirectory) -> None:
    assert killed_at(run, "after update 6 begins")
    os.truncate(run.metrics, run.metrics.stat().st_size - 20)
    finish(twin, run)


# Damaged checkpoints.


def test_a_training_whose_newest_checkpoint_is_damaged_resumes_from_the_previous_one(
    tmp_path: Path, tokens: Tokens
) -> None:
    twin = Twin(tmp_path, "two epochs", tokens)
    run = twin.another()
    assert killed_at(run, "after update 12 begins")
    damaged = run.checkpoints / "step-00000010"
    (damaged / "model.safetensors").write_bytes(bytes((damaged / "model.safetensors").stat().st_size))
    life = live(run)
    assert life.code == 0 and f"checkpoint skipped: {damaged}/model.safetensors has sha256" in life.said
    twin.compare(run)


def test_a_kill_during_the_removal_of_a_damaged_checkpoint_loses_nothing(tmp_path: Path, tokens: Tokens) -> None:
    twin = Twin(tmp_path, "two epochs", tokens)
    run = twin.another()
    assert killed_at(run, "after update 12 begins")
    os.truncate(run.checkpoints / "step-00000010" / "random.safetensors", 0)
    assert killed_at(run, "start before rename to checkpoints/.tmp-removed-step-00000010")
    assert killed_at(run, "start before remove of manifest.json")
    assert checkpoints(run) == [".tmp-removed-step-00000010", "step-00000005"]
    finish(twin, run)


def test_a_training_whose_checkpoints_are_all_damaged_ends_with_the_reason(run: RunDirectory) -> None:
    assert killed_at(run, "after update 9 begins")
    for directory in run.checkpoints.iterdir():
        os.truncate(directory / "manifest.json", 100)
    life = live(run)
    assert life.code == 1 and "error: nothing in" in life.said and "Traceback" not in life.said
    assert isinstance(run.read_failure(), CheckpointError)
    assert len(run.read_metrics()) == 9, "no line was dropped"


# A full disk.


NEEDS_SPACE = re.compile(
    r" (writing|open of|fsync of|mkdir of .*\.tmp-|rename to (?!.*removed))|update 4 .*mkdir of checkpoints$"
)
"""All writes, except creating a directory that exists and renaming one that is about to be removed."""
LOCK = re.compile(r" lock( \(\d+\))?$")
"""Points at which the lock is opened: Python names each of them twice."""


def test_a_full_disk_at_any_write_loses_no_checkpoint_and_the_next_start_ends_like_the_twin(twin: Twin) -> None:
    struck = []

    def strike(run: RunDirectory, point: str) -> bool:
        before = checkpoints(run)
        life = live(run, {point: "ENOSPC"})
        if life.code == 0:
            return False
        struck.append(point)
        assert life.code == 1, f"{point}: {life.said}"
        assert SAID_OF_A_FULL_DISK.search(life.said) and "Traceback" not in life.said, f"{point}: {life.said}"
        assert isinstance(run.read_failure(), DiskFull), point
        assert not [path for path in run.path.rglob(".tmp-*") if path.is_dir()], f"{point}: nothing unfinished is left"
        assert set(before) <= set(checkpoints(run)), point
        return True

    at_each(twin, [point for point in twin.points if NEEDS_SPACE.search(point) and not LOCK.search(point)], strike)
    assert len(struck) > 40


def test_a_full_file_system_loses_no_checkpoint_and_with_free_space_the_training_ends_like_the_twin(
    twin: Twin, tokens: Tokens, tmp_path: Path, small_disk: Callable[[Path, int], None]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    small_disk(run.path, 2**20)
    prepare(run.path, tokens)
    assert killed_at(run, "after update 5 begins")
    filler = run.path / "filler"
    for kib in (0, 4, 60, 100, 200):
        filler.unlink(missing_ok=True)
        stat = os.statvfs(run.path)
        filler.write_bytes(bytes(max(stat.f_bavail * stat.f_frsize - kib * 1024, 0)))
        life = live(run)
        assert life.code == 1 and SAID_OF_A_FULL_DISK.search(life.said), f"{kib} KiB free: {life.said}"
        assert checkpoints(run) == ["step-00000004"]
        check_what_stands(run)
    filler.unlink()
    finish(twin, run)


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """A function that mounts a small file system, or skips the test if mounting is not permitted."""
    mounted: list[Path] = []

    def mount(path: Path, num_bytes: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


# Stop signals.


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_trainer_that_gets_a_stop_signal_finishes_its_update_saves_and_ends_like_the_twin(
    twin: Twin, run: RunDirectory, number: str
) -> None:
    life = live(run, {"update 6 before its line begins": number})
    assert life.code == STOPPED and f"stopped ({number}) and saved" in life.said
    assert checkpoints(run) == ["step-00000006"] and len(run.read_metrics()) == 6
    finish(twin, run)


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_trainer_at_once_and_loses_nothing_that_was_saved(
    twin: Twin, run: RunDirectory, first: str, second: str
) -> None:
    saving = "save of update 6 before writing optimizer.safetensors"
    life = live(run, {"update 6 before its line begins": first, saving: second})
    assert (life.code, life.last) == (-signal.Signals[second], saving)
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-00000004"]
    manifest.verify(run.checkpoints / "step-00000004")
    finish(twin, run)


# Locks.


def test_the_lock_of_a_killed_trainer_is_free_and_the_lock_of_a_running_one_is_not(
    twin: Twin, run: RunDirectory
) -> None:
    assert killed_at(run, "after update 2 begins")
    dead = int((run.path / "lock").read_text())
    assert dead != os.getpid()
    with run.lock():
        life = live(run)
    assert life.code == 1 and f"is being trained by process {os.getpid()}" in life.said
    assert run.read_failure() is None, "only the lock holder writes the failure file"
    finish(twin, run)

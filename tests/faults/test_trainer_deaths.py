"""A trainer that is killed while its flow runs, as the kernel does when memory runs out."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from flows.cli.run import prepare
from flows.config.pipelines import Pipeline
from flows.retrain.trainer_process import TrainerKeepsDying, train_with_restarts
from flows.state.root import StateRoot
from gptcore.training.run_directory import Result, RunDirectory
from tests.trainings import updates_of

pytestmark = pytest.mark.slow


def prepared(tiny: Pipeline, root: StateRoot, path: Path, **train: object) -> RunDirectory:
    asked = tiny.model_copy(update={"train": tiny.train.model_copy(update={"max_steps": 600, **train})})
    prepare(asked, root, path)
    return RunDirectory(path)


@contextmanager
def killed_after(run: RunDirectory, lines: int, times: int) -> Iterator[list[int]]:
    """Kill the trainer up to `times` times, each time `lines` updates after its last checkpoint."""
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.05) and len(killed) < times:
            with suppress(OSError, ValueError):
                pid = int((run.path / "lock").read_text())
                if pid not in killed and updates_of(run) - run.saved_step() >= lines:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


def test_a_kill_for_lack_of_memory_costs_one_restart_from_the_last_checkpoint(
    tiny: Pipeline, root: StateRoot, tmp_path: Path
) -> None:
    twin = train_with_restarts(prepared(tiny, root, tmp_path / "twin"), lambda _: None, print)
    run = prepared(tiny, root, tmp_path / "killed", checkpoint_steps=100)
    said: list[str] = []
    with killed_after(run, lines=50, times=1) as killed:
        result = train_with_restarts(run, lambda _: None, said.append)
    assert len(killed) == len(said) == 1 and "was killed by signal 9" in said[0], said
    assert isinstance(twin, Result) and isinstance(result, Result)
    assert result.weights_sha256 == twin.weights_sha256
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 601))


def test_a_trainer_that_dies_three_times_after_one_checkpoint_fails_with_a_diagnosis(
    tiny: Pipeline, root: StateRoot, tmp_path: Path
) -> None:
    run = prepared(tiny, root, tmp_path / "run", checkpoint_steps=1000)
    said: list[str] = []
    with killed_after(run, lines=50, times=10) as killed, pytest.raises(TrainerKeepsDying) as given_up:
        train_with_restarts(run, lambda _: None, said.append)
    assert len(killed) == 3 and len(said) == 2
    for part in ("died 3 times", "checkpoint at step 0", "killed by signal 9", "MB", "train.batch_size"):
        assert part in str(given_up.value)

"""Ctrl-C, once and twice, in a terminal in which `gptflow run` trains."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from flows.state.root import StateRoot
from gptcore.training.run_directory import RunDirectory
from tests.servers import Prefect, Process, begin, gptflow, wait_for
from tests.tiny import write_pipelines
from tests.trainings import updates_of

pytestmark = pytest.mark.slow


@pytest.fixture
def training(project: Path, server: Prefect) -> Iterator[Process]:
    """A `gptflow run tiny` that has logged some updates of a long training."""
    write_pipelines(project, tiny={"train": {"max_steps": 1000, "checkpoint_steps": 100}})
    process = begin(project, project / "run.log", "run", "tiny", PREFECT_API_URL=server.url)
    wait_for(lambda: process.poll() is not None or steps(project) > 150, 240)
    yield process
    if process.poll() is None:
        process.kill()


def directory(project: Path) -> RunDirectory | None:
    found = list((project / "mlruns" / "runs" / "tiny").glob("*-*"))
    return RunDirectory(found[0]) if found else None


def steps(project: Path) -> int:
    run = directory(project)
    return updates_of(run) if run else 0


def trainer_of(project: Path) -> psutil.Process:
    run = directory(project)
    assert run is not None
    return psutil.Process(int((run.path / "lock").read_text()))


def assert_the_next_run_goes_on(project: Path, server: Prefect, saved: int) -> None:
    run = directory(project)
    assert run is not None and run.saved_step() == saved
    done = gptflow(project, "run", "tiny", PREFECT_API_URL=server.url)
    assert done.returncode == 0 and "promoted" in done.stdout, done.stderr
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 1001))
    client = MlflowClient(StateRoot(project / "mlruns").tracking_uri)
    (only,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    history = client.get_metric_history(only.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 1001))


def test_a_second_ctrl_c_ends_a_run_at_once_if_its_trainer_hangs_and_keeps_its_checkpoint(
    project: Path, server: Prefect, training: Process
) -> None:
    trainer, run = trainer_of(project), directory(project)
    assert run is not None
    trainer.suspend()
    saved = run.saved_step()
    training.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        training.wait(3)
    training.send_signal(signal.SIGINT)
    assert training.wait(5) == 130
    said = (project / "run.log").read_text()
    assert "Run the same command again to resume." in said and "Traceback" not in said, said
    assert run.saved_step() == saved
    os.kill(trainer.pid, signal.SIGKILL)
    wait_for(lambda: not trainer.is_running(), 20)
    assert_the_next_run_goes_on(project, server, saved)

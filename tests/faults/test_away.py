"""The whole flow when MLflow or Prefect becomes unreachable in the middle of it."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import SECTIONS, Pipeline
from flows.notifications.verdicts import read_verdict
from flows.retrain.flow import retrain
from flows.state.root import StateRoot
from flows.state.servers import answers
from gptcore.training.run_directory import RunDirectory
from tests import databases
from tests.servers import Prefect, begin, clean, free_ports, gptflow, wait_for
from tests.tiny import write_pipelines
from tests.trainings import updates_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 2500
HALF_A_MINUTE, PATIENCE = 30.0, 150.0


def run(pipeline: Pipeline, **train: object) -> tuple[str, str]:
    """Run the flow; return its verdict, or the name of its final state, and the message."""
    asked = pipeline.model_copy(update={"train": pipeline.train.model_copy(update=train)})
    sections = {name: getattr(asked, name) for name in SECTIONS}
    state = retrain(asked.name, asked.model_name, **sections, return_state=True)
    return str(read_verdict(state) or state.name), str(state.message)


def run_directory(root: StateRoot) -> RunDirectory:
    (only,) = (root.path / "runs" / "tiny").glob("*-*")
    return RunDirectory(only)


def once(is_true: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Call `act` in a thread as soon as `is_true` returns True. An OSError or a ValueError means not yet."""

    def watch() -> None:
        while True:
            try:
                if is_true():
                    return act()
            except (OSError, ValueError):
                pass
            time.sleep(0.1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def has_begun(root: StateRoot) -> bool:
    return updates_of(run_directory(root)) > 20


def is_trained(root: StateRoot) -> bool:
    return run_directory(root).read_result() is not None


def assert_one_whole_run(root: StateRoot, steps: int) -> None:
    """Assert one finished MLflow run with every update once and in order, and one registered version."""
    client = MlflowClient(root.tracking_uri)
    (only,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert only.info.status == "FINISHED"
    history = client.get_metric_history(only.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, steps + 1))
    times = [line["time_ms"] for line in run_directory(root).read_metrics()]
    assert [metric.timestamp for metric in history] == times
    assert len(client.search_model_versions("name = 'gpt-tiny'")) == 1


@pytest.mark.deep
@pytest.mark.usefixtures("prefect_server")
def test_a_database_locked_for_half_a_minute_delays_only_the_logging(tiny: Pipeline, root: StateRoot) -> None:
    released: list[bool] = []

    def lock() -> None:
        connection = sqlite3.connect(root.path / "mlflow.db", isolation_level=None, timeout=30)
        connection.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        while time.monotonic() < begin + (HALF_A_MINUTE if is_trained(root) else PATIENCE):
            time.sleep(0.5)
        released.append(is_trained(root))
        connection.execute("ROLLBACK")
        connection.close()

    locking = once(lambda: has_begun(root), lock)
    assert run(tiny, max_steps=600)[0] == "promoted"
    locking.join()
    assert released == [True], "training does not wait for the database"
    assert_one_whole_run(root, 600)


class Mlflow:
    """An MLflow server that can be killed and restarted."""

    def __init__(self, directory: Path, databases: Path) -> None:
        self.directory, (self.port,) = directory, free_ports(1)
        shutil.copy(databases / "mlflow.db", directory / "server.db")
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.directory / 'server.db'}"]
        files = ["--artifacts-destination", str(self.directory / "files"), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.directory / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *store, *files],
                env=clean(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: answers(f"{self.uri}/health"), 240)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def mlflow_server(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlflow]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    directory = tmp_path / "server"
    directory.mkdir()
    server = Mlflow(directory, migrated)
    yield server
    server.kill()


@pytest.mark.usefixtures("prefect_server")
def test_a_tracking_server_that_dies_during_training_gets_all_metrics_after_its_restart(
    tiny: Pipeline, root: StateRoot, mlflow_server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)

    def restart() -> None:
        mlflow_server.kill()
        time.sleep(2)
        mlflow_server.start()

    restarting = once(lambda: has_begun(root), restart)
    assert run(tiny, max_steps=STEPS)[0] == "promoted"
    restarting.join()
    assert_one_whole_run(root, STEPS)


@pytest.mark.deep
@pytest.mark.usefixtures("prefect_server")
def test_a_run_that_cannot_reach_mlflow_to_register_fails_and_the_next_run_registers_without_training(
    tiny: Pipeline, root: StateRoot, mlflow_server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    killing = once(lambda: is_trained(root), mlflow_server.kill)
    name, message = run(tiny, max_steps=200)
    killing.join()
    assert name == "Failed" and "does not answer" in message and "run the same command again" in message
    trained_at = run_directory(root).weights.stat().st_mtime_ns
    mlflow_server.start()
    assert run(tiny, max_steps=200)[0] == "promoted"
    assert run_directory(root).weights.stat().st_mtime_ns == trained_at
    assert_one_whole_run(root, 200)


def test_a_training_that_loses_its_prefect_server_finishes_and_its_version_gets_a_verdict(
    project: Path, migrated: Path, server: Prefect
) -> None:
    """Prefect's client continues the flow; only its reports to the server are lost."""
    root, (port,) = StateRoot(project / "mlruns"), free_ports(1)
    url = f"http://127.0.0.1:{port}"
    databases.give(root.path, migrated)
    mortal = subprocess.Popen(
        [sys.executable, "-m", "flows.deployments.ephemeral_server", str(port), str(root.prefect / "ephemeral")],
        env=clean(PREFECT_HOME=str(root.prefect / "ephemeral")),
    )
    wait_for(lambda: answers(f"{url}/api/health"), 240)
    write_pipelines(project, tiny={"train": {"max_steps": STEPS}})
    log = project / "run.log"
    environment = {"PREFECT_API_URL": f"{url}/api", "PREFECT_CLIENT_MAX_RETRIES": "1"}
    process = begin(project, log, "run", "tiny", **environment)
    once(lambda: has_begun(root), mortal.kill).join()
    mortal.wait()
    assert process.wait(200) == 1
    said = log.read_text()
    assert "Prefect does not answer" in said and "run the same command again" in said and "Traceback" not in said
    assert_one_whole_run(root, STEPS)
    again = gptflow(project, "run", "tiny", PREFECT_API_URL=server.url)
    assert again.returncode == 0 and "nothing changed since version 1" in again.stdout, again.stderr

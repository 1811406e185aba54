"""`gptflow up` with real servers: healthy, stopped with nothing left, refused, started twice, killed and reconciled."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from flows.servers import Servers, answers, recorded
from flows.state import StateRoot

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]


def wait_for(is_true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in (one, two)]


class Up:
    """`gptflow up` in a project, and whatever it started."""

    def __init__(self, project: Path) -> None:
        self.project, self.root = project, StateRoot(project / "mlruns")
        self.prefect, self.mlflow = free_ports()
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "GPTFLOW_"))
        }
        self.environment = {**kept, "OMP_NUM_THREADS": "1"}
        self.log = project / "up.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def arguments(self) -> list[str]:
        return ["up", "--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)]

    def start(self) -> "Up":
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments()],
                cwd=self.project,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self.process.poll() is not None or "is healthy" in self.log.read_text(), 120)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def servers(self) -> Servers:
        servers = recorded(self.root.path)
        assert servers is not None
        return servers

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def ask(self, path: str, body: object = None) -> Any:
        url = f"{self.servers().prefect_api}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as busy:  # Prefect's way to say that its SQLite database is locked
                assert busy.code == 503, busy.read()
            time.sleep(0.5)
        raise AssertionError(f"{url} is unavailable")

    def begin(self, **parameters: object) -> str:
        identity = self.ask("deployments/name/retrain/tiny")["id"]
        return str(self.ask(f"deployments/{identity}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def train_for_long(self) -> str:
        """Begins a run and returns when its trainer has made updates."""
        run = self.begin(train={"max_steps": 1_000_000, "eval_every": 1_000_000})
        wait_for(lambda: list(self.root.path.glob("runs/tiny/*/metrics.jsonl")), 60)
        wait_for(lambda: next(self.root.path.glob("runs/tiny/*/metrics.jsonl")).stat().st_size > 0, 30)
        return run

    def mlflow_statuses(self) -> list[str]:
        client = MlflowClient(f"sqlite:///{self.root.path / 'mlflow.db'}")
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return [run.info.status for run in found]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def up(project: Path) -> Iterator[Up]:
    up = Up(project)
    yield up
    if up.process is not None and up.process.poll() is None:
        up.process.terminate()
        up.process.wait(60)


def test_up_answers_runs_what_is_asked_says_when_it_is_up_already_and_leaves_nothing(up: Up) -> None:
    up.start()
    assert answers(f"{up.servers().prefect_api}/health") and answers(f"{up.servers().mlflow}/health")
    for url in (up.servers().prefect, up.servers().mlflow):
        assert url in up.log.read_text()
    again = up.command(*up.arguments())
    assert again.returncode == 0 and f"up already (pid {up.process.pid})" in again.stdout
    assert up.servers().prefect in again.stdout and up.servers().mlflow in again.stdout
    run = up.train_for_long()
    here = up.command("run", "tiny")
    assert here.returncode == 0 and "another run holds the lock (pid" in here.stdout, here.stdout + here.stderr
    assert [one["state"]["name"] for one in up.ask("flow_runs/filter", {}) if one["id"] != run] == ["Skipped"]
    processes = up.processes()
    assert len(processes) > 5
    began = time.monotonic()
    up.process.terminate()
    up.process.wait(60)
    assert time.monotonic() - began < 30
    assert living(processes) == []
    assert "it saves first" in up.log.read_text() and recorded(up.root.path) is None
    assert list(up.root.path.glob("runs/tiny/*/checkpoints/step-*"))
    assert up.mlflow_statuses() == ["KILLED"]
    up.start()
    assert up.state(run)["type"] == "CRASHED"


def test_after_a_kill_of_everything_the_next_start_ends_what_was_running(up: Up) -> None:
    up.start()
    run = up.train_for_long()
    for process in reversed(up.processes()):
        process.kill()
    up.process.wait(30)
    assert up.mlflow_statuses() == ["RUNNING"]
    time.sleep(5)
    up.start()
    assert up.state(run)["type"] == "CRASHED"
    assert up.mlflow_statuses() == ["KILLED"]
    for what in ("crashed    Prefect run", "killed     MLflow run"):
        assert what in up.log.read_text()


def test_what_dies_is_started_again_and_a_killed_supervisors_children_are_stopped(up: Up) -> None:
    up.start()
    before = up.servers().processes
    os.kill(before["mlflow"][0], signal.SIGKILL)
    os.kill(before["prefect"][0], signal.SIGKILL)
    wait_for(lambda: not set(before.values()) & set(up.servers().processes.values()), 90)
    wait_for(lambda: answers(f"{up.servers().prefect_api}/health") and answers(f"{up.servers().mlflow}/health"), 60)
    children = up.processes()[1:]
    up.process.kill()
    up.process.wait(30)
    assert living(children)
    up.start()
    assert "left over from" in up.log.read_text()
    assert living(children) == []


def test_a_port_that_is_taken_is_named_with_its_flag(up: Up) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", up.mlflow))
        taken.listen()
        refused = up.command(*up.arguments())
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"port {up.mlflow}" in refused.stderr and "--mlflow-port" in refused.stderr
    same = up.command("up", "--prefect-port", "4400", "--mlflow-port", "4400")
    assert same.returncode == 2 and "are both 4400" in same.stderr
    up.environment["PREFECT_API_URL"] = "http://127.0.0.1:4400/api"
    assert "gptflow serve" in up.command(*up.arguments()).stderr

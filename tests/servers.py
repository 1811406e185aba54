"""Real processes for the flow tests: the command line, a Prefect server with its REST client, and `gptflow up`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import psutil
from mlflow import MlflowClient

from flows.state.root import OPT_OUTS, StateRoot
from flows.state.servers import Servers, answers, read_servers
from tests import forks
from tests.forks import Forked

Process = subprocess.Popen[bytes] | Forked
COMMAND = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]
"""Like the installed `gptflow`, it imports nothing from the working directory."""
_LEADING = ("PREFECT_", "MLFLOW_", "GPTFLOW_", "PG", "AWS_")
_ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def clean(**more: str) -> dict[str, str]:
    """Return this process's environment with `more`, without variables that lead a child to this process's servers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LEADING)}
    return {**kept, **OPT_OUTS, "OMP_NUM_THREADS": "1", **more}


def gptflow(
    project: Path, *arguments: str, cold: bool = False, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command line in the project directory to its end: forked, or `cold`, as users start it."""
    with TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        process = _begin(project, stdout, stderr, *arguments, cold=cold, **environment)
        try:
            code = process.wait(240)
        finally:
            process.kill()
        stdout.seek(0), stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def refused(done: "subprocess.CompletedProcess[str]", code: int, *parts: str) -> None:
    """Check the exit code, and that stderr has an error with all `parts` and no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "error: " in done.stderr.lower()
    for part in parts:
        assert part in done.stderr


def begin(project: Path, log: Path, *arguments: str, cold: bool = False, **environment: str) -> Process:
    """Start the command line in the project directory, forked or `cold`. Write its output to `log`."""
    with log.open("w") as output:
        return _begin(project, output, output, *arguments, cold=cold, **environment)


def _begin(project: Path, stdout: IO[str], stderr: IO[str], *arguments: str, cold: bool, **environment: str) -> Process:
    given = {"stdout": stdout, "stderr": stderr}
    if not cold:
        server = forks.choose_server(*arguments)
        return server.command(*arguments, directory=project, environment=clean(**environment), **given)
    command = [*COMMAND, *arguments]
    return subprocess.Popen(command, cwd=project, env=clean(**environment), stdin=subprocess.DEVNULL, **given)


def wait_for(is_true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"the condition was not met within {seconds} s"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()


class Prefect:
    """A client of a Prefect server's REST API."""

    def __init__(self, url: str) -> None:
        self.url = url
        """The URL of the API."""

    def ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        """Return the answer to a GET, or a POST of `body`. Retry while the server is busy, else raise HTTPError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers, method=method)
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:  # Prefect answers 503 while its SQLite database is locked
                    raise
            time.sleep(0.5)
        raise AssertionError(f"{request.full_url} is unavailable")

    def start(self, pipeline: str, **parameters: object) -> str:
        """Start a run of the pipeline's deployment, as its form does, and return the flow run's id."""
        identity = self.ask(f"deployments/name/retrain/{pipeline}")["id"]
        return str(self.ask(f"deployments/{identity}/create_flow_run", {"parameters": parameters})["id"])

    def runs(self) -> list[dict[str, Any]]:
        """Return every flow run, except those that are not due yet."""
        return [run for run in self.ask("flow_runs/filter", {}) if run["state"]["type"] != "SCHEDULED"]

    def empty(self) -> None:
        """Delete every deployment, automation and flow run."""
        for kind in ("deployments", "flow_runs"):
            while self.ask(f"{kind}/bulk_delete", {"limit": 50})["deleted"]:
                pass
        for automation in self.ask("automations/filter", {}):
            self.ask(f"automations/{automation['id']}", method="DELETE")

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def ended(self, run: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for the end of the run and return its final state."""
        wait_for(lambda: self.state(run)["type"] in _ENDS, seconds)
        return self.state(run)

    def verdict(self, run: str, seconds: float = 240) -> str:
        """Wait for the end of the run and return its verdict: the first word of the state's message."""
        state = self.ended(run, seconds)
        assert state["name"] in ("Completed", "Failed"), "Prefect's pages filter by its own names of states"
        return str(state["message"]).partition(": ")[0]


@contextmanager
def prefect_server(directory: Path, databases: Path, **environment: str) -> Iterator[Prefect]:
    """Run a separate Prefect server with all its services. Its home and its log are in `directory`.

    It starts with a copy of the prefect.db in `databases`, and without the block types that its UI would offer.
    """
    port = free_ports(1)[0]
    shutil.copy(databases / "prefect.db", directory)
    own = {"PREFECT_HOME": str(directory), "PREFECT_API_BLOCKS_REGISTER_ON_START": "0", **environment}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = _start(command, directory / "server.log", clean(**own), directory)
    server = Prefect(f"http://127.0.0.1:{port}/api")
    try:
        wait_for(lambda: process.poll() is not None or answers(f"{server.url}/health"), 240)
        assert process.poll() is None, (directory / "server.log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait(60)


class Serving:
    """`gptflow serve` in the project directory, from start to SIGTERM."""

    def __init__(self, project: Path, server: Prefect) -> None:
        self.log = project / "serve.log"
        self.process = begin(project, self.log, "serve", PREFECT_API_URL=server.url)

    def __enter__(self) -> list[str]:
        wait_for(lambda: self.process.poll() is not None or "\nserving " in self.log.read_text(), 240)
        assert self.process.poll() is None, self.log.read_text()
        return [line for line in self.log.read_text().splitlines() if not line.startswith("serving")]

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(90)


class Receiver(HTTPServer):
    """A server on loopback that accepts JSON by POST, like a webhook or an events API, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ReceiverHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.got: list[Any] = []
        """The body of every request, including refused requests."""
        self.status = 200


class _ReceiverHandler(BaseHTTPRequestHandler):
    server: Receiver

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.end_headers()

    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class Up:
    """`gptflow up` in a project, and the processes that it started."""

    def __init__(self, project: Path) -> None:
        self.project, self.root = project, StateRoot(project / "mlruns")
        self.prefect_port, self.mlflow_port = free_ports(2)
        self.prefect = Prefect(f"http://127.0.0.1:{self.prefect_port}/api")
        self.log = project / "up.log"
        self.more: list[str] = []
        """Further options."""
        self.cold = False
        """Whether `gptflow up` itself is started as users start it, and not forked."""
        self.process: Process | None = None

    def arguments(self) -> list[str]:
        ports = ["--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        return ["up", *ports, *self.more]

    def command(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return gptflow(self.project, *arguments, **environment)

    def start(self, **environment: str) -> "Up":
        """Start `gptflow up` and return when everything is healthy."""
        self.process = begin(self.project, self.log, *self.arguments(), cold=self.cold, **environment)
        wait_for(lambda: self.process.poll() is not None or "is healthy" in self.log.read_text(), 240)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def stop(self) -> None:
        """Stop `gptflow up` as Ctrl-C does, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def servers(self) -> Servers:
        servers = read_servers(self.root.path)
        assert servers is not None
        return servers

    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        servers = [pid for pid, _ in self.servers().processes.values()]  # a forked one is no child of `gptflow up`
        roots = [psutil.Process(pid) for pid in (self.process.pid, *servers)]
        return list(dict.fromkeys([*roots, *(child for root in roots for child in root.children(recursive=True))]))

    def train_for_long(self) -> str:
        """Start a run of `tiny` and return when its trainer has made updates."""
        run = self.prefect.start("tiny", train={"max_steps": 1_000_000, "eval_every": 1_000_000})
        wait_for(lambda: list(self.root.path.glob("runs/tiny/*/metrics.jsonl")), 240)
        wait_for(lambda: next(self.root.path.glob("runs/tiny/*/metrics.jsonl")).stat().st_size > 0, 30)
        return run

    def mlflow_statuses(self) -> list[str]:
        client = MlflowClient(f"sqlite:///{self.root.path / 'mlflow.db'}")
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return [run.info.status for run in found]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _start(command: list[str], log: Path, environment: dict[str, str], directory: Path) -> "subprocess.Popen[bytes]":
    with log.open("w") as output:
        return subprocess.Popen(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )

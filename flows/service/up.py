"""`gptflow up`: the Prefect server, the MLflow server and the runner of the deployments, supervised as children.

It starts them, waits until they are healthy, starts again what dies, and stops everything in the order that loses
nothing: flow runs first, while there is a server to tell, so that they save.
"""

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import click
import psutil

from flows import lock
from flows.service.children import Child
from flows.service.servers import Servers, answers, record, recorded, running_servers, up_lock
from flows.sharing.backends import Backends
from flows.state import StateRoot
from gptcore.errors import ConfigError, GPTCoreError

HOST = "127.0.0.1"
RUN_GRACE_SECONDS = 25.0
"""How long flow runs may take to save when everything stops. A trainer is given as long by its flow run."""
_CHILD_GRACE_SECONDS = 3.0
_DATABASES_OF_PREFECT = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""A user's own database for Prefect's server."""
_START_SECONDS = 180.0
_TICK_SECONDS = 0.5
READY = "serving"
"""The runner's log says this at the beginning of a line when it accepts runs."""


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    file: Path
    prefect_port: int
    mlflow_port: int
    limit: int


def up(root: StateRoot, options: Options) -> None:
    """Runs everything until SIGINT or SIGTERM. If it is up already, says so and returns.

    Raises ConfigError or GPTCoreError if a port is taken, or a child cannot be kept alive.
    """
    try:
        with lock.hold(up_lock(root.path)):
            _Supervisor(root, options).run()
    except lock.Held as held:
        pid = held.holder.pid if held.holder else "unknown"
        if (servers := running_servers(root.path)) is None:
            click.echo(f"gptflow is starting or stopping (pid {pid})")
        else:
            click.echo(f"gptflow is up already (pid {pid})")
            _say_where(servers)


@dataclass
class _Supervisor:
    root: StateRoot
    options: Options
    stopping: Event = field(default_factory=Event)

    def run(self) -> None:
        began = time.perf_counter()
        if (given := os.environ.get("PREFECT_API_URL")) is not None:
            raise ConfigError(
                f"PREFECT_API_URL is {given}: `gptflow serve` runs the deployments there. Unset it to start a server."
            )
        _stop_leftovers(self.root)
        self.root.enter()
        self.prefect, self.mlflow, self.runner = self.children()
        _check_ports(self.options, mlflow=self.mlflow is not None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stopping.set())
        try:
            self.start()
            if not self.stopping.is_set():
                click.echo(f"everything is healthy after {time.perf_counter() - began:.0f} s; Ctrl-C stops it")
            while not self.stopping.wait(_TICK_SECONDS):
                self.supervise()
        finally:
            self.stop()

    def children(self) -> tuple[Child, Child | None, Child]:
        """Prefect, MLflow (None where a user's tracking server is used) and the runner."""
        root, options = self.root, self.options
        api = f"http://{HOST}:{options.prefect_port}/api"
        environment = {**os.environ, "PREFECT_API_URL": api, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        if importlib.util.find_spec("tzdata"):
            # Prefect lists all time zones for every schedule that it reads: from the system's 600 files, in 17 ms.
            environment.setdefault("PYTHONTZPATH", "")
        if environment["PREFECT_HOME"] == str(root.prefect / "ephemeral"):
            environment["PREFECT_HOME"] = str(root.prefect)
        if root.database is not None and not any(name in environment for name in _DATABASES_OF_PREFECT):
            environment |= {**root.database.for_prefect, **environment}

        def child(name: str, is_healthy: Callable[[Child], bool], *command: str) -> Child:
            return Child(name, (sys.executable, *command), root.logs / f"{name}.log", environment, is_healthy)

        prefect = "-m prefect server start --host".split()
        runner = "from flows.cli import main; main()"
        serve = ["serve", "--reconcile", "--file", str(options.file), "--limit", str(options.limit)]
        return (
            child("prefect", _answers(f"{api}/health"), *prefect, HOST, "--port", str(options.prefect_port)),
            None
            if self.tracking_server
            else child("mlflow", _answers(f"{self.mlflow_url}/health"), *self.mlflow_command),
            child("runner", lambda self: f"\n{READY} " in f"\n{self.said()}", "-c", runner, *serve),
        )

    @property
    def tracking_server(self) -> str | None:
        """A user's tracking server, where MLFLOW_TRACKING_URI names one."""
        uri = self.root.tracking_uri
        return uri if uri.startswith("http") else None

    @property
    def mlflow_url(self) -> str:
        return self.tracking_server or f"http://{HOST}:{self.options.mlflow_port}"

    @property
    def mlflow_command(self) -> list[str]:
        files = self.root.backends.artifacts
        destination = f"{files}/artifacts" if files else str(self.root.artifacts)
        store = ["--backend-store-uri", self.root.tracking_uri, "--artifacts-destination", destination]
        where = ["--host", HOST, "--port", str(self.options.mlflow_port), "--workers", "1"]
        return ["-m", "mlflow", "server", *store, *where]

    def servers(self) -> list[Child]:
        return [child for child in (self.prefect, self.mlflow) if child is not None]

    def start(self) -> None:
        click.echo("starting Prefect and MLflow")
        if (elsewhere := self.root.backends) != Backends():
            click.echo(f"the state lies on {elsewhere}")
            if elsewhere.database is not None and (self.root.path / "mlflow.db").exists():
                click.echo(f"what {self.root.path / 'mlflow.db'} has stays there; `--database local` goes back to it")
        for child in self.servers():
            child.start()
        for child in self.servers():
            self.wait_until_healthy(child)
        self.record()  # a crash from here on leaves the next start something to find
        if not self.stopping.is_set():
            self.runner.start()
            self.wait_until_healthy(self.runner)
        if not self.stopping.is_set():
            self.say_what_changed()
            _say_where(self.record())

    def wait_until_healthy(self, child: Child) -> None:
        """Returns at once when everything is to stop. Raises GPTCoreError if the child ends, or is never healthy."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.stopping.is_set() and not child.is_healthy(child):
            if not child.is_alive():
                raise GPTCoreError(f"{child.name} ended while it started. {child.last_words()}")
            if time.monotonic() > deadline:
                raise GPTCoreError(f"{child.name} is not healthy after {_START_SECONDS:.0f} s. {child.last_words()}")
            self.stopping.wait(0.2)

    def record(self) -> Servers:
        children = [child for child in (*self.servers(), self.runner) if child.process]
        processes = {child.name: child.identity() for child in children}
        restarts = {child.name: (child.restarts, child.ended_at) for child in children if child.restarts}
        servers = Servers(f"http://{HOST}:{self.options.prefect_port}", self.mlflow_url, processes, restarts)
        record(self.root.path, servers)
        return servers

    def say_what_changed(self) -> None:
        words = ("added", "changed", "removed", "unchanged", "crashed", "killed", READY)
        for line in self.runner.said().splitlines():
            if line.startswith(words):
                click.echo(line)

    def supervise(self) -> None:
        """Starts again what has died. The runner follows a server that was started again: it would go on without
        hearing of cancelled runs. A runner's flow runs end with it; their trainers save, and the new runner reconciles.
        """
        dead = [child for child in (*self.servers(), self.runner) if not child.is_alive()]
        for child in dead:
            self.start_again(child)
        if self.prefect in dead and self.runner not in dead:
            self.runner.signal(signal.SIGKILL)
            self.start_again(self.runner, is_counted=False)

    def start_again(self, child: Child, is_counted: bool = True) -> None:
        while not self.stopping.is_set():
            if is_counted:
                click.echo(f"{child.name} ended; it is started again. Its log: {child.log}", err=True)
                self.stopping.wait(child.note_death())
            child.wait(0)
            child.start()
            try:
                self.wait_until_healthy(child)
            except GPTCoreError:
                is_counted = True
                continue
            self.record()
            return

    def flow_runs(self) -> list[psutil.Process]:
        """The flow runs that live now."""
        with suppress(psutil.NoSuchProcess):
            if self.runner.process is not None:
                below = psutil.Process(self.runner.process.pid).children()
                return [process for process in below if _lives(process) and _is_flow_run(process)]
        return []

    def stop(self) -> None:
        """Flow runs first, so that they save and say so; then the runner and the servers; then whatever is left."""
        deadline = time.monotonic() + RUN_GRACE_SECONDS
        asked: set[psutil.Process] = set()
        below: set[psutil.Process] = set()
        while (runs := self.flow_runs()) and time.monotonic() < deadline:
            for process in set(runs) - asked:  # the runner may start one more meanwhile
                click.echo(f"stopping flow run (pid {process.pid}); it saves first")
                with suppress(psutil.NoSuchProcess):
                    below |= {process, *process.children(recursive=True)}
                    process.terminate()
            asked |= set(runs)
            time.sleep(0.2)
        if asked:
            time.sleep(_TICK_SECONDS)  # the runner reports how they ended
        self.stop_children()
        for process in filter(_lives, below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if asked:
            from flows.service.reconcile import (
                close_orphans,  # Prefect and MLflow: seconds that starting need not wait for
            )

            close_orphans(self.root)  # a flow run that was stopped in the middle of a write could not say so itself
        (self.root.path / "up.json").unlink(missing_ok=True)
        click.echo("stopped")

    def stop_children(self) -> None:
        self.runner.signal(signal.SIGTERM)
        self.runner.wait(1.0)
        for child in self.servers():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _CHILD_GRACE_SECONDS
        for child in self.servers():
            child.wait(deadline - time.monotonic())


def _answers(url: str) -> Callable[[Child], bool]:
    return lambda _: answers(url)


def _say_where(servers: Servers) -> None:
    click.echo(f"Prefect  {servers.prefect}")
    click.echo(f"MLflow   {servers.mlflow}")


def _check_ports(options: Options, mlflow: bool) -> None:
    asked = [("Prefect", "--prefect-port", options.prefect_port)]
    if mlflow:
        asked.append(("MLflow", "--mlflow-port", options.mlflow_port))
    if mlflow and options.prefect_port == options.mlflow_port:
        raise ConfigError(f"--prefect-port and --mlflow-port are both {options.mlflow_port}: give two different ones")
    for name, flag, port in asked:
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((HOST, port))
            except OSError as error:
                raise GPTCoreError(
                    f"port {port} on {HOST} cannot be used for {name}: {error.strerror}. Choose another with {flag}."
                ) from None


def _stop_leftovers(root: StateRoot) -> None:
    """Stops the children of a `gptflow up` that was killed. The flow runs of its runner are left alone."""
    before = recorded(root.path)
    for name, (pid, created) in (before.processes if before else {}).items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) > 1.0:
                continue
            click.echo(f"stopping {name} (pid {pid}), left over from a `gptflow up` that was killed")
            for left in [process, *(process.children(recursive=True) if name != "runner" else [])]:
                left.kill()
            psutil.wait_procs([process], timeout=_CHILD_GRACE_SECONDS)
    (root.path / "up.json").unlink(missing_ok=True)


def _is_flow_run(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "prefect.engine" in process.cmdline()
    return False


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False

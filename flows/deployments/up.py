"""`gptflow up`: the Prefect server, the MLflow server and the runner of the deployments as supervised child processes.

The supervisor creates or migrates the servers' databases, starts the processes, waits until they are healthy, and
restarts them if they fail. When it stops, it stops flow runs first, while the servers still answer, so that the runs
can save and report.
"""

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import click
import psutil

from flows.deployments.child_process import Child
from flows.deployments.up_servers import HOST, mlflow_command, prefect_command
from flows.state import databases, lock_holder, locks
from flows.state.backends import Backends
from flows.state.databases import Condition, SQLiteDatabase
from flows.state.postgres import PREFECT_URL, PostgresDatabase
from flows.state.root import StateRoot
from flows.state.servers import Servers, answers, find_running_servers, read_servers, up_lock, write_servers
from gptcore.errors import ConfigError, GPTCoreError

RUN_GRACE_SECONDS = 25.0
"""How long flow runs may take to save when everything stops. A flow run gives its trainer the same time."""
_CHILD_GRACE_SECONDS = 3.0
_START_SECONDS = 180.0
_TICK_SECONDS = 0.5
READY = "serving"
"""A line of the runner's log begins with this word when the runner accepts runs."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    file: Path
    prefect_port: int
    mlflow_port: int
    limit: int
    allowed_hosts: tuple[str, ...] = ()
    """Names besides those of loopback by which clients reach the servers, such as that of a reverse proxy."""
    reset_schedules: bool = False
    """Whether the file decides which schedules are paused, not a person who used the server since."""


def up(root: StateRoot, options: Options) -> None:
    """Run everything until SIGINT or SIGTERM. If `gptflow up` is already running, print where, and return.

    Raises ConfigError or GPTCoreError if a port is taken or a child keeps failing.
    """
    try:
        with locks.hold(up_lock(root.path)):
            _Supervisor(root, options).run()
    except lock_holder.LockHeld as held:
        pid = held.holder.pid if held.holder else "unknown"
        if (servers := find_running_servers(root.path)) is None:
            click.echo(f"gptflow is starting or stopping (pid {pid})")
        else:
            click.echo(f"gptflow is up already (pid {pid})")
            _print_urls(servers)


@dataclass
class _Supervisor:
    """The running `gptflow up`: its servers and the runner, from start to stop."""

    root: StateRoot
    options: Options
    stopping: Event = field(default_factory=Event)

    def run(self) -> None:
        """Start everything, restart what fails until a signal arrives, and then stop everything."""
        began = time.perf_counter()
        if (given := os.environ.get("PREFECT_API_URL")) is not None:
            raise ConfigError(
                f"PREFECT_API_URL is {given}: `gptflow serve` runs the deployments there. Unset it to start a server."
            )
        _stop_leftovers(self.root)
        self.root.set_environment()
        self.make_children()
        _check_ports(self.options, has_mlflow=self.mlflow is not None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stopping.set())
        try:
            self.start()
            if not self.stopping.is_set():
                click.echo(f"everything is healthy after {time.perf_counter() - began:.0f} s; Ctrl-C stops it")
            while not self.stopping.wait(_TICK_SECONDS):
                self.restart_failed()
        finally:
            self.stop()

    def make_children(self) -> None:
        """Prepare Prefect, MLflow (None if the user has a tracking server) and the runner, without starting them."""
        api = f"http://{HOST}:{self.options.prefect_port}/api"
        environment, self.prefect_database = self.build_environment(api)

        def child(name: str, is_healthy: Callable[[Child], bool], *command: str) -> Child:
            return Child(name, (sys.executable, *command), self.root.logs / f"{name}.log", environment, is_healthy)

        prefect = prefect_command(self.options.prefect_port, self.options.allowed_hosts)
        self.prefect = child("prefect", _check_url(f"{api}/health"), *prefect)
        self.mlflow = None
        if self.tracking_server is None:
            self.mlflow = child("mlflow", _check_url(f"{self.mlflow_url}/health"), *self.mlflow_command)
        serve = ["serve", "--reconcile", "--file", str(self.options.file), "--limit", str(self.options.limit)]
        if self.options.reset_schedules:
            serve.append("--reset-schedules")
        self.runner = child("runner", _is_runner_ready, "-c", "from flows.cli import main; main()", *serve)

    def build_environment(self, api: str) -> tuple[dict[str, str], SQLiteDatabase | PostgresDatabase | None]:
        """Return the children's environment, and Prefect's database unless the user keeps it elsewhere."""
        root = self.root
        environment = {**os.environ, "PREFECT_API_URL": api, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        # The UI then uses the name in the browser's address bar, such as localhost or that of a proxy.
        environment.setdefault("PREFECT_UI_API_URL", "/api")
        if importlib.util.find_spec("tzdata"):
            # Prefect lists all time zones for every schedule that it reads: 17 ms from the system's 600 files.
            environment.setdefault("PYTHONTZPATH", "")
        if environment["PREFECT_HOME"] == str(root.prefect / "ephemeral"):
            environment["PREFECT_HOME"] = str(root.prefect)
        if root.database is not None and not databases.is_prefect_elsewhere(environment):
            return {**root.database.prefect_environment, **environment}, root.database
        if (database := root.find_prefect_database(environment)) is not None:
            environment[PREFECT_URL] = database.url
        return environment, database

    @property
    def tracking_server(self) -> str | None:
        """The user's tracking server, if MLFLOW_TRACKING_URI names one."""
        uri = self.root.tracking_uri
        return uri if uri.startswith("http") else None

    @property
    def mlflow_url(self) -> str:
        """The URL of the user's tracking server, or of the MLflow server that is started here."""
        return self.tracking_server or f"http://{HOST}:{self.options.mlflow_port}"

    @property
    def mlflow_command(self) -> list[str]:
        """The command that starts MLflow's server on the state's database and artifacts."""
        files = self.root.backends.artifacts
        destination = f"{files}/artifacts" if files else str(self.root.artifacts)
        hosts = self.options.allowed_hosts
        return mlflow_command(self.options.mlflow_port, hosts, self.root.tracking_uri, destination)

    def servers(self) -> list[Child]:
        """Return Prefect and, if it is started here, MLflow."""
        return [child for child in (self.prefect, self.mlflow) if child is not None]

    def start(self) -> None:
        """Start the servers, wait until they are healthy, then start the runner. Stop early if a signal arrives."""
        click.echo("starting Prefect and MLflow")
        if (backends := self.root.backends) != Backends():
            click.echo(f"the state is on {backends}")
            local = self.root.path / "mlflow.db"
            if backends.database is not None and local.exists():
                click.echo(f"the contents of {local} stay in that file; `--database local` uses it again")
        self.prepare_databases()
        if not self.stopping.is_set():
            for child in self.servers():
                child.start()
        for child in self.servers():
            self.wait_until_healthy(child)
        self.record()  # if this process crashes from here on, the next start finds the children
        if not self.stopping.is_set():
            self.runner.start()
            self.wait_until_healthy(self.runner)
        if not self.stopping.is_set():
            self.print_changes()
            _print_urls(self.record())

    def prepare_databases(self) -> None:
        """Create or migrate the servers' databases that are not complete, each in a child process, side by side.

        Raises GPTCoreError if a database cannot be used.
        """
        makers = [
            Child(
                name=f"the program that prepares {package}'s database",
                command=(sys.executable, "-m", "flows.state.databases", package, place),
                log=self.root.logs / f"{package}-database.log",
                environment=self.prefect.environment,
                is_healthy=Child.is_alive,
            )
            for package, place in self.list_databases()
        ]
        try:
            for maker in makers:
                maker.start()
            while not self.stopping.is_set() and any(maker.is_alive() for maker in makers):
                self.stopping.wait(0.1)
            for maker in makers:
                if maker.process is not None and maker.process.poll():
                    raise GPTCoreError(f"{maker.name} failed. {maker.last_lines()}")
                for line in maker.read_log().splitlines():
                    if line.startswith(databases.MIGRATED):
                        click.echo(line)
        finally:
            for maker in makers:
                maker.wait(0)

    def list_databases(self) -> Iterator[tuple[str, str]]:
        """Yield package and place of each SQLite database that is not complete, and of all tables on PostgreSQL.

        Raises DatabaseBroken.
        """
        local, shared = self.root.mlflow_database, self.root.database
        if local is not None and local.check() is not Condition.WHOLE:
            yield "mlflow", str(local.path.parent)
        elif shared is not None and self.root.tracking_uri == shared.tracking_uri:
            yield "mlflow", shared.url
        if isinstance(self.prefect_database, PostgresDatabase):
            yield "prefect", self.prefect_database.url
        elif self.prefect_database is not None and self.prefect_database.check() is not Condition.WHOLE:
            yield "prefect", str(self.prefect_database.path.parent)

    def wait_until_healthy(self, child: Child) -> None:
        """Wait for the child, or until everything is to stop. Raises GPTCoreError if it ends or never gets healthy."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.stopping.is_set() and not child.is_healthy(child):
            if not child.is_alive():
                raise GPTCoreError(f"{child.name} ended while it started. {child.last_lines()}")
            if time.monotonic() > deadline:
                raise GPTCoreError(f"{child.name} is not healthy after {_START_SECONDS:.0f} s. {child.last_lines()}")
            self.stopping.wait(0.2)

    def record(self) -> Servers:
        """Write up.json: the URLs, and the processes that run now."""
        children = [child for child in (*self.servers(), self.runner) if child.process]
        processes = {child.name: child.identity() for child in children}
        restarts = {child.name: (child.restarts, child.ended_at) for child in children if child.restarts}
        servers = Servers(f"http://{HOST}:{self.options.prefect_port}", self.mlflow_url, processes, restarts)
        write_servers(self.root.path, servers)
        return servers

    def print_changes(self) -> None:
        """Print the lines of the runner's log about deployments and about runs that a crash left."""
        words = ("added", "changed", "removed", "unchanged", "crashed", "killed", READY)
        for line in self.runner.read_log().splitlines():
            if line.startswith(words):
                click.echo(line)

    def restart_failed(self) -> None:
        """Restart the children that have ended.

        A new Prefect server needs a new runner, because the old one would not hear of cancelled runs. The flow runs of
        a runner end with it: their trainers save, and the new runner reconciles.
        """
        failed = [child for child in (*self.servers(), self.runner) if not child.is_alive()]
        for child in failed:
            self.restart(child)
        if self.prefect in failed and self.runner not in failed:
            self.runner.signal(signal.SIGKILL)
            self.restart(self.runner, is_failure=False)

    def restart(self, child: Child, is_failure: bool = True) -> None:
        """Restart a child until it is healthy. Raises GPTCoreError after too many failures."""
        while not self.stopping.is_set():
            if is_failure:
                click.echo(f"{child.name} ended and is restarted. Its log: {child.log}", err=True)
                self.stopping.wait(child.count_failure())
            child.wait(0)
            child.start()
            try:
                self.wait_until_healthy(child)
            except GPTCoreError:
                is_failure = True
                continue
            self.record()
            return

    def stop(self) -> None:
        """Stop the flow runs first, so that they save and report, then the runner and the servers. Kill the rest."""
        stopped, descendants = set[psutil.Process](), set[psutil.Process]()
        with suppress(psutil.NoSuchProcess):
            if self.runner.process is not None:
                stopped, descendants = stop_flow_runs(psutil.Process(self.runner.process.pid))
        if stopped:
            time.sleep(_TICK_SECONDS)  # the runner reports how the flow runs ended
        self.stop_children()
        for process in filter(_is_alive, descendants):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if stopped:
            from flows.tracking.reconcile import close_orphans

            close_orphans(self.root)  # a flow run that was stopped during a write could not report its own end
        (self.root.path / "up.json").unlink(missing_ok=True)
        click.echo("stopped")

    def stop_children(self) -> None:
        """Stop the runner, whose flow runs have ended, within a second; then the servers, which may take longer."""
        self.runner.signal(signal.SIGTERM)
        self.runner.wait(1.0)
        for child in self.servers():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _CHILD_GRACE_SECONDS
        for child in self.servers():
            child.wait(deadline - time.monotonic())


def stop_flow_runs(runner: psutil.Process, must_signal: bool = True) -> tuple[set[psutil.Process], set[psutil.Process]]:
    """Stop all flow runs of a runner, and wait for them. Return their processes, and these with all their descendants.

    Without `must_signal`, they have got a signal already.
    """
    deadline = time.monotonic() + RUN_GRACE_SECONDS
    stopped: set[psutil.Process] = set()
    descendants: set[psutil.Process] = set()
    while (runs := _find_flow_runs(runner)) and time.monotonic() < deadline:
        for process in set(runs) - stopped:  # the runner may have started another run meanwhile
            click.echo(f"stopping flow run (pid {process.pid}); it saves first")
            with suppress(psutil.NoSuchProcess):
                descendants |= {process, *process.children(recursive=True)}
                if must_signal:
                    process.terminate()
        stopped |= set(runs)
        time.sleep(0.2)
    return stopped, descendants


def _find_flow_runs(runner: psutil.Process) -> list[psutil.Process]:
    """Return the processes of the runner's flow runs that are alive."""
    with suppress(psutil.NoSuchProcess):
        return [process for process in runner.children() if _is_alive(process) and _is_flow_run(process)]
    return []


def _check_url(url: str) -> Callable[[Child], bool]:
    return lambda _: answers(url)


def _is_runner_ready(runner: Child) -> bool:
    return f"\n{READY} " in f"\n{runner.read_log()}"


def _print_urls(servers: Servers) -> None:
    click.echo(f"Prefect  {servers.prefect}")
    click.echo(f"MLflow   {servers.mlflow}")


def _check_ports(options: Options, has_mlflow: bool) -> None:
    """Raise ConfigError if both ports are the same, and GPTCoreError if a port is taken."""
    ports = [("Prefect", "--prefect-port", options.prefect_port)]
    if has_mlflow:
        ports.append(("MLflow", "--mlflow-port", options.mlflow_port))
    if has_mlflow and options.prefect_port == options.mlflow_port:
        raise ConfigError(f"--prefect-port and --mlflow-port are both {options.mlflow_port}: give two different ones")
    for name, flag, port in ports:
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((HOST, port))
            except OSError as error:
                raise GPTCoreError(
                    f"port {port} on {HOST} cannot be used for {name}: {error.strerror}. Choose another with {flag}."
                ) from None


def _stop_leftovers(root: StateRoot) -> None:
    """Kill the children of a `gptflow up` that was killed. The flow runs of its runner may continue."""
    before = read_servers(root.path)
    for name, (pid, created) in (before.processes if before else {}).items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) > 1.0:
                continue
            click.echo(f"stopping {name} (pid {pid}), left over from a `gptflow up` that was killed")
            for leftover in [process, *(process.children(recursive=True) if name != "runner" else [])]:
                leftover.kill()
            psutil.wait_procs([process], timeout=_CHILD_GRACE_SECONDS)
    (root.path / "up.json").unlink(missing_ok=True)


def _is_flow_run(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "prefect.engine" in process.cmdline()
    return False


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False

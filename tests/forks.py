"""The command line and the trainer as forked processes whose imports are done when they start.

Importing torch, MLflow, Prefect and the other packages takes many seconds of CPU time, hundreds of times in the whole
suite. The fork server here imports them once, computes nothing and starts no thread. Each process is forked from it. A
forked process is a real one: it has its own pid, environment, working directory, session and signals, and SIGKILL kills
it. Two differences remain: its parent is the fork server, and its command line is that of this module.

Prefect reads its settings from the environment when it is imported. So it is imported in a second fork server, forked
from the first, whose children read the settings again. Only programs that use Prefect are forked from it: retrainings,
`serve`, and Prefect's servers.

Some tests also start each kind of process as users do: see `cold` in tests/servers.py.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

import psutil

from tests import databases, pictures

PRELOADED = (
    *("torch", "torch._dynamo", "pandas", "fastapi", "httpx", "yaml", "rich.table", "sqlalchemy.ext.asyncio"),
    *("mlflow.pyfunc.model", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
    *(
        "gptcore.training.trainer",
        "gptcore.corpus.ingest",
        "gptcore.training.batches",
        "gptcore.evaluation.run_report",
        "gptcore.bundle",
    ),
    *("flows.cli", "flows.registry.versions", "flows.registry.champion", "flows.operations.retention"),
)
"""Modules that the fork server imports. torch would import `_dynamo` with the first optimizer."""
WITH_PREFECT = (
    *("prefect", "prefect.runner", "prefect.server.api.server", "prefect.server.services.base"),
    *("flows.retrain.flow", "flows.retrain.watch", "flows.operations.flows", "flows.deployments.serve"),
    *("flows.deployments.ephemeral_server", "flows.deployments.up"),
)
"""Modules that only the second fork server imports."""
PROGRAMS: dict[str, Callable[[], Any]] = {
    "gptflow": lambda: import_module("flows.cli").main(),
    "gptcore.train": lambda: import_module("gptcore.training.trainer").main(),
    "flows.deployments.ephemeral_server": lambda: import_module("flows.deployments.ephemeral_server").main(),
    "flows.deployments.up_servers": lambda: import_module("flows.deployments.up_servers").main(),
    "flows.state.databases": lambda: import_module("flows.state.databases").main(*sys.argv[1:]),
    "tests.forks": lambda: main(sys.argv[1], *WITH_PREFECT),
}
_PREFECT_COMMANDS = {"run", "serve", "up"}
_NUM_FILES = 3


class Forked:
    """A forked process with those methods of subprocess.Popen and psutil.Popen that the tests and the product use."""

    def __init__(self, connection: socket.socket, stdin: IO[bytes] | None) -> None:
        self._answers, self.stdin = connection.makefile("rb", buffering=0), stdin
        self._connection = connection
        self.pid = self._read_number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs. A killed process has the negative signal number."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raise subprocess's and psutil's TimeoutExpired in one error."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise _TimeoutExpired(self.pid, timeout)
            self.returncode = self._read_number()
            self._connection.close()
        return self.returncode

    def _read_number(self) -> int:
        """Return the next number from the fork server. Raise RuntimeError with the cause if there is none."""
        line = b""
        with suppress(ConnectionError):
            line = self._answers.readline()
        if not line:
            raise RuntimeError(SERVER.explain_end())
        try:
            return int(line)
        except ValueError:
            raise RuntimeError(f"the fork server did not fork: {line.decode()}") from None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def children(self, recursive: bool = False) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive)


class _TimeoutExpired(subprocess.TimeoutExpired, psutil.TimeoutExpired):
    def __init__(self, pid: int, seconds: float | None) -> None:
        subprocess.TimeoutExpired.__init__(self, f"the forked process {pid}", seconds or 0.0)
        self.seconds, self.pid, self.name, self.msg = seconds, pid, None, f"timeout after {seconds} seconds"


class ForkServer:
    """The process that forks. It starts with the first requested child and ends with this process."""

    def __init__(self) -> None:
        self.address = ""
        self.process: subprocess.Popen[bytes] | Forked | None = None

    def explain_end(self) -> str:
        """Return how the fork server ended. The next request starts another one."""
        if self.process is None:
            return f"the fork server at {self.address}, from which this process was forked, has ended"
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            return f"the fork server {self.process.pid} closed its connection, but it still runs"
        self.address, self.process = "", None
        return f"the fork server ended with exit code {code}; a traceback is in this process's standard error"

    def command(
        self,
        *arguments: str,
        directory: Path,
        environment: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
        program: str = "gptflow",
        is_leader: bool = False,
    ) -> Forked:
        """Start a program with these arguments and an empty standard input, a leader in a session of its own."""
        with Path(os.devnull).open("rb") as nothing:
            files = (nothing.fileno(), stdout.fileno(), stderr.fileno())
            return Forked(self._start(program, arguments, directory, environment, files, is_leader), None)

    def trainer(self, *arguments: str, environment: Mapping[str, str], log: IO[Any]) -> Forked:
        """Start `python -m gptcore.train` in a session of its own, with a pipe as its standard input."""
        reading, writing = os.pipe()
        try:
            files = (reading, log.fileno(), log.fileno())
            connection = self._start("gptcore.train", arguments, Path.cwd(), environment, files, True)
        finally:
            os.close(reading)
        return Forked(connection, os.fdopen(writing, "wb", buffering=0))

    def _start(
        self,
        program: str,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        files: tuple[int, ...],
        is_leader: bool,
    ) -> socket.socket:
        self._be_there()
        asked = {
            "program": program,
            "arguments": arguments,
            "directory": str(directory),
            "environment": dict(environment),
            "is_leader": is_leader,
            "parent": os.getpid(),
            "addresses": [SERVER.address, PREFECT_SERVER.address],
        }
        connection = socket.socket(socket.AF_UNIX)
        body = json.dumps(asked).encode() + b"\n"
        try:
            connection.connect(self.address)
            sent = socket.send_fds(connection, [body], list(files))
            connection.sendall(body[sent:])
        except (ConnectionError, FileNotFoundError) as error:
            raise RuntimeError(self.explain_end()) from error
        return connection

    def _be_there(self) -> None:
        if self.address:
            return
        directory = tempfile.mkdtemp(prefix="gptflow-forks-")
        address = f"{directory}/socket"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "GPTFLOW_"))}
        quiet = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_CONFIGURE_LOGGING": "false"}
        # Prefect makes its home when it is imported.
        environment = {**kept, **quiet, "OMP_NUM_THREADS": "1", "PREFECT_HOME": directory}
        self.process = self._launch(address, environment)
        self.address = address

    def _launch(self, address: str, environment: dict[str, str]) -> "subprocess.Popen[bytes] | Forked":
        """Start the process and return when it is ready."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", address],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process


class PrefectForkServer(ForkServer):
    """A fork server that was forked from SERVER and has imported Prefect too."""

    def _launch(self, address: str, environment: dict[str, str]) -> Forked:
        (standard_input, end), (reading, output) = os.pipe(), os.pipe()
        files = (standard_input, output, 2)
        connection = SERVER._start("tests.forks", [address], Path(__file__).parents[1], environment, files, False)
        os.close(standard_input), os.close(output)
        process = Forked(connection, os.fdopen(end, "wb", buffering=0))
        with os.fdopen(reading, "rb") as lines:
            assert lines.readline() == b"ready\n"
        return process


SERVER, PREFECT_SERVER = ForkServer(), PrefectForkServer()
"""The fork servers of this process. In a forked process, those of the process that requested it."""


def choose_server(*arguments: str) -> ForkServer:
    """Return the fork server for a command line of `gptflow`."""
    return PREFECT_SERVER if set(arguments[:1]) <= _PREFECT_COMMANDS and arguments else SERVER


def popen(command: Sequence[str], **given: Any) -> Any:
    """Start a process as psutil.Popen does, but fork a trainer that trains alone."""
    if list(command[:3]) == [sys.executable, "-m", "gptcore.train"]:
        return SERVER.trainer(*command[3:], environment=given["env"], log=given["stdout"])
    return _popen(command, **given)


_popen = psutil.Popen


class Subprocess(ModuleType):
    """The module `subprocess`, but Popen forks the supervised programs of the product."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    @staticmethod
    def Popen(command: Sequence[str], env: dict[str, str], start_new_session: bool, **files: Any) -> Forked:
        assert files.pop("stdin") == subprocess.DEVNULL
        given = {"program": "gptflow" if command[1] == "-c" else command[2], "is_leader": start_new_session}
        return PREFECT_SERVER.command(*command[3:], directory=Path.cwd(), environment=env, **given, **files)


def main(address: str, *more: str) -> None:
    """Import the modules that every program needs and `more` ones, then fork programs (see `_listen`)."""
    for name in (*PRELOADED, *more):
        import_module(name)
    import_module("sqlalchemy.orm").configure_mappers()
    databases.commit_without_waiting()
    psutil.Popen = popen
    vars(import_module("gptcore.evaluation.run_report")).update(pictures.UNDRAWN)
    if more:
        import_module("flows.deployments.child_process").subprocess = Subprocess("subprocess")
    _listen(address)


def _listen(address: str) -> None:
    """Fork the programs requested at the address and report their exit codes, until standard input is closed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wakes, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, all imported objects
    print("ready", flush=True)
    asking: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([0, listener, wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
            _report(asking)
        if listener in ready:
            connection, _ = listener.accept()
            _answer(connection, asking, listener, (wakes, waking))
        if 0 in ready:
            Path(address).unlink()
            Path(address).parent.rmdir()
            return


def _report(asking: dict[int, socket.socket]) -> None:
    """Send the exit code of each ended child to the process that requested the child."""
    for child in list(asking):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with suppress(OSError), asking.pop(child) as connection:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _answer(
    connection: socket.socket, asking: dict[int, socket.socket], listener: socket.socket, pipe: tuple[int, int]
) -> None:
    """Fork the requested program and send its pid, or the reason why it cannot be forked.

    Tests kill processes at any moment, also while these request a child. That must not end the fork server.
    """
    try:
        child = _fork(connection, [listener, *asking.values()], pipe)
    except OSError as error:  # the request was cut off, or there are too many processes
        with suppress(OSError), connection:
            connection.sendall(f"{error}\n".encode())
        return
    asking[child] = connection
    with suppress(OSError):
        connection.sendall(b"%d\n" % child)


def _fork(connection: socket.socket, sockets: list[socket.socket], pipe: tuple[int, int]) -> int:
    body, files, _, _ = socket.recv_fds(connection, 1 << 16, _NUM_FILES)
    try:
        while not body.endswith(b"\n"):
            if not (more := connection.recv(1 << 16)):
                raise ConnectionResetError("the request was cut off")
            body += more
        child = os.fork()
        if child == 0:
            _serve(body, files, [connection, *sockets], pipe)
        return child
    finally:
        for file in files:
            os.close(file)


def _serve(body: bytes, files: list[int], sockets: list[socket.socket], pipe: tuple[int, int]) -> NoReturn:
    """Run the request in this process, the child. Nothing may lead it back into the server's loop."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in sockets:
            each.close()
        for number in pipe:
            os.close(number)
        _become(**json.loads(body), files=files)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become(
    program: str,
    arguments: list[str],
    directory: str,
    environment: dict[str, str],
    is_leader: bool,
    parent: int,
    addresses: list[str],
    files: list[int],
) -> NoReturn:
    """Turn this process, the child, into the program until its end."""
    SERVER.address, PREFECT_SERVER.address = addresses
    os.getppid = lambda: parent if _is_alive(parent) else 1
    if is_leader:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [path for path in sys.path if path]  # nothing is imported from the working directory
    sys.argv = [program, *arguments]
    if "prefect" in sys.modules:
        _forget_settings()
    code = 1
    try:
        code = int(PROGRAMS[program]() or 0)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    # Do what Python does at exit, but do not tear down the imported modules.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _forget_settings() -> None:
    """Let Prefect read its settings, and configure its logs, when it is first asked for a setting.

    Not earlier: programs set some of the variables before they import Prefect.
    """
    context = import_module("prefect.context")
    own, kept = context.SettingsContext.get, []

    def get(_: Any) -> Any:
        if not kept:
            kept.append(True)
            context.refresh_global_settings_context()
            import_module("prefect.logging.configuration").setup_logging(incremental=False)
        return own()

    context.SettingsContext.get = classmethod(get)


if __name__ == "__main__":
    # Run the module that children import, so that SERVER and popen exist once.
    import_module("tests.forks").main(sys.argv[1])

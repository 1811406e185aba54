"""The command line and the trainer as forked processes whose imports are done when they start.

Importing torch, MLflow and the other packages takes many seconds of CPU time, hundreds of times in the whole suite. The
fork server here imports them once, computes nothing and starts no thread. Each process is forked from it. A forked
process is a real one: it has its own pid, environment, working directory, session and signals, and SIGKILL kills it.
Two differences remain: its parent is the fork server, and its command line is that of this module. Prefect is not
imported beforehand, because it reads its settings from the environment when it is imported.

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
from typing import IO, Any, NoReturn

import psutil

from tests import pictures

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
PROGRAMS: dict[str, Callable[[], Any]] = {
    "gptflow": lambda: import_module("flows.cli").main(),
    "gptcore.train": lambda: import_module("gptcore.training.trainer").main(),
}
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
        self.process: subprocess.Popen[bytes] | None = None

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
        self, *arguments: str, directory: Path, environment: Mapping[str, str], stdout: IO[Any], stderr: IO[Any]
    ) -> Forked:
        """Start `gptflow` with these arguments and an empty standard input."""
        with Path(os.devnull).open("rb") as nothing:
            files = (nothing.fileno(), stdout.fileno(), stderr.fileno())
            return Forked(self._start("gptflow", arguments, directory, environment, files, False), None)

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
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", address],
            cwd=Path(__file__).parents[1],
            env={**kept, **quiet, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"
        self.address = address


SERVER = ForkServer()
"""The fork server of this process. In a forked process, the fork server that it was forked from."""


def popen(command: Sequence[str], **given: Any) -> Any:
    """Start a process as psutil.Popen does, but fork a trainer that trains alone."""
    if list(command[:3]) == [sys.executable, "-m", "gptcore.train"]:
        return SERVER.trainer(*command[3:], environment=given["env"], log=given["stdout"])
    return _popen(command, **given)


_popen = psutil.Popen


def main(address: str) -> None:
    """Fork the programs requested at the address and report their exit codes, until standard input is closed."""
    for name in PRELOADED:
        import_module(name)
    import_module("sqlalchemy.orm").configure_mappers()
    SERVER.address = address
    psutil.Popen = popen
    vars(import_module("gptcore.evaluation.run_report")).update(pictures.UNDRAWN)
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
    program: str, arguments: list[str], directory: str, environment: dict[str, str], is_leader: bool, files: list[int]
) -> NoReturn:
    """Turn this process, the child, into the program until its end."""
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


if __name__ == "__main__":
    # Run the module that children import, so that SERVER and popen exist once.
    import_module("tests.forks").main(sys.argv[1])

"""Call functions in child processes: a pool of processes, and a map over the shards of a large corpus.

The children are plain processes that receive their calls through pipes. They are not a multiprocessing pool. Its
workers would outlive a parent that is killed. They would also import the caller's main module again: with torch, or
without end if the module has no `__name__ == "__main__"` check. The children here import only what the functions need,
and end as soon as their parent does. A child that dies is replaced, and only its call is made again.

A shard holds everything that its work needs and says where its result belongs; the result is a committed directory. So
the work may be done anywhere, in any order, twice, or again after a kill, and the outcome is the same. A caller that
has a better engine than local processes passes another `MapShards` (see flows/retrain/clusters.py).
"""

import contextlib
import json
import os
import pickle
import platform
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gptcore.errors import GPTCoreError
from gptcore.progress import Progress

_TRIES = 3
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: the same in all containers of a machine
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gptcore.processes import run_child; run_child()"


class Shard(Protocol):
    """One unit of the work on a large corpus, picklable and small."""

    @property
    def num_bytes(self) -> int:
        """Bytes of text in the shard, for the progress."""


T = TypeVar("T")
S = TypeVar("S", bound=Shard)
R = TypeVar("R")


class MapShards(Protocol):
    """Calls a function of a module for every shard, and returns the results in the order of the shards.

    `action` is a word for the work in the progress, such as `read`. Raises what the function raises; if several shards
    fail, the error of any of them.
    """

    def __call__(self, step: str, action: str, function: Callable[[S], R], shards: Sequence[S]) -> list[R]: ...


class WorkerDied(GPTCoreError):
    """The same call killed one process after another."""


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def identify_cores() -> str:
    """Return a text that is equal for processes that may use the same CPUs of the same machine."""
    try:
        machine = _BOOT_ID.read_text()
    except OSError:
        machine = platform.node()
    return f"{machine} {sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else ''}"


def map_in_processes(
    step: str, action: str, function: Callable[[S], R], shards: Sequence[S], processes: int | None = None
) -> list[R]:
    """Map with local processes, one per CPU unless `processes` is given: see `MapShards`.

    Raises WorkerDied if a shard has killed three processes.
    """
    progress = Progress(step, action, sum(shard.num_bytes for shard in shards))
    with start_pool(min(processes or count_cpus(), len(shards))) as pool:
        shard_of = {pool.submit(function, shard): shard for shard in shards}
        for future in as_completed(shard_of):
            future.result()
            progress.add(shard_of[future].num_bytes)
        return [future.result() for future in shard_of]


class ProcessPool:
    """Processes that call functions of modules, each one call at a time. `start_pool` starts it.

    Functions, arguments and results are pickled. A call raises what the function raises, and WorkerDied if it has
    killed three children.
    """

    def __init__(self, threads: ThreadPoolExecutor, idle: "queue.SimpleQueue[_Child | None]", size: int) -> None:
        self._threads, self._idle, self._size = threads, idle, size

    def submit(self, function: Callable[[T], R], argument: T) -> "Future[R]":
        """Call the function when a process is idle. Return the future of its result."""
        return self._threads.submit(self._call, function, argument)

    def map(self, function: Callable[[T], R], arguments: Iterable[T]) -> Iterator[R]:
        """Yield the results in the order of the arguments. At most two calls per process are under way."""
        pending: deque[Future[R]] = deque()
        for argument in arguments:
            pending.append(self.submit(function, argument))
            if len(pending) >= 2 * self._size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _call(self, function: Callable[[T], R], argument: T) -> R:
        child = self._idle.get()
        try:
            return function(argument) if child is None else child.call(function, argument)
        finally:
            self._idle.put(child)


@contextlib.contextmanager
def start_pool(children: int, with_this_process: bool = False) -> Iterator[ProcessPool]:
    """Start a pool of child processes, and kill them when the `with` block ends.

    With `with_this_process`, a thread of this process takes calls too.
    """
    size = children + with_this_process
    idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        threads = ThreadPoolExecutor(max_workers=max(1, size))
        stack.callback(threads.shutdown, cancel_futures=True)
        if with_this_process:
            idle.put(None)  # the first, because it is ready at once
        for _ in range(children):
            child = _Child()
            stack.callback(child.kill)  # runs before the threads are joined, so that none waits for a child
            idle.put(child)
        yield ProcessPool(threads, idle, size)


class _Child:
    """A child process, which is replaced if it dies."""

    def __init__(self) -> None:
        self._is_killed = False
        self._start()

    def _start(self) -> None:
        # Each child has its own session, so Ctrl-C reaches only the parent, which kills the children.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        if self._is_killed:  # while the process started, in another thread
            self._process.kill()

    def call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """Return the function's result. Raises what the function raises, and WorkerDied."""
        request = pickle.dumps(pickle.dumps((function, argument)))  # see `_read_requests`
        for _ in range(_TRIES):
            try:
                assert self._process.stdin is not None and self._process.stdout is not None
                self._process.stdin.write(request)
                self._process.stdin.flush()
                is_result, answer = pickle.load(self._process.stdout)
            except (EOFError, BrokenPipeError, pickle.UnpicklingError, ValueError):
                code = self._process.wait()
                if self._is_killed:
                    raise WorkerDied("the work was stopped") from None
                self._close_pipes()
                self._start()
                continue
            if is_result:
                return answer
            raise answer
        raise WorkerDied(
            f"{getattr(function, '__qualname__', function)}: the same call killed {_TRIES} processes one after "
            f"another, the last with exit code {code}{_explain_exit(code)}. Finished work is kept. Run the same "
            "command again to resume."
        )

    def kill(self) -> None:
        """Kill the process at once. Work that it has not committed is lost."""
        self._is_killed = True
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _explain_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return " (killed, perhaps because the memory was full)"
    return f" ({signal.Signals(-code).name})" if code < 0 else ""


def run_child() -> None:
    """Run a child process: read requests from standard input, and write the answers to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not get between the answers
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        while True:
            answers.write(_make_answer(requests.get()))
            answers.flush()
    os._exit(1)  # a normal exit would wait for the thread


def _read_requests(requests: "queue.SimpleQueue[bytes]") -> None:
    """Put every request on the queue. End the process when the parent closes the pipe or dies.

    A request is pickled twice, so that this thread unpickles only bytes and does not import what the request needs.
    """
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            requests.put(pickle.load(sys.stdin.buffer))
    os._exit(1)


def _make_answer(request: bytes) -> bytes:
    """Call the requested function. Return, pickled, (True, result) or (False, error)."""
    try:
        function, argument = pickle.loads(request)
        return pickle.dumps((True, function(argument)), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        with contextlib.suppress(Exception):
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # some exceptions can be pickled but not unpickled
            return answer
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))

"""Functions mapped over the shards of a large corpus: by whom, is for the caller to say; here, by local processes.

A shard says all that its work needs and where its result belongs, and the result is a committed directory. So the work
may be done anywhere, in any order, twice, or again after a kill, and the outcome is the same. Whoever has better
engines passes another `Map`.

The processes here are plain children fed through pipes, and not a multiprocessing pool, whose workers would import the
caller's main module again (with torch, or without end if it has no `__name__` guard) and outlive a parent that is
killed. They import only what the function needs, and end when their input does. One that dies is replaced, and costs
its shard.
"""

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Protocol, TypeVar

from gptcore.errors import GPTCoreError
from gptcore.progress import Progress

SHARD_BYTES = 16 * 1024 * 1024
"""About how much text a shard holds."""
WHOLE_BYTES = 256 * 1024 * 1024
"""Up to so much text is worked on as a whole, without parts: at 100 MB shards took two processes longer."""

_TRIES = 3
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gptcore.text.workers import work; work()"


class Shard(Protocol):
    """A part of the work, picklable and small."""

    @property
    def num_bytes(self) -> int:
        """How much text it is about: for the progress."""


S = TypeVar("S", bound=Shard)
S_contra = TypeVar("S_contra", bound=Shard, contravariant=True)
R = TypeVar("R")


class Map(Protocol):
    """Calls a function of a module for every shard, somewhere, and returns the results in the order of the shards.

    `doing` says in a word what is done. What the function raises is raised; where several shards fail, any of them.
    """

    def __call__(self, step: str, doing: str, function: Callable[[S], R], shards: Sequence[S]) -> list[R]: ...


class WorkerDied(GPTCoreError):
    """A process died of the same shard again and again."""


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_processes(
    step: str, doing: str, function: Callable[[S], R], shards: Sequence[S], processes: int | None = None
) -> list[R]:
    """A `Map` by one process per CPU. Raises WorkerDied if a shard has killed three of them."""
    progress = Progress(step, doing, sum(shard.num_bytes for shard in shards))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        workers = [_Worker() for _ in range(min(processes or cpus(), len(shards)))]
        threads = ThreadPoolExecutor(max_workers=max(1, len(workers)))
        stack.callback(threads.shutdown, cancel_futures=True)
        for worker in workers:
            stack.callback(worker.end)  # before the threads are waited for: what they wait for is gone then
            idle.put(worker)

        def done(shard: S) -> R:
            worker = idle.get()
            try:
                result: R = worker.ask(function, shard)
            finally:
                idle.put(worker)
            progress.add(shard.num_bytes)
            return result

        return list(threads.map(done, shards))


class _Worker:
    """A child process, and the next one where it died."""

    def __init__(self) -> None:
        self._ended = False
        self._start()

    def _start(self) -> None:
        # Their own session: Ctrl-C is for the parent, which ends them.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, function: Callable[[Any], Any], shard: Any) -> Any:
        """The function's result. Raises what it raised, and WorkerDied."""
        request = pickle.dumps((function, shard))
        for _ in range(_TRIES):
            try:
                assert self._process.stdin is not None and self._process.stdout is not None
                self._process.stdin.write(request)
                self._process.stdin.flush()
                is_well, answer = pickle.load(self._process.stdout)
            except (EOFError, BrokenPipeError, pickle.UnpicklingError, ValueError):
                code = self._process.wait()
                if self._ended:
                    raise WorkerDied("the work was broken off") from None
                self._close()
                self._start()
                continue
            if is_well:
                return answer
            raise answer
        raise WorkerDied(
            f"{getattr(function, '__qualname__', function)}: {_TRIES} processes died one after another of the same "
            f"shard, the last with exit code {code}{_why(code)}. What is done is kept: the same command goes on."
        )

    def end(self) -> None:
        """At once. What it had not committed does not exist."""
        self._ended = True
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return " (killed: perhaps for want of memory)"
    return f" ({signal.Signals(-code).name})" if code < 0 else ""


def work() -> None:
    """A child's whole life: functions and shards from standard input, results to standard output."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        for function, shard in _requests(sys.stdin.buffer):
            replies.write(_answer(function, shard))
            replies.flush()


def _requests(file: IO[bytes]) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    while True:
        yield pickle.load(file)


def _answer(function: Callable[[Any], Any], shard: Any) -> bytes:
    try:
        return pickle.dumps((True, function(shard)))
    except Exception as error:
        with contextlib.suppress(Exception):
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # an exception may take apart and not be put together again
            return answer
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))

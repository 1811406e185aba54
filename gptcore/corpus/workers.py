"""Map functions over the shards of a large corpus: the `Map` protocol, and a `Map` by local worker processes.

A shard holds everything that its work needs and says where its result belongs; the result is a committed directory. So
the work may be done anywhere, in any order, twice, or again after a kill, and the outcome is the same. A caller that
has a better engine passes another `Map` (see flows/retrain/clusters.py).

The processes here are plain children that receive their work through pipes. They are not a multiprocessing pool. Its
workers would outlive a parent that is killed. They would also import the caller's main module again: with torch, or
without end if the module has no `__name__ == "__main__"` check. The children import only what the function needs, and
end when their input ends. A child that dies is replaced, and only its shard is done again.
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
"""Up to this much text is processed without shards: at 100 MB, shards took two processes longer than no shards."""

_TRIES = 3
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gptcore.corpus.workers import run_worker; run_worker()"
)


class Shard(Protocol):
    """One unit of the work on a large corpus, picklable and small."""

    @property
    def num_bytes(self) -> int:
        """How much text the shard is about, for the progress."""


S = TypeVar("S", bound=Shard)
S_contra = TypeVar("S_contra", bound=Shard, contravariant=True)
R = TypeVar("R")


class Map(Protocol):
    """Calls a function of a module for every shard, and returns the results in the order of the shards.

    `doing` is a word for the work, such as `read`, for the progress. Raises what the function raises; if several shards
    fail, the error of any of them.
    """

    def __call__(self, step: str, doing: str, function: Callable[[S], R], shards: Sequence[S]) -> list[R]: ...


class WorkerDied(GPTCoreError):
    """The same shard killed one process after another."""


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    step: str, doing: str, function: Callable[[S], R], shards: Sequence[S], processes: int | None = None
) -> list[R]:
    """Map with local processes, one per CPU unless `processes` is given: see `Map`.

    Raises WorkerDied if a shard has killed three processes.
    """
    progress = Progress(step, doing, sum(shard.num_bytes for shard in shards))
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        workers = [_Worker() for _ in range(min(processes or count_cpus(), len(shards)))]
        threads = ThreadPoolExecutor(max_workers=max(1, len(workers)))
        stack.callback(threads.shutdown, cancel_futures=True)
        for worker in workers:
            stack.callback(worker.kill)  # runs before the threads are joined, so that none waits for a worker
            idle.put(worker)

        def process(shard: S) -> R:
            worker = idle.get()
            try:
                result: R = worker.call(function, shard)
            finally:
                idle.put(worker)
            progress.add(shard.num_bytes)
            return result

        return list(threads.map(process, shards))


class _Worker:
    """A child process, which is replaced if it dies."""

    def __init__(self) -> None:
        self._is_killed = False
        self._start()

    def _start(self) -> None:
        # Each child has a session of its own: Ctrl-C is for the parent, which kills the children.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def call(self, function: Callable[[Any], Any], shard: Any) -> Any:
        """Return the function's result. Raises what the function raises, and WorkerDied."""
        request = pickle.dumps((function, shard))
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
            f"{getattr(function, '__qualname__', function)}: the same shard killed {_TRIES} processes one after "
            f"another, the last with exit code {code}{_explain_exit(code)}. Finished shards are kept. Run the same "
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


def run_worker() -> None:
    """Run a child process: read functions and shards from standard input, write results to standard output."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not get between the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        for function, shard in _read_requests(sys.stdin.buffer):
            replies.write(_make_answer(function, shard))
            replies.flush()


def _read_requests(file: IO[bytes]) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    while True:
        yield pickle.load(file)


def _make_answer(function: Callable[[Any], Any], shard: Any) -> bytes:
    """Call the function. Return, pickled, (True, result) or (False, error)."""
    try:
        return pickle.dumps((True, function(shard)))
    except Exception as error:
        with contextlib.suppress(Exception):
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # some exceptions can be pickled but not unpickled
            return answer
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))

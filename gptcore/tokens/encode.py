"""Text to ids: a snapshot's passages, encoded in batches by this process and by child processes.

Threads do not make tiktoken faster, so there are processes, fed through pipes. They are not a multiprocessing pool. The
workers of such a pool import the caller's main module again: that loads torch, or never ends if the module has no
`__name__` guard. They also outlive a parent that is killed. The children here load only the tokenizer, and end when
their input ends.

See encode_shards.py for corpora that are encoded in shards, and files.py for what is written.
"""

import codecs
import contextlib
import json
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore.corpus.snapshot import side_text
from gptcore.corpus.workers import count_cpus
from gptcore.errors import CheckpointError
from gptcore.progress import Progress
from gptcore.tokens.directory import dtype_of
from gptcore.tokens.tokenizer import Tokenizer, cut_into_pieces

_CHUNK_BYTES = 1_000_000
_BATCH_CHARS = 1_000_000
_BYTES_PER_PROCESS = 4_000_000
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from gptcore.tokens.encode import _run_worker; _run_worker(sys.argv[2])"
)

Batch = list[str | None]
"""Pieces of text in order; None means an end-of-text id."""


def encode_side(snapshot: Path, side: str, vocabulary: Path) -> Iterator[np.ndarray]:
    """Yield the ids of one side of a snapshot, (tokens,) each, encoded by the tokenizer saved in `vocabulary`.

    The ids are those that `tokenize` would write. Nothing is written to disk. Raises TokenizerError.
    """
    processes = choose_num_processes((snapshot / f"{side}.txt").stat().st_size)
    with start_encoder(Tokenizer.load(vocabulary), vocabulary, processes) as encoder:
        yield from encoder.encode(batch_passages(read_passages_in_chunks(snapshot, side)))


def read_passages_in_chunks(snapshot: Path, side: str, progress: Progress | None = None) -> Iterator[Iterator[str]]:
    """Yield each passage of a side as chunks of about a megabyte, because a passage may be as long as the corpus.

    Read the chunks of one passage to their end before asking for the next passage.
    """
    text = side_text(snapshot, side)
    with text.path.open("rb") as file:
        for length in np.diff(text.bounds).tolist():
            yield read_chunks(file, length, progress)


def read_chunks(file: IO[bytes], num_bytes: int, progress: Progress | None = None) -> Iterator[str]:
    """Yield the next `num_bytes` of a UTF-8 file, about a megabyte at a time.

    Raises CheckpointError if the file ends earlier.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    while num_bytes > 0:
        data = file.read(min(num_bytes, _CHUNK_BYTES))
        if not data:
            raise CheckpointError(
                f"{file.name} ends {num_bytes} bytes before its index does: the snapshot was altered."
            )
        num_bytes -= len(data)
        if progress is not None:
            progress.add(len(data))
        yield decoder.decode(data, final=num_bytes == 0)


def batch_passages(passages: Iterable[Iterable[str]], follows_another: bool = False) -> Iterator[Batch]:
    """Yield batches of about `_BATCH_CHARS` characters that can be encoded independently of each other.

    Passages are cut only where `cut_into_pieces` cuts them, and an end-of-text id separates them. With
    `follows_another`, that id also precedes the first passage, because another passage comes before it.
    """
    batch: Batch = []
    size = 0
    for number, passage in enumerate(passages):
        batch += [None] if number or follows_another else []
        for piece in cut_into_pieces(passage):
            batch.append(piece)
            size += len(piece)
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> np.ndarray:
    """Return the ids of a batch, (tokens,), in the type that they have on disk."""
    dtype = dtype_of(tokenizer.n_vocab)
    separator = np.array([tokenizer.eot], dtype=dtype)  # (1,)
    ids = (separator if piece is None else tokenizer.encode_to_numpy(piece).astype(dtype) for piece in batch)
    return np.concatenate([np.empty(0, dtype=dtype), *ids])  # (tokens,)


def choose_num_processes(num_bytes: int) -> int:
    """Return how many processes encode a text: one per 4 MB, at least one, and at most one per CPU.

    Below 8 MB, starting a second process takes longer than it saves.
    """
    return max(1, min(count_cpus(), num_bytes // _BYTES_PER_PROCESS))


class _Encoder:
    """Encodes batches in order, in this process and in its workers. Each of them has one batch at a time."""

    def __init__(self, tokenizer: Tokenizer, workers: list[subprocess.Popen], threads: ThreadPoolExecutor) -> None:
        self._tokenizer, self._workers, self._threads = tokenizer, workers, threads
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        for worker in (None, *workers):  # None means this process, which is ready at once
            self._idle.put(worker)

    def encode(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """Yield the ids of each batch: (tokens,). At most two batches per process are in memory."""
        if not self._workers:
            yield from (encode_batch(self._tokenizer, batch) for batch in batches)
            return
        pending: deque[Future] = deque()
        for batch in batches:
            pending.append(self._threads.submit(self._encode_when_idle, batch))
            if len(pending) >= 2 * (1 + len(self._workers)):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode_when_idle(self, batch: Batch) -> np.ndarray:
        """Wait for an idle process, and return the ids that it makes of the batch: (tokens,)."""
        worker = self._idle.get()
        try:
            if worker is None:
                return encode_batch(self._tokenizer, batch)
            pickle.dump(batch, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise RuntimeError(f"a tokenizing process ended early, with exit code {worker.wait()}") from None
        finally:
            self._idle.put(worker)


@contextlib.contextmanager
def start_encoder(tokenizer: Tokenizer, saved: Path, processes: int) -> Iterator[_Encoder]:
    """Start `processes` - 1 workers beside this process, and end them on exit.

    `saved` is the directory that holds the tokenizer: the workers load it from there.
    """
    command = [sys.executable, "-P", "-c", _WORKER, json.dumps(sys.path), str(saved.resolve())]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    workers: list[subprocess.Popen] = []
    threads = ThreadPoolExecutor(max_workers=processes)
    try:
        workers += [subprocess.Popen(command, **pipes) for _ in range(processes - 1)]
        yield _Encoder(tokenizer, workers, threads)
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.wait()
            for pipe in filter(None, (worker.stdin, worker.stdout)):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _run_worker(directory: str) -> None:
    """Run a worker: read batches from standard input, write their ids to standard output, until the input ends."""
    tokenizer = Tokenizer.load(Path(directory))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            ids = encode_batch(tokenizer, pickle.load(sys.stdin.buffer))
            pickle.dump(ids, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()

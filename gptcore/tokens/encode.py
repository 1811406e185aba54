"""Text to ids: a snapshot's passages, encoded in batches by this process and by child processes.

Threads do not make tiktoken faster, so there are processes (gptcore/processes.py). They load only the tokenizer.

See encode_shards.py for corpora that are encoded in shards, and files.py for what is written.
"""

import codecs
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore.corpus.snapshot import side_text
from gptcore.errors import CheckpointError
from gptcore.processes import count_cpus, start_pool
from gptcore.progress import Progress
from gptcore.tokens.directory import dtype_of
from gptcore.tokens.tokenizer import Tokenizer, cut_into_pieces

_CHUNK_BYTES = 1_000_000
_BATCH_CHARS = 1_000_000
_BYTES_PER_PROCESS = 4_000_000

Batch = list[str | None]
"""Pieces of text in order; None means an end-of-text id."""
Encode = Callable[[Iterable[Batch]], Iterator[np.ndarray]]
"""Yields the ids of each batch, (tokens,), in order."""


def encode_side(snapshot: Path, side: str, vocabulary: Path) -> Iterator[np.ndarray]:
    """Yield the ids of one side of a snapshot, (tokens,) each, encoded by the tokenizer saved in `vocabulary`.

    The ids are those that `tokenize` would write. Nothing is written to disk. Raises TokenizerError.
    """
    processes = choose_num_processes((snapshot / f"{side}.txt").stat().st_size)
    with start_encoder(Tokenizer.load(vocabulary), vocabulary, processes) as encode:
        yield from encode(batch_passages(read_passages_in_chunks(snapshot, side)))


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


@contextlib.contextmanager
def start_encoder(tokenizer: Tokenizer, saved: Path, processes: int) -> Iterator[Encode]:
    """Yield a function that encodes batches in this process and in `processes` - 1 children, which end on exit.

    `saved` is the directory that holds the tokenizer: the children load it from there. At most two batches per process
    are in memory.
    """
    with start_pool(processes - 1, with_this_process=True) as pool:
        yield functools.partial(pool.map, _BatchEncoder(tokenizer, saved.resolve()))


class _BatchEncoder:
    """Encodes a batch. It is pickled as the directory that holds its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, saved: Path) -> None:
        self._tokenizer, self._saved = tokenizer, saved

    def __call__(self, batch: Batch) -> np.ndarray:
        return encode_batch(self._tokenizer, batch)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_batch_encoder, (self._saved,)


def _load_batch_encoder(saved: Path) -> _BatchEncoder:
    return _BatchEncoder(load_once(saved), saved)


@functools.lru_cache(maxsize=1)
def load_once(saved: Path) -> Tokenizer:
    """Load a tokenizer, and keep it for the next call. The tokenizer at the path must never change."""
    return Tokenizer.load(saved)

"""Token files: a corpus snapshot as two flat arrays of ids on disk, train and val, with the tokenizer that made them.

Text is encoded once and mapped into memory ever after, so that training starts at once and holds no corpus. Passages
follow one another with an end-of-text id between them. The holdout is not here: it is scored block by block, as text.

Large corpora are encoded by several processes (tiktoken gains nothing from threads): this one and plain children of it,
fed through pipes, and not a multiprocessing pool, whose workers would import the caller's main module again
(with torch, or without end if it has no `__name__` guard) and outlive a parent that is killed. These know only the
tokenizer, and end when their input does.
"""

import codecs
import contextlib
import importlib.metadata
import json
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore import manifest
from gptcore.errors import CheckpointError, ConfigError
from gptcore.progress import Progress
from gptcore.text.workers import WHOLE_BYTES, Map, by_processes, cpus
from gptcore.tokenizer import Tokenizer, get_tokenizer, pieces, train_bpe

TOKENS_VERSION = 1
"""Raised when the same corpus and tokenizer come to give other files."""

SIDES = ("train", "val")
"""The sides of the split that have a token file."""

_CHUNK_BYTES = 1_000_000
_BATCH_CHARS = 1_000_000
_BYTES_PER_PROCESS = 4_000_000
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gptcore.text.tokens import _work; _work(sys.argv[2])"
)

Batch = list[str | None]
"""Pieces of text in order; None stands for an end-of-text id."""


@dataclass(frozen=True)
class Tokens:
    """A committed token directory."""

    path: Path
    sha256: str
    """Identity of corpus, tokenizer and `TOKENS_VERSION`."""
    n_vocab: int
    eot: int
    tokenizer: str
    """The tokenizer's name."""
    counts: dict[str, int]
    """Tokens on each side."""
    tokenizer_sha256: str
    """Identity of the vocabulary."""

    def side(self, side: str) -> np.ndarray:
        """The ids of "train" or "val", mapped from disk: (tokens,) uint16, or uint32 for more than 65,536 entries."""
        if self.counts[side] == 0:  # nothing can be mapped
            return np.empty(0, dtype=dtype_of(self.n_vocab))
        return np.memmap(self.path / f"{side}.bin", dtype=dtype_of(self.n_vocab), mode="r")

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer the files were made with. Raises TokenizerError if it is damaged."""
        return Tokenizer.load(self.path / "tokenizer")


def load_tokens(path: Path | str) -> Tokens:
    """The token directory at `path`, or at a URL that fsspec opens, from where it is streamed (see streamed.py).

    Raises CheckpointError if it was never completed or a file changed its size.
    """
    if "://" in str(path):
        from gptcore.text import streamed

        return streamed.load(str(path))
    tokens = of_manifest(Path(path))
    for side, count in tokens.counts.items():
        file, expected = tokens.path / f"{side}.bin", count * dtype_of(tokens.n_vocab).itemsize
        found = file.stat().st_size if file.is_file() else 0
        if found != expected:
            raise CheckpointError(f"{file} has {found} bytes, its manifest says {expected}. Delete {path}; run again.")
    return tokens


def of_manifest(path: Path) -> Tokens:
    """What the manifest in `path` says about the files, which are not looked at."""
    about = manifest.about(path)
    keys = ("sha256", "n_vocab", "eot", "tokenizer", "counts", "tokenizer_sha256")
    return Tokens(path=path, **{key: about[key] for key in keys})


def tokenize(
    snapshot: Path,
    name: str,
    tokens_root: Path,
    processes: int | None = None,
    vocabulary: Tokenizer | None = None,
    mapped: Map = by_processes,
) -> Tokens:
    """Encodes the train and val sides of a corpus snapshot into a directory of `tokens_root`, or finds it there.

    `name` is the tokenizer as in the configuration; bpe:N is trained on the train side first, unless a `vocabulary` of
    that name is given. A large corpus is encoded in shards, which `mapped` distributes, any other one by this process
    and its children, or by so many `processes` in any case. Memory does not grow with the corpus or its longest text.
    Raises ConfigError for an unknown tokenizer or a vocabulary of another name, CorpusError if the text cannot give
    bpe:N its entries, TokenizerError for a vocabulary that cannot be had, and CheckpointError if an existing directory
    was altered.
    """
    from gptcore import corpus  # not above: the workers import this module and need no corpus
    from gptcore.text import encoding, parts

    source = corpus.load_snapshot(snapshot)
    fixed = _given(name, vocabulary)
    identity = _identity(source.sha256, name, fixed)
    goal = tokens_root / identity[:16]
    if manifest.is_committed(goal):
        manifest.verify(goal)
        return load_tokens(goal)
    num_bytes = sum(source.bytes[side] for side in SIDES)

    def write(staged: Path, tokenizer: Tokenizer, sides: Mapping[str, Iterable[np.ndarray]]) -> Tokens:
        counts = {side: write_ids(staged / f"{side}.bin", made) for side, made in sides.items()}
        manifest.commit(staged, goal, _about(source.sha256, identity, tokenizer, counts))
        return load_tokens(goal)

    if processes is None and num_bytes > WHOLE_BYTES:
        with parts.workplace(tokens_root.absolute(), identity) as directory:
            tokenizer = encoding.vocabulary(directory, lambda: fixed or _trained(name, snapshot))
            sides = encoding.in_shards(snapshot.absolute(), directory, mapped)
            with manifest.staging(tokens_root) as staged:
                tokenizer.save(staged / "tokenizer")
                return write(staged, tokenizer, sides)
    tokenizer = fixed or _trained(name, snapshot)
    progress = Progress("tokenize", "encoded", num_bytes)
    with manifest.staging(tokens_root) as staged:
        tokenizer.save(staged / "tokenizer")
        with _encoder(tokenizer, staged / "tokenizer", processes or _processes_for(num_bytes)) as encoded:
            batched = {side: encoded(batches(_passages(snapshot, side, progress))) for side in SIDES}
            return write(staged, tokenizer, batched)


def _given(name: str, vocabulary: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that is there before the text is read; None for one that is trained on it."""
    if vocabulary is not None and vocabulary.name != name:
        raise ConfigError(
            f"corpus.tokenizer is {name!r}, but the vocabulary to be kept is {vocabulary.name!r}: set corpus.tokenizer "
            f"to {vocabulary.name!r}, or train.start_from to scratch."
        )
    return vocabulary or (None if name.startswith("bpe:") else get_tokenizer(name))


def _trained(name: str, snapshot: Path) -> Tokenizer:
    return train_bpe(_train_text(snapshot), int(name.removeprefix("bpe:")))


def encode_side(snapshot: Path, side: str, vocabulary: Path) -> Iterator[np.ndarray]:
    """The ids of one side of a snapshot, in parts, as `tokenize` writes them for the tokenizer saved in `vocabulary`.

    They are not kept: it is for looking at one text through the tokenizer of another. Raises TokenizerError.
    """
    processes = _processes_for((snapshot / f"{side}.txt").stat().st_size)
    with _encoder(Tokenizer.load(vocabulary), vocabulary, processes) as encoded:
        yield from encoded(batches(_passages(snapshot, side)))


def _passages(snapshot: Path, side: str, progress: Progress | None = None) -> Iterator[Iterator[str]]:
    """As `corpus.passages`, each in chunks of about a megabyte: one may be as long as the corpus."""
    from gptcore import corpus

    text = corpus.side_text(snapshot, side)
    with text.path.open("rb") as file:
        for length in np.diff(text.bounds).tolist():
            yield chunks(file, length, progress)


def chunks(file: IO[bytes], num_bytes: int, progress: Progress | None = None) -> Iterator[str]:
    """The next `num_bytes` of a file of UTF-8, about a megabyte at a time."""
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


def _train_text(snapshot: Path) -> Iterator[str]:
    return (piece for passage in _passages(snapshot, "train") for piece in pieces(passage))


def _identity(corpus_sha256: str, name: str, fixed: Tokenizer | None) -> str:
    """A trained vocabulary is a function of corpus, name and trainer, so it need not be trained to be found again."""
    vocabulary = fixed.sha256 if fixed else f"rustbpe {importlib.metadata.version('rustbpe')}"
    return manifest.sha256_of([corpus_sha256, name, vocabulary, TOKENS_VERSION])


def _about(corpus_sha256: str, identity: str, tokenizer: Tokenizer, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "sha256": identity,
        "corpus_sha256": corpus_sha256,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "n_vocab": tokenizer.n_vocab,
        "eot": tokenizer.eot,
        "dtype": dtype_of(tokenizer.n_vocab).name,
        "counts": counts,
    }


def dtype_of(n_vocab: int) -> np.dtype:
    """Of the ids on disk."""
    return np.dtype(np.uint16 if n_vocab <= 65_536 else np.uint32)


def write_ids(path: Path, parts: Iterable[np.ndarray]) -> int:
    """Writes the parts one after another, and returns how many ids they have."""
    count = 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part.data)
            count += len(part)
    return count


def batches(passages: Iterable[Iterable[str]], follows_another: bool = False) -> Iterator[Batch]:
    """About `_BATCH_CHARS` characters each, cut at the borders of `pieces`, so that batches can be encoded apart.

    `follows_another`: a passage stands before the first one, an end-of-text id between them.
    """
    batch: Batch = []
    size = 0
    for number, passage in enumerate(passages):
        batch += [None] if number or follows_another else []
        for piece in pieces(passage):
            batch.append(piece)
            size += len(piece)
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, batch: Batch) -> np.ndarray:
    """(tokens,) the ids of a batch, in the type that they have on disk."""
    dtype = dtype_of(tokenizer.n_vocab)
    separator = np.array([tokenizer.eot], dtype=dtype)
    parts = (separator if piece is None else tokenizer.encode_to_numpy(piece).astype(dtype) for piece in batch)
    return np.concatenate([np.empty(0, dtype=dtype), *parts])


def _processes_for(num_bytes: int) -> int:
    """One per `_BYTES_PER_PROCESS` of text and at most one per CPU: below twice that, starting a second costs more."""
    return max(1, min(cpus(), num_bytes // _BYTES_PER_PROCESS))


class _Encode:
    """Encodes batches in order: in this process, and by workers beside it, each busy with one batch."""

    def __init__(self, tokenizer: Tokenizer, workers: list[subprocess.Popen], threads: ThreadPoolExecutor) -> None:
        self._tokenizer, self._workers, self._threads = tokenizer, workers, threads
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        for worker in (None, *workers):  # None is a thread of this process, which is there at once
            self._idle.put(worker)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """(tokens,) arrays, one per batch. At most two batches per process are in memory."""
        if not self._workers:
            yield from (encode(self._tokenizer, batch) for batch in batches)
            return
        pending: deque[Future] = deque()
        for batch in batches:
            pending.append(self._threads.submit(self._ask, batch))
            if len(pending) >= 2 * (1 + len(self._workers)):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _ask(self, batch: Batch) -> np.ndarray:
        worker = self._idle.get()
        try:
            if worker is None:
                return encode(self._tokenizer, batch)
            pickle.dump(batch, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise RuntimeError(f"a tokenizing process ended early, with exit code {worker.wait()}") from None
        finally:
            self._idle.put(worker)


@contextlib.contextmanager
def _encoder(tokenizer: Tokenizer, saved: Path, processes: int) -> Iterator[_Encode]:
    """`saved` is the directory where the workers find the tokenizer. They are gone on exit."""
    command = [sys.executable, "-P", "-c", _WORKER, json.dumps(sys.path), str(saved.resolve())]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    workers: list[subprocess.Popen] = []
    threads = ThreadPoolExecutor(max_workers=processes)
    try:
        workers += [subprocess.Popen(command, **pipes) for _ in range(processes - 1)]
        yield _Encode(tokenizer, workers, threads)
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.wait()
            for pipe in filter(None, (worker.stdin, worker.stdout)):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _work(directory: str) -> None:
    """A worker's whole life: batches of text from standard input, arrays of ids to standard output."""
    tokenizer = Tokenizer.load(Path(directory))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            ids = encode(tokenizer, pickle.load(sys.stdin.buffer))
            pickle.dump(ids, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()

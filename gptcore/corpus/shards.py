"""Read a large corpus in shards: each shard becomes a committed directory, and these hold the corpus's documents.

    text.bin         the documents that are not blank, one after another
    blocks.bin       length and sha256 of each of their blocks
    documents.jsonl  every document: the values of its DocumentEntry, and whether it is blank

A shard is a list of files that are read together: about 16 MiB of text at most, unless a single file is larger. The
name of a shard directory follows from the shard, and its manifest says which bytes it was made from. So the next run
after a kill reuses the directory if the files are still the same. The shard directories are beside the snapshots while
a run makes one of them, and are removed afterwards. Child processes (gptcore/processes.py) or a cluster read the
shards.
"""

import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore import manifest
from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.documents import DocumentEntry, DocumentStore, MeasuredChunks, read_chunks, read_file
from gptcore.corpus.formats import ReadOptions
from gptcore.corpus.reading import Reading
from gptcore.corpus.sources import Document, File
from gptcore.errors import CheckpointError, CorpusError
from gptcore.records import open_lock

SHARD_BYTES = 16 * 1024 * 1024
"""About how much text a shard holds."""
WHOLE_BYTES = 256 * 1024 * 1024
"""Up to this much text is processed without shards: at 100 MB, two processes took longer with shards than without."""
SHARDS_VERSION = 3
"""Raised when equal files would give other shard directories."""

_TEXT, _BLOCKS, _DOCUMENTS = "text.bin", "blocks.bin", "documents.jsonl"
_BLOCK = np.dtype([("bytes", "<u4"), ("sha256", "V32")])
_MAX_FILES = 1000
_MAX_OPEN = 256
_CHUNK_BYTES = 1024 * 1024
_SCRATCH = "scratch"
_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Shard:
    """Files that are read together."""

    files: tuple[File, ...]
    options: ReadOptions
    block_bytes: int
    work_directory: Path
    """Holds the shard directories of one corpus."""

    @property
    def num_bytes(self) -> int:
        """Size of the files, compressed or not."""
        return sum(file.num_bytes for file in self.files)

    @property
    def directory(self) -> Path:
        """The directory that the shard becomes."""
        files = [[file.source, file.name, file.filename, file.location] for file in self.files]
        return (
            self.work_directory
            / manifest.sha256_of([SHARDS_VERSION, *astuple(self.options), self.block_bytes, files])[:16]
        )


def plan_shards(files: Iterable[File], options: ReadOptions, block_bytes: int, work_directory: Path) -> list[Shard]:
    """Divide the files, in their order, into shards."""
    shards: list[list[File]] = []
    room = 0
    for file in files:
        room -= file.num_bytes
        if not shards or room < 0 or len(shards[-1]) == _MAX_FILES:
            shards.append([])
            room = SHARD_BYTES - file.num_bytes
        shards[-1].append(file)
    return [Shard(tuple(chosen), options, block_bytes, work_directory) for chosen in shards]


@contextmanager
def lock_work_directory(parent: Path, key: str) -> Iterator[Path]:
    """Lock a directory for shard directories inside `parent`, the same one for the same key.

    The directory is removed if the context ends without an error. If another run holds the lock, this waits. The
    directory of a killed run is swept up after a day.
    """
    directory = parent / f"{manifest.TEMPORARY}parts-{key[:16]}"
    with ExitStack() as stack:
        stack.enter_context(_lock_directory(directory))
        yield directory
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _lock_directory(directory: Path) -> Iterator[None]:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), open_lock(directory / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # 0 if the former lock holder has removed the directory
                yield
                return


def read_shard(shard: Shard) -> Path:
    """Return the shard directory. It is made unless it exists already. Memory does not grow with the texts.

    Files that cannot be used are counted in the manifest. Raises SourceUnavailable if a storage does not answer.
    """
    scratch = shard.work_directory / _SCRATCH
    scratch.mkdir(exist_ok=True)
    if manifest.is_committed(shard.directory) and not _is_current(shard, scratch):
        manifest.remove(shard.directory)

    def fill(staged: Path) -> dict[str, Any]:
        states, reading = _write_shard(shard, staged, scratch)
        return {"kind": "part", "states": states, "reading": reading.to_json()}

    return manifest.make_once(shard.directory, fill)


def _is_current(shard: Shard, scratch: Path) -> bool:
    try:
        return manifest.read_about(shard.directory)["states"] == [_read_state(file, scratch) for file in shard.files]
    except CheckpointError:
        return False


def _read_state(file: File, scratch: Path) -> str:
    """Return what identifies the file's content: the state that its storage gives, or the hash of its bytes."""
    if file.state:
        return file.state
    try:
        with file.open(scratch) as content:
            return _hash_content(content)
    except CorpusError:
        return _UNREADABLE


def _hash_content(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _write_shard(shard: Shard, staged: Path, scratch: Path) -> tuple[list[str], Reading]:
    """Fill a shard directory. Return the states of the files as they were read, and what became of the files."""
    states, reading = [], Reading()
    with (
        (staged / _TEXT).open("wb") as text,
        (staged / _BLOCKS).open("wb") as blocks,
        (staged / _DOCUMENTS).open("w") as lines,
    ):

        def append(document: Document) -> str:
            return _append_document(document, shard.block_bytes, text=text, blocks=blocks)

        for number, file in enumerate(shard.files):
            ends = text.tell(), blocks.tell()
            states.append(file.state or _UNREADABLE)

            def examine(content: IO[bytes], number: int = number, state: str = file.state) -> None:
                states[number] = state or _hash_content(content)

            entries = read_file(file, scratch, shard.options, reading, append, examine)
            if entries is None:
                _truncate((text, blocks), ends)
            lines.writelines(entries or ())
    return states, reading


def _append_document(document: Document, block_bytes: int, text: IO[bytes], blocks: IO[bytes]) -> str:
    """Append a document's text and blocks to the files. Return its line of the list of documents."""
    ends = text.tell(), blocks.tell()
    chunks = MeasuredChunks(document.chunks)
    for data in cut_blocks(chunks, block_bytes):
        text.write(data)
        blocks.write(len(data).to_bytes(4, "little") + hashlib.sha256(data).digest())
    if chunks.is_blank:
        _truncate((text, blocks), ends)
    return json.dumps([*chunks.make_entry(document, ends[0]), chunks.is_blank]) + "\n"


def _truncate(files: Sequence[IO[bytes]], ends: Sequence[int]) -> None:
    for file, end in zip(files, ends):
        file.seek(end)
        file.truncate()


class ShardDocuments(DocumentStore):
    """The documents of several shard directories. Offsets continue from one directory to the next, as in one file."""

    def __init__(self, directories: Sequence[Path], keeps_copies: bool = False) -> None:
        super().__init__(keeps_copies)
        self._directories = directories
        self._offsets: list[int] = []
        self._open_shards: dict[int, _OpenShard] = {}
        offset = 0
        for directory in directories:
            self.reading.merge(Reading.from_json(manifest.read_about(directory)["reading"]))
            self._offsets.append(offset)
            with (directory / _DOCUMENTS).open() as lines:
                for *values, is_blank in map(json.loads, lines):
                    document = DocumentEntry(*values)
                    self.add(document._replace(offset=offset + document.offset), is_blank)
            offset += (directory / _TEXT).stat().st_size

    def read_chunks(self, start: int, end: int) -> Iterator[bytes]:
        """See `DocumentStore`."""
        shard, offset = self._open_shard_at(start)
        return read_chunks(shard.text, start - offset, end - offset)

    def read_blocks(self, document: DocumentEntry, block_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """See `DocumentStore`. The blocks were cut when the shard was read."""
        shard, offset = self._open_shard_at(document.offset)
        return shard.read_blocks(document.offset - offset, document.bytes)

    def close(self) -> None:
        """Close all files."""
        while self._open_shards:
            self._open_shards.popitem()[1].text.close()

    def _open_shard_at(self, offset: int) -> "tuple[_OpenShard, int]":
        """Return the shard that holds this offset, open, and the offset at which the shard begins."""
        number = bisect_right(self._offsets, offset) - 1
        if number not in self._open_shards:
            if len(self._open_shards) == _MAX_OPEN:
                self._open_shards.pop(next(iter(self._open_shards))).text.close()
            self._open_shards[number] = _OpenShard(self._directories[number])
        return self._open_shards[number], self._offsets[number]


class _OpenShard:
    """The open text of one shard directory, with the places of its blocks."""

    def __init__(self, directory: Path) -> None:
        self.text = (directory / _TEXT).open("rb")
        self._blocks = np.fromfile(directory / _BLOCKS, _BLOCK)
        self._starts = np.cumsum(self._blocks["bytes"], dtype=np.int64) - self._blocks["bytes"]

    def read_blocks(self, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        first, last = np.searchsorted(self._starts, [start, start + size]).tolist()
        self.text.seek(start)
        for length, digest in self._blocks[first:last].tolist():
            yield self.text.read(length), digest

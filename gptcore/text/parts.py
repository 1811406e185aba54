"""A large corpus read in shards: what each gave is a part, a committed directory, and the parts are its documents.

    text.bin         the documents that are not blank, one after another
    blocks.bin       length and sha256 of each of their blocks
    documents.jsonl  every document: name, source, sha256, bytes, characters, whether it is blank

A shard is a list of files, at most about 16 MiB of them unless a single one is larger. A part is named by its shard,
and says which bytes it was made from, so that the next run after a kill takes it over if they are still the same. Parts
lie beside the snapshots while one is made of them, and are gone afterwards.
"""

import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from gptcore import manifest
from gptcore.errors import CheckpointError
from gptcore.text.formats import Errors
from gptcore.text.sources import Document, File
from gptcore.text.split import cut
from gptcore.text.spool import Documents, Measured, Spooled, pieces
from gptcore.text.workers import SHARD_BYTES

PARTS_VERSION = 1
"""Raised when equal files would give other parts."""

_TEXT, _BLOCKS, _DOCUMENTS = "text.bin", "blocks.bin", "documents.jsonl"
_BLOCK = np.dtype([("bytes", "<u4"), ("sha256", "V32")])
_MOST_FILES = 1000
_MOST_OPEN = 256
_PIECE_BYTES = 1024 * 1024
_SCRATCH = "scratch"


@dataclass(frozen=True)
class Shard:
    """Files that are read together."""

    files: tuple[File, ...]
    errors: Errors
    block_bytes: int
    directory: Path
    """Where the part belongs."""

    @property
    def num_bytes(self) -> int:
        """Of the files as they are."""
        return sum(file.num_bytes for file in self.files)

    @property
    def part(self) -> Path:
        """The directory that the shard becomes."""
        what = [[file.source, file.name, file.filename, file.where] for file in self.files]
        return self.directory / manifest.sha256_of([PARTS_VERSION, self.errors, self.block_bytes, what])[:16]


def plan(files: Iterable[File], errors: Errors, block_bytes: int, directory: Path) -> list[Shard]:
    """The files in their order, in shards."""
    shards: list[list[File]] = []
    room = 0
    for file in files:
        room -= file.num_bytes
        if not shards or room < 0 or len(shards[-1]) == _MOST_FILES:
            shards.append([])
            room = SHARD_BYTES - file.num_bytes
        shards[-1].append(file)
    return [Shard(tuple(chosen), errors, block_bytes, directory) for chosen in shards]


@contextmanager
def workplace(parent: Path, key: str) -> Iterator[Path]:
    """A directory for parts inside `parent`, the same one for the same key, removed when all went well.

    Where another run works in it, this waits. What a killed one leaves is swept up after a day.
    """
    directory = parent / f"{manifest.TEMPORARY}parts-{key[:16]}"
    with ExitStack() as stack:
        stack.enter_context(_locked(directory))
        yield directory
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else whoever held it has removed the directory
                yield
                return


def read(shard: Shard) -> Path:
    """The shard's part, made unless it is there. Memory does not grow with the shard.

    Raises CorpusError where a file cannot be used, SourceUnavailable where a storage does not answer.
    """
    scratch = shard.directory / _SCRATCH
    scratch.mkdir(exist_ok=True)
    if manifest.is_committed(shard.part):
        if _is_good(shard, scratch):
            return shard.part
        manifest.remove(shard.part)
    with manifest.staging(shard.directory) as staged:
        states = _write(shard, staged, scratch)
        manifest.commit(staged, shard.part, {"kind": "part", "states": states})
    return shard.part


def _is_good(shard: Shard, scratch: Path) -> bool:
    try:
        return manifest.verify(shard.part)["states"] == [_state(file, scratch) for file in shard.files]
    except CheckpointError:
        return False


def _state(file: File, scratch: Path) -> str:
    """What a file's content is known by: what its storage says, or the hash of its bytes."""
    if file.state:
        return file.state
    with file.open(scratch) as opened:
        return _digest(opened)


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _write(shard: Shard, staged: Path, scratch: Path) -> list[str]:
    """Fills a part, and returns the states of the files as they were read."""
    states = []
    with (
        (staged / _TEXT).open("wb") as text,
        (staged / _BLOCKS).open("wb") as blocks,
        (staged / _DOCUMENTS).open("w") as lines,
    ):
        for file in shard.files:
            with file.open(scratch) as opened:
                states.append(file.state or _digest(opened))
                opened.seek(0)
                for document in file.read(opened, shard.errors):
                    _add(document, shard.block_bytes, text, blocks, lines)
    return states


def _add(document: Document, block_bytes: int, text: IO[bytes], blocks: IO[bytes], lines: IO[str]) -> None:
    offset, first_block = text.tell(), blocks.tell()
    measured = Measured(document.chunks)
    for data in cut(measured, block_bytes):
        text.write(data)
        blocks.write(len(data).to_bytes(4, "little") + hashlib.sha256(data).digest())
    spooled = measured.spooled(document, offset)
    if measured.is_blank:
        for file, end in ((text, offset), (blocks, first_block)):
            file.seek(end)
            file.truncate()
    lines.write(json.dumps([*spooled, measured.is_blank]) + "\n")


class Parts(Documents):
    """The documents of several parts, as those of one file would be: offsets run on from part to part."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._paths = paths
        self._offsets: list[int] = []
        self._opened: dict[int, _Part] = {}
        offset = 0
        for path in paths:
            self._offsets.append(offset)
            with (path / _DOCUMENTS).open() as lines:
                for name, source, sha256, start, size, chars, is_blank in map(json.loads, lines):
                    self.take(Spooled(name, source, sha256, offset + start, size, chars), is_blank)
            offset += (path / _TEXT).stat().st_size

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """See `Documents`."""
        part, offset = self._part_at(start)
        return pieces(part.text, start - offset, end - offset)

    def blocks(self, document: Spooled, block_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """See `Documents`. They were cut when the part was made."""
        part, offset = self._part_at(document.offset)
        return part.blocks(document.offset - offset, document.bytes)

    def close(self) -> None:
        """Closes all files."""
        while self._opened:
            self._opened.popitem()[1].text.close()

    def _part_at(self, offset: int) -> "tuple[_Part, int]":
        number = bisect_right(self._offsets, offset) - 1
        if number not in self._opened:
            if len(self._opened) == _MOST_OPEN:
                self._opened.pop(next(iter(self._opened))).text.close()
            self._opened[number] = _Part(self._paths[number])
        return self._opened[number], self._offsets[number]


class _Part:
    """One part, opened."""

    def __init__(self, path: Path) -> None:
        self.text = (path / _TEXT).open("rb")
        self._blocks = np.fromfile(path / _BLOCKS, _BLOCK)
        self._starts = np.cumsum(self._blocks["bytes"], dtype=np.int64) - self._blocks["bytes"]

    def blocks(self, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
        first, last = np.searchsorted(self._starts, [start, start + size]).tolist()
        self.text.seek(start)
        for length, digest in self._blocks[first:last].tolist():
            yield self.text.read(length), digest

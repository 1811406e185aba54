"""The documents of a corpus one after another: what was read once is what is hashed and used.

A corpus that one process reads is spooled into one temporary file. What several have read stands in parts.py.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptcore.progress import Progress
from gptcore.text.sources import Document
from gptcore.text.split import cut

_PIECE_BYTES = 1024 * 1024


class Spooled(NamedTuple):
    """A document, `bytes` long from `offset`."""

    name: str
    source: str
    sha256: str
    offset: int
    bytes: int
    chars: int


class Documents:
    """The documents that have text and are no exact copy of an earlier one, and what was left out."""

    def __init__(self) -> None:
        self.documents: list[Spooled] = []
        self.dropped: Counter[str] = Counter()
        """empty_documents, duplicate_documents, duplicate_bytes."""
        self._totals: dict[str, Counter[str]] = {}
        self._seen: set[str] = set()

    def take(self, document: Spooled, is_blank: bool) -> bool:
        """Counts the next document that was read, and says whether it is one of the corpus."""
        self._totals.setdefault(document.source, Counter()).update(documents=1, bytes=document.bytes)
        if is_blank:
            self.dropped.update(empty_documents=1)
        elif document.sha256 in self._seen:
            self.dropped.update(duplicate_documents=1, duplicate_bytes=document.bytes)
        else:
            self._seen.add(document.sha256)
            self.documents.append(document)
            return True
        return False

    @property
    def per_source(self) -> list[dict[str, Any]]:
        """For every source the number of documents and bytes that were read, before anything was left out."""
        return [{"source": source, **counts} for source, counts in self._totals.items()]

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes between two offsets of one document, in pieces of at most 1 MiB."""
        raise NotImplementedError

    def blocks(self, document: Spooled, block_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """The document's blocks, as `split.cut` cuts them, each with its sha256."""
        for data in cut(self.pieces(document.offset, document.offset + document.bytes), block_bytes):
            yield data, hashlib.sha256(data).digest()

    def byte_offset(self, document: Spooled, chars: int) -> int:
        """The offset at which the document's character number `chars` begins."""
        offset, end = document.offset, document.offset + document.bytes
        if chars >= document.chars:
            return end
        for piece in self.pieces(offset, end) if chars else ():
            starts = character_starts(piece)
            if chars < len(starts):
                return offset + int(starts[chars])
            chars -= len(starts)
            offset += len(piece)
        return offset

    def write_list(self, path: Path) -> None:
        """One JSON line per document: name, source, sha256, bytes."""
        with path.open("w") as lines:
            for one in self.documents:
                entry = {"name": one.name, "source": one.source, "sha256": one.sha256, "bytes": one.bytes}
                lines.write(json.dumps(entry) + "\n")


class Spool(Documents):
    """What one process has read, in one file."""

    def __init__(self, file: IO[bytes], read: Iterable[Document]) -> None:
        """Writes every document into the empty `file`, and takes it back where it is blank or a copy."""
        super().__init__()
        self._file = file
        progress = Progress("ingest", "read")
        for document in read:
            offset, measured = file.tell(), Measured(document.chunks)
            for chunk in measured:
                file.write(chunk)
                progress.add(len(chunk))
            if not self.take(measured.spooled(document, offset), measured.is_blank):
                file.seek(offset)
                file.truncate()

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """See `Documents`."""
        return pieces(self._file, start, end)


class Measured:
    """The pieces of a document as they pass by, and what they are together."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._digest = hashlib.sha256()
        self._bytes = self._chars = 0
        self.is_blank = True

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.is_blank = self.is_blank and chunk.decode().isspace()
            self._chars += len(character_starts(chunk))
            self._bytes += len(chunk)
            self._digest.update(chunk)
            yield chunk

    def spooled(self, document: Document, offset: int) -> Spooled:
        """The document, once all of it has passed, at an offset."""
        sha256 = self._digest.hexdigest()
        return Spooled(document.name, document.source, sha256, offset, self._bytes, self._chars)


def pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes of `file` between two offsets, in pieces of at most 1 MiB."""
    while start < end:
        file.seek(start)
        piece = file.read(min(_PIECE_BYTES, end - start))
        start += len(piece)
        yield piece


def character_starts(chunk: bytes) -> npt.NDArray[np.int64]:
    """Where the characters of a piece of UTF-8 begin."""
    return np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)

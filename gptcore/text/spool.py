"""All documents of a corpus one after another in one temporary file: what was read once is what is hashed and used."""

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

_PIECE_BYTES = 1024 * 1024


class Spooled(NamedTuple):
    """A document in the file, `bytes` long from `offset`."""

    name: str
    source: str
    sha256: str
    offset: int
    bytes: int
    chars: int


class Spool:
    """The documents that have text and are no exact copy of an earlier one, and what was left out."""

    def __init__(self, file: IO[bytes], read: Iterable[Document]) -> None:
        """Writes every document into the empty `file`, and takes it back where it is blank or a copy."""
        self._file = file
        self.documents: list[Spooled] = []
        self.dropped: Counter[str] = Counter()
        """empty_documents, duplicate_documents, duplicate_bytes."""
        self._totals: dict[str, Counter[str]] = {}
        self._progress = Progress("ingest", "read")
        seen: set[str] = set()
        for document in read:
            spooled, is_blank = self._write(document)
            self._totals.setdefault(document.source, Counter()).update(documents=1, bytes=spooled.bytes)
            if not is_blank and spooled.sha256 not in seen:
                seen.add(spooled.sha256)
                self.documents.append(spooled)
                continue
            file.seek(spooled.offset)
            file.truncate()
            if is_blank:
                self.dropped.update(empty_documents=1)
            else:
                self.dropped.update(duplicate_documents=1, duplicate_bytes=spooled.bytes)

    @property
    def per_source(self) -> list[dict[str, Any]]:
        """For every source the number of documents and bytes that were read, before anything was left out."""
        return [{"source": source, **counts} for source, counts in self._totals.items()]

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes of the file between two offsets."""
        return pieces(self._file, start, end)

    def byte_offset(self, document: Spooled, chars: int) -> int:
        """The offset at which the document's character number `chars` begins."""
        offset, end = document.offset, document.offset + document.bytes
        for piece in self.pieces(offset, end):
            starts = _character_starts(piece)
            if chars < len(starts):
                return offset + int(starts[chars])
            chars -= len(starts)
            offset += len(piece)
        return end

    def write_list(self, path: Path) -> None:
        """One JSON line per document: name, source, sha256, bytes."""
        with path.open("w") as lines:
            for one in self.documents:
                entry = {"name": one.name, "source": one.source, "sha256": one.sha256, "bytes": one.bytes}
                lines.write(json.dumps(entry) + "\n")

    def _write(self, document: Document) -> tuple[Spooled, bool]:
        offset, chars, is_blank = self._file.tell(), 0, True
        digest = hashlib.sha256()
        for chunk in document.chunks:
            is_blank = is_blank and chunk.decode().isspace()
            chars += len(_character_starts(chunk))
            digest.update(chunk)
            self._file.write(chunk)
            self._progress.add(len(chunk))
        size = self._file.tell() - offset
        return Spooled(document.name, document.source, digest.hexdigest(), offset, size, chars), is_blank


def pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes of `file` between two offsets, in pieces of at most 1 MiB."""
    while start < end:
        file.seek(start)
        piece = file.read(min(_PIECE_BYTES, end - start))
        start += len(piece)
        yield piece


def _character_starts(chunk: bytes) -> npt.NDArray[np.int64]:
    return np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)

"""Keep the documents of a corpus, one after another: the bytes that are read once are then hashed and used.

If one process reads a corpus, its documents are spooled into one temporary file (`Spool`). Documents that several
processes have read are in shards.py.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.normalize import MIN_VIEW_BYTES, normalize
from gptcore.corpus.sources import Document
from gptcore.progress import Progress

_CHUNK_BYTES = 1024 * 1024


class DocumentEntry(NamedTuple):
    """A document that was read: where its text is, and what identifies it."""

    name: str
    source: str
    sha256: str
    offset: int
    bytes: int
    chars: int
    view_sha256: str
    """Hash of the text's view (normalize.py). Empty if the view is too short to tell a copy from a coincidence."""
    is_copy: bool = False
    """Whether the document is a copy of another one, perhaps in another form."""


class DocumentStore:
    """The documents that have text, with counts of those left out. Copies are left out unless `keeps_copies`.

    Subclasses say where the text is: they implement `read_chunks`.
    """

    def __init__(self, keeps_copies: bool) -> None:
        self._keeps_copies = keeps_copies
        self.entries: list[DocumentEntry] = []
        self.dropped: Counter[str] = Counter()
        """empty_documents, duplicate_documents, duplicate_bytes."""
        self._totals: dict[str, Counter[str]] = {}
        self._seen: set[str] = set()

    def add(self, document: DocumentEntry, is_blank: bool) -> bool:
        """Count the next document. Keep it unless it is blank or an exact copy, and return whether it was kept."""
        self._totals.setdefault(document.source, Counter()).update(documents=1, bytes=document.bytes)
        if is_blank:
            self.dropped.update(empty_documents=1)
        elif document.sha256 in self._seen and not self._keeps_copies:
            self.dropped.update(duplicate_documents=1, duplicate_bytes=document.bytes)
        else:
            self._seen.add(document.sha256)
            self.entries.append(document)
            return True
        return False

    def drop_or_mark_copies(self) -> None:
        """Drop the documents that are copies of another one in another form, or mark them if copies are kept.

        Call this once, after all calls of `add`. Documents with the same view are copies of one text. The shortest of
        them is the original, because added indents and quoting marks make a copy longer. Of several shortest ones, the
        original is the one with the smallest hash. So the order of the documents does not matter.
        """
        originals: dict[str, DocumentEntry] = {}
        for document in self.entries:
            original = originals.setdefault(document.view_sha256 or document.sha256, document)
            if (document.bytes, document.sha256) < (original.bytes, original.sha256):
                originals[document.view_sha256 or document.sha256] = document
        kept = []
        for document in self.entries:
            is_copy = originals[document.view_sha256 or document.sha256] is not document
            if is_copy and not self._keeps_copies:
                self.dropped.update(duplicate_documents=1, duplicate_bytes=document.bytes)
            else:
                kept.append(document._replace(is_copy=is_copy))
        self.entries = kept

    @property
    def per_source(self) -> list[dict[str, Any]]:
        """The number of documents and bytes that were read from each source, before any document was left out."""
        return [{"source": source, **counts} for source, counts in self._totals.items()]

    def read_chunks(self, start: int, end: int) -> Iterator[bytes]:
        """Read the bytes between two offsets of one document, in chunks of at most 1 MiB."""
        raise NotImplementedError

    def read_blocks(self, document: DocumentEntry, block_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield the document's blocks as (bytes, sha256). `blocks.cut_blocks` decides where they end."""
        for data in cut_blocks(self.read_chunks(document.offset, document.offset + document.bytes), block_bytes):
            yield data, hashlib.sha256(data).digest()

    def find_byte_offset(self, document: DocumentEntry, chars: int) -> int:
        """Return the offset at which the document's character number `chars` begins."""
        offset, end = document.offset, document.offset + document.bytes
        if chars >= document.chars:
            return end
        for chunk in self.read_chunks(offset, end) if chars else ():
            starts = find_character_starts(chunk)
            if chars < len(starts):
                return offset + int(starts[chars])
            chars -= len(starts)
            offset += len(chunk)
        return offset

    def write_list(self, path: Path) -> None:
        """Write one JSON line per document: name, source, sha256, bytes."""
        with path.open("w") as lines:
            for entry in self.entries:
                line = {"name": entry.name, "source": entry.source, "sha256": entry.sha256, "bytes": entry.bytes}
                lines.write(json.dumps(line) + "\n")


class Spool(DocumentStore):
    """The documents that one process has read, in one file."""

    def __init__(self, file: IO[bytes], documents: Iterable[Document], keeps_copies: bool = False) -> None:
        """Write every document into the empty `file`, and remove it from the file again if `add` does not keep it."""
        super().__init__(keeps_copies)
        self._file = file
        progress = Progress("ingest", "read")
        for document in documents:
            offset, chunks = file.tell(), MeasuredChunks(document.chunks)
            for chunk in chunks:
                file.write(chunk)
                progress.add(len(chunk))
            if not self.add(chunks.make_entry(document, offset), chunks.is_blank):
                file.seek(offset)
                file.truncate()
        self.drop_or_mark_copies()

    def read_chunks(self, start: int, end: int) -> Iterator[bytes]:
        """See `DocumentStore`."""
        return read_chunks(self._file, start, end)


class MeasuredChunks:
    """The chunks of a document. Iterating over them measures the document: its size, characters and hash."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._digest, self._view_digest = hashlib.sha256(), hashlib.sha256()
        self._bytes = self._chars = self._view_bytes = 0
        self.is_blank = True

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.is_blank = self.is_blank and chunk.decode().isspace()
            self._chars += len(find_character_starts(chunk))
            self._bytes += len(chunk)
            self._digest.update(chunk)
            view = normalize(chunk)
            self._view_bytes += len(view)
            self._view_digest.update(view)
            yield chunk

    def make_entry(self, document: Document, offset: int) -> DocumentEntry:
        """Return the entry of the document, whose text begins at `offset`. All chunks must have been read."""
        view_sha256 = self._view_digest.hexdigest() if self._view_bytes >= MIN_VIEW_BYTES else ""
        sha256 = self._digest.hexdigest()
        return DocumentEntry(document.name, document.source, sha256, offset, self._bytes, self._chars, view_sha256)


def read_chunks(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Read the bytes of `file` between two offsets, in chunks of at most 1 MiB."""
    while start < end:
        file.seek(start)
        chunk = file.read(min(_CHUNK_BYTES, end - start))
        start += len(chunk)
        yield chunk


def find_character_starts(chunk: bytes) -> npt.NDArray[np.int64]:
    """Return (characters,): the offsets at which the characters of a chunk of UTF-8 begin."""
    return np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)

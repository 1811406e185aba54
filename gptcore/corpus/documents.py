"""Keep the documents of a corpus, one after another: the bytes that are read once are then hashed and used.

If one process reads a corpus, its documents are spooled into one temporary file (`Spool`). Documents that several
processes have read are in shards.py.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.encoding import count_replaced, counting
from gptcore.corpus.formats import ReadOptions
from gptcore.corpus.normalize import MIN_VIEW_BYTES, normalize
from gptcore.corpus.reading import Reading
from gptcore.corpus.rows import MissingColumn
from gptcore.corpus.secrets import SecretFinder
from gptcore.corpus.sources import Document, File
from gptcore.errors import CorpusError
from gptcore.progress import Progress

T = TypeVar("T")

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
    suffix: str
    """The suffix of its file, under which reports count it."""
    is_copy: bool = False
    """Whether the document is a copy of another one, perhaps in another form."""


class DocumentStore:
    """The documents that have text, with counts of those left out. Copies are left out unless `keeps_copies`.

    Subclasses say where the text is: they implement `read_chunks`.
    """

    def __init__(self, keeps_copies: bool) -> None:
        self._keeps_copies = keeps_copies
        self.reading = Reading()
        """What became of the files and documents."""
        self.entries: list[DocumentEntry] = []
        self.dropped: Counter[str] = Counter()
        """empty_documents, duplicate_documents, duplicate_bytes."""
        self._totals: dict[str, Counter[str]] = {}
        self._seen: set[str] = set()

    def add(self, document: DocumentEntry, is_blank: bool) -> None:
        """Count the next document, and keep it unless it is blank or an exact copy."""
        self._totals.setdefault(document.source, Counter()).update(documents=1, bytes=document.bytes)
        self.reading.count(document.suffix, documents=1)
        if is_blank:
            self.dropped.update(empty_documents=1)
            self.reading.count(document.suffix, empty=1)
        elif document.sha256 in self._seen and not self._keeps_copies:
            self._drop_copy(document)
        else:
            self._seen.add(document.sha256)
            self.entries.append(document)

    def _drop_copy(self, document: DocumentEntry) -> None:
        self.dropped.update(duplicate_documents=1, duplicate_bytes=document.bytes)
        self.reading.count(document.suffix, duplicate=1)

    def drop_or_mark_copies(self, known: Collection[str] = ()) -> None:
        """Drop the documents that are copies of another one in another form, or mark them if copies are kept.

        Call this once, after all calls of `add`. Documents with the same view are copies of one text. A document whose
        hash is `known` is the original, so that its blocks keep their sides when a copy is added. Else it is the
        shortest one, because added indents and quoting marks make a copy longer. Of several shortest ones, the original
        is the one with the smallest hash. So the order of the documents does not matter.
        """

        def rank(document: DocumentEntry) -> tuple[bool, int, str]:
            return document.sha256 not in known, document.bytes, document.sha256

        originals: dict[str, DocumentEntry] = {}
        for document in self.entries:
            original = originals.setdefault(document.view_sha256 or document.sha256, document)
            if rank(document) < rank(original):
                originals[document.view_sha256 or document.sha256] = document
        kept = []
        for document in self.entries:
            is_copy = originals[document.view_sha256 or document.sha256] is not document
            if is_copy and not self._keeps_copies:
                self._drop_copy(document)
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


class Spool(DocumentStore):
    """The documents that one process has read, in one file."""

    def __init__(
        self,
        text: IO[bytes],
        files: Iterable[File],
        options: ReadOptions,
        scratch: Path,
        keeps_copies: bool = False,
    ) -> None:
        """Write every document of the files into the empty file `text`. Copies of large files are put into `scratch`.

        Raises SourceUnavailable if a storage does not answer. Files that cannot be used are counted in `reading`.
        """
        super().__init__(keeps_copies)
        self._file = text
        progress = Progress("ingest", "read")

        def append(document: Document) -> tuple[DocumentEntry, bool]:
            offset, chunks = text.tell(), MeasuredChunks(document.chunks)
            for chunk in chunks:
                text.write(chunk)
                progress.add(len(chunk))
            if chunks.is_blank:
                text.seek(offset)
                text.truncate()
            return chunks.make_entry(document, offset), chunks.is_blank

        for file in files:
            start = text.tell()
            read = read_file(file, scratch, options, self.reading, append)
            if read is None:
                text.seek(start)
                text.truncate()
            for entry, is_blank in read or ():
                self.add(entry, is_blank)

    def read_chunks(self, start: int, end: int) -> Iterator[bytes]:
        """See `DocumentStore`."""
        return read_chunks(self._file, start, end)


def read_file(
    file: File,
    scratch: Path,
    options: ReadOptions,
    reading: Reading,
    append: Callable[[Document], T],
    examine: Callable[[IO[bytes]], None] = lambda content: None,
) -> list[T] | None:
    """Call `append` for each document of a file, and return the results. None if the file cannot be used.

    `examine` is called first, with the open file. A file is used as a whole or not at all: the caller must forget what
    `append` did if the result is None. The file is counted in `reading`. A table that does not have the wanted column
    is not meant as text if its directory or a glob led to it. Raises SourceUnavailable if a storage does not answer.
    """
    options = replace(options, errors=counting(options.errors))
    replaced = count_replaced()
    done: list[T] = []
    secrets: list[tuple[str, int, str]] = []
    try:
        with file.open(scratch) as content:
            examine(content)
            content.seek(0)
            for document in file.read_documents(content, options):
                finder = SecretFinder()
                searched = Document(document.name, document.source, finder.search(document.chunks), document.suffix)
                done.append(append(searched))
                secrets += [(document.name, line, kind) for line, kind in finder.found.items()]
    except CorpusError as error:
        is_foreign = isinstance(error, MissingColumn) and not file.is_named and not done
        reading.add_problem(file.suffix, str(error), is_foreign)
        return None
    reading.count(file.suffix, read=1, replaced=count_replaced() - replaced)
    for name, line, kind in secrets:
        reading.add_secret(kind, f"{name} line {line:,}")
    return done


class MeasuredChunks:
    """The chunks of a document. Iterating over them measures the document: its size, characters and hash."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._digest, self._view_digest = hashlib.sha256(), hashlib.sha256()
        self._bytes = self._chars = self._view_bytes = 0
        self.is_blank = True

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            view = normalize(chunk)
            # Text with a view has letters, digits or symbols, so only text without one has to be decoded.
            self.is_blank = self.is_blank and not view and chunk.decode().isspace()
            self._chars += _count_characters(chunk)
            self._bytes += len(chunk)
            self._digest.update(chunk)
            self._view_bytes += len(view)
            self._view_digest.update(view)
            yield chunk

    def make_entry(self, document: Document, offset: int) -> DocumentEntry:
        """Return the entry of the document, whose text begins at `offset`. All chunks must have been read."""
        view_sha256 = self._view_digest.hexdigest() if self._view_bytes >= MIN_VIEW_BYTES else ""
        sha256 = self._digest.hexdigest()
        return DocumentEntry(
            name=document.name,
            source=document.source,
            sha256=sha256,
            offset=offset,
            bytes=self._bytes,
            chars=self._chars,
            view_sha256=view_sha256,
            suffix=document.suffix,
        )


def read_chunks(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Read the bytes of `file` between two offsets, in chunks of at most 1 MiB."""
    while start < end:
        file.seek(start)
        chunk = file.read(min(_CHUNK_BYTES, end - start))
        start += len(chunk)
        yield chunk


def _count_characters(chunk: bytes) -> int:
    if chunk.isascii():
        return len(chunk)
    return int(np.count_nonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80))


def find_character_starts(chunk: bytes) -> npt.NDArray[np.int64]:
    """Return (characters,): the offsets at which the characters of a chunk of UTF-8 begin."""
    return np.flatnonzero((np.frombuffer(chunk, np.uint8) & 0xC0) != 0x80)

"""From the bytes of one file to documents: plain text, JSON lines, CSV and Parquet, as they are or compressed.

The rule for text stands here: it is UTF-8, and apart from bytes that are not (an error naming the place, or U+FFFD)
everything goes through byte for byte: byte order marks, NULs and CRLF too. Text is handed on in pieces, so that a file
of any size needs little memory, however much it unfolds to. Only a row of a table is held as a whole, and is limited
for that. Where files come from is the business of sources.py.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from gptcore.errors import CorpusError

Errors = Literal["strict", "replace"]
Texts = Iterator[tuple[str, Iterator[bytes]]]
"""Documents as (name, pieces of UTF-8 that end at whole characters)."""

PIECE_BYTES = 256 * 1024
MAX_ROW_BYTES = 128 * 1024 * 1024
"""Of one line of JSON, or one row of CSV: it is read at once."""
TEXT_COLUMN = "text"
_COMPRESSED = (".gz", ".zst")
_ZSTD_READ_BYTES = 4096  # a piece of this size cannot unfold to more than about 128 MiB
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CURE = "save it as UTF-8, or set corpus.errors: replace."


def is_known(filename: str) -> bool:
    """Whether the suffix is one that directories are searched for: .txt .md .jsonl .csv .parquet, also .gz or .zst."""
    return _kind(filename) in _READERS


def read(file: BinaryIO, name: str, filename: str, errors: Errors) -> Texts:
    """The documents in `file`, in order; the suffix of `filename` says how to read it, unknown ones as plain text.

    `name` is what messages and documents are called. A document's pieces must be consumed before the next is asked
    for. Raises CorpusError where the file is damaged, has no column `text`, or is not UTF-8 and `errors` is strict.
    """
    return _READERS.get(_kind(filename), _plain)(_expanded(file, name, filename), name, errors)


def pieces(text: str, name: str, errors: Errors) -> Iterator[bytes]:
    """`text` as UTF-8 in pieces of at most 1 MiB. A lone surrogate, possible in JSON, counts as an invalid byte."""
    for start in range(0, len(text), PIECE_BYTES):
        piece = text[start : start + PIECE_BYTES]
        try:
            yield piece.encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                where = f"character {start + error.start} is the lone surrogate {piece[error.start]!r}"
                raise CorpusError(f"{name} is not Unicode text: {where}; {_CURE}") from None
            yield _LONE_SURROGATE.sub("\ufffd", piece).encode()


def _kind(filename: str) -> str:
    stem, dot, suffix = filename.lower().rpartition(".")
    if dot + suffix in _COMPRESSED:
        _, dot, suffix = stem.rpartition(".")
    return dot + suffix


def _plain(file: BinaryIO, name: str, errors: Errors) -> Texts:
    yield name, _utf8(file, name, errors)


def _utf8(file: BinaryIO, name: str, errors: Errors) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset, piece = 0, b"."
    while piece:
        piece = file.read(PIECE_BYTES)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset - held, error) from None
        if text:
            yield text.encode()
        offset += len(piece)


def _not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> CorpusError:
    byte = error.object[error.start]
    return CorpusError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; {_CURE}")


def _lines(file: BinaryIO, name: str, errors: Errors) -> Iterator[str]:
    offset = number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise _row_too_long(f"{name}:{number + 1}")
        try:
            # A byte order mark at the head of a table belongs to the format, not to the text.
            yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset + len(line) - len(error.object), error) from None
        offset += len(line)
        number += 1


def _row_too_long(where: str) -> CorpusError:
    return CorpusError(
        f"{where}: a row is longer than the {MAX_ROW_BYTES:,} bytes that are read at once; put long texts into files "
        "of their own, as .txt or .txt.gz."
    )


def _jsonl(file: BinaryIO, name: str, errors: Errors) -> Texts:
    for number, line in enumerate(_lines(file, name, errors), start=1):
        if not line.strip():
            continue
        row = f"{name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{row} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise CorpusError(f"{row}: expected an object with a key {TEXT_COLUMN!r}, found {line.strip()!r:.80}")
        yield row, pieces(_cell(value, row), row, errors)


def _cell(row: Mapping[str, Any], where: str) -> str:
    if TEXT_COLUMN not in row:
        raise _no_text_column(where, list(row))
    value = row[TEXT_COLUMN]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {TEXT_COLUMN!r} must be a string, found {type(value).__name__} {value!r:.80}")
    return value


def _no_text_column(where: str, found: list[str]) -> CorpusError:
    columns = ", ".join(map(str, found)) or "none"
    return CorpusError(
        f"{where}: there is no column {TEXT_COLUMN!r}; columns found: {columns}. Rename the one that holds the text."
    )


def _csv(file: BinaryIO, name: str, errors: Errors) -> Texts:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses documents of more than 128 KiB
    taken = _Taken(_lines(file, name, errors), name)
    rows = csv.reader(taken, strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        if TEXT_COLUMN not in header:
            raise _no_text_column(f"{name}:{rows.line_num}", header)
        column = header.index(TEXT_COLUMN)
        for row in rows:
            taken.chars = 0
            where = f"{name}:{rows.line_num}"
            if row and len(row) <= column:
                raise CorpusError(f"{where}: expected {len(header)} columns, found {len(row)}")
            if row:
                yield where, pieces(row[column], where, errors)
    except csv.Error as error:
        raise CorpusError(f"{name}:{rows.line_num} is not CSV: {error}") from None


class _Taken:
    """Lines, counted: a quotation that is never closed would make one row of the whole file."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines, self._name, self._number = lines, name, 0
        self.chars = 0
        """Since whoever takes the lines last set it to 0."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self.chars += len(line)
        if self.chars > MAX_ROW_BYTES:
            raise _row_too_long(f"{self._name}:{self._number}")
        return line


def _parquet(file: BinaryIO, name: str, errors: Errors) -> Texts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        columns = pq.read_schema(file).names
        if TEXT_COLUMN not in columns:
            raise _no_text_column(name, columns)
        # As a dictionary, so that a long text in a million rows is held once.
        table = pq.ParquetFile(file, read_dictionary=[TEXT_COLUMN])
        for batch in table.iter_batches(batch_size=64, columns=[TEXT_COLUMN], use_threads=False):
            column = batch.column(0)
            if not pa.types.is_dictionary(column.type):
                column = column.dictionary_encode()
            texts = column.dictionary.cast(pa.large_binary())
            for index in column.indices.to_pylist():
                number += 1
                row = f"{name}:{number}"
                text = b"" if index is None else texts[index].as_py() or b""
                yield row, _utf8(io.BytesIO(text), row, errors)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{name} cannot be read as Parquet with a column of text: {error}") from None


_READERS: dict[str, Callable[[BinaryIO, str, Errors], Texts]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _expanded(file: BinaryIO, name: str, filename: str) -> BinaryIO:
    """`file` without its compression. Parquet is read from its end, so a compressed one is unfolded to disk first."""
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix not in _COMPRESSED:
        return file
    content = _gunzip(file) if suffix == ".gz" else _unzstd(file)
    expanded = cast(BinaryIO, io.BufferedReader(_Stream(content, name), PIECE_BYTES))
    if _kind(filename) != ".parquet":
        return expanded
    unfolded = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 -- closed with the last reference to it
    while piece := expanded.read(PIECE_BYTES):
        unfolded.write(piece)
    unfolded.seek(0)
    return unfolded


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            yield piece


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """zstandard's own stream_reader ends a truncated file in silence; its decompressor objects know their end."""
    import zstandard

    context, frame, rest = zstandard.ZstdDecompressor(), None, b""
    try:
        while rest or (rest := file.read(_ZSTD_READ_BYTES)):
            frame = frame or context.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data
            frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
    if frame is not None:
        raise EOFError("the compressed file ended before the end of the stream was reached")


class _Stream(io.RawIOBase):
    """Decompressed pieces as a file. Damage becomes a CorpusError wherever the reading happens."""

    def __init__(self, content: Iterator[bytes], name: str) -> None:
        self._content, self._name, self._rest = content, name, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                self._rest = memoryview(next(self._content))
        except StopIteration:
            return 0
        except (OSError, EOFError, zlib.error) as error:
            raise CorpusError(f"{self._name} is not a whole compressed file: {error}") from None
        taken = min(len(buffer), len(self._rest))
        buffer[:taken], self._rest = self._rest[:taken], self._rest[taken:]
        return taken

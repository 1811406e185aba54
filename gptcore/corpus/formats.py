"""Turn the bytes of one file into documents: plain text, JSON lines, CSV and Parquet, also compressed.

The rule for text is here. Text must be UTF-8. Other bytes are an error that names their place, or become U+FFFD.
Everything else passes unchanged, byte for byte: byte order marks, NULs and CRLF too. Text is passed on in chunks, so a
file of any size needs little memory, however large it is when decompressed. Only a row of a table is held as a whole,
so its size is limited. sources.py finds the files.
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
"""Documents as (name, chunks of UTF-8 that end at whole characters)."""

CHUNK_BYTES = 256 * 1024
MAX_ROW_BYTES = 128 * 1024 * 1024
"""Limit for one line of JSON or one row of CSV, which is read at once."""
TEXT_COLUMN = "text"
_COMPRESSED = (".gz", ".zst")
_ZSTD_READ_BYTES = 4096  # this many bytes cannot decompress to more than about 128 MiB
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF8_FIX = "Save it as UTF-8, or set corpus.errors: replace."


def has_known_suffix(filename: str) -> bool:
    """Whether directories are searched for this suffix: .txt .md .jsonl .csv .parquet, also with .gz or .zst."""
    return _format_suffix(filename) in _READERS


def read_texts(file: BinaryIO, name: str, filename: str, errors: Errors) -> Texts:
    """Yield the documents in `file`, in order. Consume the chunks of each before you ask for the next one.

    The suffix of `filename` decides the format; a file with an unknown suffix is plain text. The document of a plain
    text is called `name`. That of a table's row is called `name:3` by its line, or by its row in Parquet. Raises
    CorpusError if the file is damaged, has no column `text`, or is not UTF-8 and `errors` is strict.
    """
    reader = _READERS.get(_format_suffix(filename), _read_plain)
    return reader(_decompress(file, name, filename), name, errors)


def encode_chunks(text: str, name: str, errors: Errors) -> Iterator[bytes]:
    """Yield `text` as UTF-8 in chunks of at most 1 MiB. A lone surrogate (JSON allows it) counts as an invalid byte."""
    for start in range(0, len(text), CHUNK_BYTES):
        chunk = text[start : start + CHUNK_BYTES]
        try:
            yield chunk.encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                problem = f"character {start + error.start} is the lone surrogate {chunk[error.start]!r}"
                raise CorpusError(f"{name} is not Unicode text: {problem}. {_UTF8_FIX}") from None
            yield _LONE_SURROGATE.sub("\ufffd", chunk).encode()


def _format_suffix(filename: str) -> str:
    stem, dot, suffix = filename.lower().rpartition(".")
    if dot + suffix in _COMPRESSED:
        _, dot, suffix = stem.rpartition(".")
    return dot + suffix


def _read_plain(file: BinaryIO, name: str, errors: Errors) -> Texts:
    yield name, _read_utf8(file, name, errors)


def _read_utf8(file: BinaryIO, name: str, errors: Errors) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset, chunk = 0, b"."
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _utf8_error(name, offset - held, error) from None
        if text:
            yield text.encode()
        offset += len(chunk)


def _utf8_error(name: str, offset: int, error: UnicodeDecodeError) -> CorpusError:
    byte = error.object[error.start]
    return CorpusError(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}. {_UTF8_FIX}")


def _read_lines(file: BinaryIO, name: str, errors: Errors) -> Iterator[str]:
    offset = number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise _row_length_error(f"{name}:{number + 1}")
        try:
            # A byte order mark at the beginning of a table belongs to the format, not to the text.
            yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors)
        except UnicodeDecodeError as error:
            raise _utf8_error(name, offset + len(line) - len(error.object), error) from None
        offset += len(line)
        number += 1


def _row_length_error(row: str) -> CorpusError:
    return CorpusError(
        f"{row}: a row is longer than the {MAX_ROW_BYTES:,} bytes that are read at once. Put long texts into files of "
        "their own, as .txt or .txt.gz."
    )


def _read_jsonl(file: BinaryIO, name: str, errors: Errors) -> Texts:
    for number, line in enumerate(_read_lines(file, name, errors), start=1):
        if not line.strip():
            continue
        row = f"{name}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{row} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise CorpusError(f"{row}: expected an object with a key {TEXT_COLUMN!r}, found {line.strip()!r:.80}")
        yield row, encode_chunks(_text_of(value, row), row, errors)


def _text_of(values: Mapping[str, Any], row: str) -> str:
    if TEXT_COLUMN not in values:
        raise _missing_column_error(row, list(values))
    value = values[TEXT_COLUMN]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{row}: {TEXT_COLUMN!r} must be a string, found {type(value).__name__} {value!r:.80}")
    return value


def _missing_column_error(place: str, columns: list[str]) -> CorpusError:
    listed = ", ".join(map(str, columns)) or "none"
    return CorpusError(
        f"{place} has no column {TEXT_COLUMN!r}; columns found: {listed}. Rename the one that holds the text."
    )


def _read_csv(file: BinaryIO, name: str, errors: Errors) -> Texts:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses documents of more than 128 KiB
    lines = _RowLimit(_read_lines(file, name, errors), name)
    rows = csv.reader(lines, strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        if TEXT_COLUMN not in header:
            raise _missing_column_error(f"{name}:{rows.line_num}", header)
        column = header.index(TEXT_COLUMN)
        for row in rows:
            lines.row_chars = 0
            row_name = f"{name}:{rows.line_num}"
            if row and len(row) <= column:
                raise CorpusError(f"{row_name}: expected {len(header)} columns, found {len(row)}")
            if row:
                yield row_name, encode_chunks(row[column], row_name, errors)
    except csv.Error as error:
        raise CorpusError(f"{name}:{rows.line_num} is not CSV: {error}") from None


class _RowLimit:
    """The lines of a CSV file, with a limit per row: a quotation that never ends would make one row of the file."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines, self._name, self._number = lines, name, 0
        self.row_chars = 0
        """Characters of the present row. The reader of the rows sets it to 0 after each row."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        self.row_chars += len(line)
        if self.row_chars > MAX_ROW_BYTES:
            raise _row_length_error(f"{self._name}:{self._number}")
        return line


def _read_parquet(file: BinaryIO, name: str, errors: Errors) -> Texts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        columns = pq.read_schema(file).names
        if TEXT_COLUMN not in columns:
            raise _missing_column_error(name, columns)
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
                yield row, _read_utf8(io.BytesIO(text), row, errors)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{name} cannot be read as Parquet with a column of text: {error}") from None


_READERS: dict[str, Callable[[BinaryIO, str, Errors], Texts]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decompress(file: BinaryIO, name: str, filename: str) -> BinaryIO:
    """Return `file` without its compression.

    Parquet is read from its end, so a compressed Parquet file is decompressed to disk first.
    """
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix not in _COMPRESSED:
        return file
    content = _gunzip(file) if suffix == ".gz" else _unzstd(file)
    decompressed = cast(BinaryIO, io.BufferedReader(_DecompressedFile(content, name), CHUNK_BYTES))
    if _format_suffix(filename) != ".parquet":
        return decompressed
    on_disk = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 -- closed with the last reference to it
    while chunk := decompressed.read(CHUNK_BYTES):
        on_disk.write(chunk)
    on_disk.seek(0)
    return on_disk


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Decompress zstandard and raise EOFError if the file is truncated.

    The library's own stream_reader ends a truncated file without an error; its decompressor objects know their end.
    """
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


class _DecompressedFile(io.RawIOBase):
    """Decompressed chunks as a file. Reading a damaged file raises CorpusError."""

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
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

"""Turn the bytes of one file into documents: plain text, JSON, JSON lines, CSV and Parquet, also compressed.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from gptcore.config import Format
from gptcore.corpus.file_types import COMPRESSED, require_format
from gptcore.corpus.rows import TextRule, missing_column_error
from gptcore.errors import CorpusError

Errors = Literal["strict", "replace"]
Texts = Iterator[tuple[str, Iterator[bytes]]]
"""Documents as (name, chunks of UTF-8 that end at whole characters)."""

CHUNK_BYTES = 256 * 1024
MAX_ROW_BYTES = 128 * 1024 * 1024
"""Limit for one line of JSON or one row of CSV, which is read at once."""
_DELIMITERS = (",", ";", "\t", "|")
_ZSTD_READ_BYTES = 4096  # this many bytes cannot decompress to more than about 128 MiB
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF8_FIX = "Save it as UTF-8, or set corpus.errors: replace."


@dataclass(frozen=True)
class ReadOptions:
    """How the bytes of files become text: corpus.errors, corpus.text and corpus.formats."""

    errors: Errors = "strict"
    text: str = "text"
    formats: Mapping[str, Format] = field(default_factory=dict)

    @property
    def rule(self) -> TextRule:
        """The text of a table's rows."""
        return TextRule(self.text)


def read_texts(file: BinaryIO, name: str, filename: str, options: ReadOptions) -> Texts:
    """Yield the documents in `file`, in order. Consume the chunks of each before you ask for the next one.

    The suffix of `filename` decides the format (file_types.py). Plain text is one document with the name `name`. The
    document of a table's row has a name such as `name:3`, with its line number, or with its row number in JSON and
    Parquet. Raises CorpusError if the format is not read, or if the file is damaged, lacks a column that corpus.text
    names, or is not UTF-8 and `options.errors` is strict.
    """
    file_format = require_format(name, filename, options.formats)
    return _READERS[file_format](_decompress(file, name, filename, file_format), name, options)


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


def _read_plain(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    yield name, _read_utf8(file, name, options.errors)


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


def _read_jsonl(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    for number, line in enumerate(_read_lines(file, name, options.errors), start=1):
        if line.strip():
            row = f"{name}:{number}"
            yield row, encode_chunks(_text_of(_parse_json(line, row), row, options), row, options.errors)


def _read_json(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    """Read one JSON value. Each entry of an array is a document; an object is one document."""
    data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise CorpusError(
            f"{name} is longer than the {MAX_ROW_BYTES:,} bytes of JSON that are read at once. Save it as JSON lines: "
            f"jq -c '.[]' {PurePosixPath(name).name} > texts.jsonl"
        )
    try:
        value = _parse_json(data.decode("utf-8-sig", options.errors), name)
    except UnicodeDecodeError as error:
        raise _utf8_error(name, 0, error) from None
    if isinstance(value, dict):
        yield name, encode_chunks(_text_of(value, name, options), name, options.errors)
    elif isinstance(value, list):
        for number, entry in enumerate(value, start=1):
            row = f"{name}:{number}"
            yield row, encode_chunks(_text_of(entry, row, options), row, options.errors)
    else:
        raise CorpusError(f"{name}: expected an array or an object, found {value!r:.80}")


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place} is not JSON: {error}") from None


def _text_of(value: Any, row: str, options: ReadOptions) -> str:
    """Return the text of an entry: an object by corpus.text, a string as it is."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise CorpusError(
            f"{row}: expected a string, or an object for corpus.text {options.text!r}; found {value!r:.80}"
        )
    return options.rule.extract(value, row)


def _read_csv(file: BinaryIO, name: str, options: ReadOptions, delimiters: Sequence[str] = _DELIMITERS) -> Texts:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses documents of more than 128 KiB
    lines = _RowLimit(_read_lines(file, name, options.errors), name)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    blank = lines.number - 1  # lines before the header
    rows = csv.reader(chain([first], lines), strict=True, delimiter=_find_delimiter(first, options.rule, delimiters))
    try:
        header = next(rows)
        for column in options.rule.columns:
            if column not in header:
                raise missing_column_error(f"{name}:{blank + rows.line_num}", column, header)
        places = {column: header.index(column) for column in options.rule.columns}  # the first of equal names
        for row in rows:
            lines.row_chars = 0
            row_name = f"{name}:{blank + rows.line_num}"
            if row and (len(row) <= max(places.values()) or any(row[len(header) :])):
                raise CorpusError(
                    f"{row_name}: expected {len(header)} columns, found {len(row)}. Put a text that holds the "
                    "delimiter into quotation marks."
                )
            if row:
                text = options.rule.extract({column: row[place] for column, place in places.items()}, row_name)
                yield row_name, encode_chunks(text, row_name, options.errors)
    except csv.Error as error:
        raise CorpusError(f"{name}:{rows.line_num} is not CSV: {error}") from None


def _find_delimiter(header: str, rule: TextRule, delimiters: Sequence[str]) -> str:
    """Return the delimiter with which the header has all columns of the rule, else that with the most columns.

    If several do, as in a table with one column, return the first of `delimiters`.
    """
    headers = {mark: next(csv.reader([header], delimiter=mark), []) for mark in delimiters}
    fitting = [mark for mark, names in headers.items() if set(rule.columns) <= set(names)]
    return max(fitting or delimiters, key=lambda mark: len(headers[mark]))


def _read_tsv(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    return _read_csv(file, name, options, ("\t", *_DELIMITERS))


class _RowLimit:
    """The lines of a CSV file, with a limit per row: a quotation that never ends would make one row of the file."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines, self._name = lines, name
        self.number = 0
        """Lines read so far."""
        self.row_chars = 0
        """Characters of the present row. The reader of the rows sets it to 0 after each row."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row_chars += len(line)
        if self.row_chars > MAX_ROW_BYTES:
            raise _row_length_error(f"{self._name}:{self.number}")
        return line


def _read_parquet(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        schema = pq.read_schema(file)
        columns = [column if column in schema.names else column.partition(".")[0] for column in options.rule.columns]
        for path, column in zip(options.rule.columns, columns):
            if column not in schema.names:
                raise missing_column_error(name, path, schema.names)
        if columns == [options.text] and _is_text(schema.field(options.text).type):
            yield from _read_text_column(file, name, options)
        else:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{name}:{number}"
                    yield place, encode_chunks(options.rule.extract(row, place), place, options.errors)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name} is not UTF-8: {error} in one of the rows after row {number}. Save it as UTF-8."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{name} cannot be read as Parquet with a column of text: {error}") from None


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    return any(test(kind) for test in tests)


def _read_text_column(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    """Read one column as a dictionary, so that a long text that a million rows repeat is in memory once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    table = pq.ParquetFile(file, read_dictionary=[options.text])
    for batch in table.iter_batches(batch_size=64, columns=[options.text], use_threads=False):
        column = batch.column(0)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        texts = column.dictionary.cast(pa.large_binary())
        for index in column.indices.to_pylist():
            number += 1
            row = f"{name}:{number}"
            text = b"" if index is None else texts[index].as_py() or b""
            yield row, _read_utf8(io.BytesIO(text), row, options.errors)


_READERS: dict[Format, Callable[[BinaryIO, str, ReadOptions], Texts]] = {
    "text": _read_plain,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
}


def _decompress(file: BinaryIO, name: str, filename: str, file_format: Format) -> BinaryIO:
    """Return `file` without its compression.

    Parquet is read from its end, so a compressed Parquet file is decompressed to disk first.
    """
    suffix = PurePosixPath(filename.lower()).suffix
    if suffix not in COMPRESSED:
        return file
    content = _gunzip(file) if suffix == ".gz" else _unzstd(file)
    decompressed = cast(BinaryIO, io.BufferedReader(_DecompressedFile(content, name), CHUNK_BYTES))
    if file_format != "parquet":
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

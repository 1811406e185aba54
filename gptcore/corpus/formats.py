"""Turn the bytes of one file into documents: plain text, web pages, notebooks, JSON, CSV and Parquet.

encoding.py has the rule for text. Only a row of a table, a page or a JSON file is held as a whole, so its size is
limited. file_types.py says which format a file has, and sources.py finds the files.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from gptcore.config import Format
from gptcore.corpus import html
from gptcore.corpus.compression import copy_to_disk, decompress
from gptcore.corpus.encoding import Errors, decode, encode_chunks, read_utf8, to_utf8, utf8_error
from gptcore.corpus.file_types import require_format
from gptcore.corpus.rows import TextRule, missing_column_error
from gptcore.errors import CorpusError

Texts = Iterator[tuple[str, Iterator[bytes]]]
"""Documents as (name, chunks of UTF-8 that end at whole characters)."""

MAX_ROW_BYTES = 128 * 1024 * 1024
"""Limit for one line of JSON or one row of CSV, which is read at once."""
_DELIMITERS = (",", ";", "\t", "|")
_TSV_COLUMN = rb'(?:"[^"]*+(?:""[^"]*+)*+"|[^"\t\r\n]*+)'
_QUOTED_ROW = re.compile(_TSV_COLUMN + rb"(?:\t" + _TSV_COLUMN + rb")*+\r?\n?")
"""A row with tabs in which every quotation mark encloses a column or is doubled inside one."""


@dataclass(frozen=True)
class ReadOptions:
    """How the bytes of files become text: corpus.errors, corpus.text, corpus.formats and corpus.encoding."""

    errors: Errors = "strict"
    text: str = "text"
    formats: Mapping[str, Format] = field(default_factory=dict)
    encoding: str = ""

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
    content = decompress(file, name, filename)
    if file_format == "parquet":
        content = content if content.seekable() else copy_to_disk(content)  # it is read from its end
    elif file_format != "html":  # pages name their encoding themselves
        encoding = "" if file_format == "notebook" else options.encoding
        content = to_utf8(content, name, encoding, options.errors)
    return _READERS[file_format](content, name, options)


def _read_plain(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    yield name, read_utf8(file, name, options.errors, "utf-8-sig")


def _read_lines(file: BinaryIO, name: str, errors: Errors) -> Iterator[str]:
    offset = number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise _row_length_error(f"{name}:{number + 1}")
        try:
            # A byte order mark at the beginning of a table belongs to the format, not to the text.
            yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors)
        except UnicodeDecodeError as error:
            raise utf8_error(name, offset + len(line) - len(error.object), error) from None
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
    fix = f"Save it as JSON lines: jq -c '.[]' {PurePosixPath(name).name} > texts.jsonl"
    data = _read_whole(file, name, fix)
    try:
        value = _parse_json(data.decode("utf-8-sig", options.errors), name)
    except UnicodeDecodeError as error:
        raise utf8_error(name, 0, error) from None
    if isinstance(value, dict):
        yield name, encode_chunks(_text_of(value, name, options), name, options.errors)
    elif isinstance(value, list):
        for number, entry in enumerate(value, start=1):
            row = f"{name}:{number}"
            yield row, encode_chunks(_text_of(entry, row, options), row, options.errors)
    else:
        raise CorpusError(f"{name}: expected an array or an object, found {value!r:.80}")


def _read_whole(file: BinaryIO, name: str, fix: str) -> bytes:
    data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise CorpusError(f"{name} is longer than the {MAX_ROW_BYTES:,} bytes of JSON that are read at once. {fix}")
    return data


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place} is not JSON: {error}") from None


def _read_notebook(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    """Read the sources of a Jupyter notebook's cells, without their outputs, as one document."""
    data = _read_whole(file, name, "Clear its outputs: jupyter nbconvert --clear-output --inplace FILE")
    notebook = _parse_json(decode(data, name, "", options.errors), name)
    try:
        # Format 3 has its cells in worksheets, and calls the source of code its input.
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        sources = ["".join(cell["source"] if "source" in cell else cell["input"]) for cell in cells]
    except (TypeError, LookupError):
        raise CorpusError(f"{name} is not a Jupyter notebook: it has no list of cells with sources.") from None
    text = "\n\n".join(source for source in sources if source.strip())
    yield name, encode_chunks(f"{text}\n" if text else "", name, options.errors)


def _read_html(file: BinaryIO, name: str, options: ReadOptions) -> Texts:
    text = html.extract_text(file.read(html.MAX_PAGE_BYTES + 1), name, options.encoding, options.errors)
    yield name, encode_chunks(f"{text}\n" if text else "", name, options.errors)


def _text_of(value: Any, row: str, options: ReadOptions) -> str:
    """Return the text of an entry: an object by corpus.text, a string as it is."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise CorpusError(
            f"{row}: expected a string, or an object for corpus.text {options.text!r}; found {value!r:.80}"
        )
    return options.rule.extract(value, row)


def _read_csv(
    file: BinaryIO, name: str, options: ReadOptions, delimiters: Sequence[str] = _DELIMITERS, is_quoted: bool = True
) -> Texts:
    csv.field_size_limit(sys.maxsize)  # the module's default refuses documents of more than 128 KiB
    lines = _RowLimit(_read_lines(file, name, options.errors), name)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    blank = lines.number - 1  # lines before the header
    delimiter = _find_delimiter(first, options.rule, delimiters)
    is_quoted = is_quoted or delimiter != "\t"
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    rows = csv.reader(chain([first], lines), strict=True, delimiter=delimiter, quoting=quoting)
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
                fix = (
                    "Put a text that holds the delimiter into quotation marks"
                    if is_quoted
                    else "Quotation marks are text in this file, because some of them do not enclose a whole column"
                )
                raise CorpusError(f"{row_name}: expected {len(header)} columns, found {len(row)}. {fix}.")
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
    """Read a table with tabs. Its quotation marks are CSV's only if all of them can be.

    pandas and Excel quote as in CSV. Google Sheets and many data sets do not quote, as text/tab-separated-values says.
    Read as CSV, `"Yes", she said` would lose its marks there, and a mark that is not closed would join rows.
    """
    content = file if file.seekable() else copy_to_disk(file)
    is_quoted = _is_quoted(content)
    content.seek(0)
    return _read_csv(content, name, options, ("\t", *_DELIMITERS), is_quoted)


def _is_quoted(file: BinaryIO) -> bool:
    """Whether every quotation mark of a table with tabs encloses a column or is doubled inside one, as in CSV."""
    row, marks, size = [], 0, 0
    while line := file.readline(MAX_ROW_BYTES):
        row.append(line)
        marks, size = marks + line.count(b'"'), size + len(line)
        if marks % 2:  # a column goes on in the next line, or a mark is not closed
            if size > MAX_ROW_BYTES:
                return False
            continue
        if marks and not _QUOTED_ROW.fullmatch(b"".join(row).removeprefix(codecs.BOM_UTF8)):
            return False
        row, marks, size = [], 0, 0
    return not marks


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
            yield row, read_utf8(io.BytesIO(text), row, options.errors)


_READERS: dict[Format, Callable[[BinaryIO, str, ReadOptions], Texts]] = {
    "text": _read_plain,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "html": _read_html,
    "notebook": _read_notebook,
}

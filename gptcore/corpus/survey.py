"""Look at text before anything is configured: what is there, what would be left out, and which columns hold the text.

The text is read as an ingestion reads it (documents.py), but nothing of it is kept.
"""

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.corpus.compression import copy_to_disk, decompress
from gptcore.corpus.documents import Spool
from gptcore.corpus.encoding import to_utf8
from gptcore.corpus.file_types import require_format
from gptcore.corpus.formats import ReadOptions
from gptcore.corpus.reading import Reading
from gptcore.corpus.sources import File
from gptcore.errors import CorpusError

_MOST_BYTES = 64 * 1024 * 1024  # of files that are read; more are only counted
_SAMPLE_BYTES = 4 * 1024 * 1024
_ROWS, _TABLES = 100, 20  # rows of a table, and tables, that are looked at
_ROW_BYTES = 8 * 1024 * 1024
_COLUMN_CHARS = 16  # mean length from which a column is text, and not a name or a label
_NOT_IN_PATHS = set("{}[]!:")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    documents: int
    """Documents with text, without copies."""
    num_bytes: int
    """Bytes of their text. Of a large source, an estimate from its first files."""
    text: str
    """A value of corpus.text that suits the tables; "text" without tables."""
    reading: Reading
    """What became of the files that were read."""
    sample: str
    """The beginning of the text."""


def survey(source: str, base: Path, exclude: Sequence[str] = ()) -> Survey:
    """Read a local source, at most 64 MiB and one more file of it. Nothing is written below `base`.

    Raises CorpusError if the source has no text that can be used.
    """
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as text:
        files, reading = sources.find_files([source], base, Path(scratch), exclude)
        total, chosen = sum(file.num_bytes for file in files), list(_take_first(files))
        rule = _choose_text(chosen, Path(scratch))
        documents = Spool(text, chosen, ReadOptions("strict", rule), Path(scratch))
        documents.drop_or_mark_copies()
        reading.merge(documents.reading)
        if not documents.entries:
            raise CorpusError("\n".join([f"{source} holds no text that can be used.", *reading.describe()]))
        num_bytes = sum(entry.bytes for entry in documents.entries)
        share = total / max(1, sum(file.num_bytes for file in chosen))
        text.seek(0)
        return Survey(
            documents=round(len(documents.entries) * share),
            num_bytes=round(num_bytes * share),
            text=rule,
            reading=reading,
            sample=text.read(_SAMPLE_BYTES).decode(errors="ignore"),
        )


def _take_first(files: Sequence[File]) -> Iterator[File]:
    num_bytes = 0
    for file in files:
        if num_bytes >= _MOST_BYTES:
            return
        num_bytes += file.num_bytes
        yield file


def _choose_text(files: Sequence[File], scratch: Path) -> str:
    """Return the value of corpus.text for most of the tables, by their size. CorpusConfig's default without tables."""
    default = str(CorpusConfig.model_fields["text"].default)
    sizes = Counter[str]()
    tables = (file for file in files if require_format(file.name, file.filename) in _PEEKERS)
    for file in islice(tables, _TABLES):
        with suppress(Exception), file.open(scratch) as content:  # the reading reports what is wrong
            if rule := _choose_columns(list(_peek(content, file)), default):
                sizes[rule] += file.num_bytes
    return max(sizes, key=sizes.__getitem__, default=default)


def _choose_columns(rows: Sequence[Row], preferred: str) -> str:
    """Return the column of text, or a template over several columns of text. Empty if there is none.

    A column is text if most of its values have several words, few values are equal, and a value has 16 characters on
    average. Without such a column, the strings with most characters are the text.
    """
    columns: dict[str, list[str]] = {}
    for row in rows:
        for path, value in _list_strings(row):
            columns.setdefault(path, []).append(value)
    columns = {path: values for path, values in columns.items() if not _NOT_IN_PATHS & set(path)}
    prose = [path for path, values in columns.items() if _is_prose(values, len(rows))]
    if preferred in columns and (preferred in prose or not prose):
        return preferred
    if len(prose) > 1:
        return "\n\n".join(f"{{{path}}}" for path in prose)
    return max(prose or columns, key=lambda path: sum(map(len, columns[path])), default="")


def _list_strings(row: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings of a row that are not blank, with their paths."""
    for key, value in row.items():
        if isinstance(value, str) and value.strip():
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and not prefix:
            yield from _list_strings(value, f"{key}.")


def _is_prose(values: Sequence[str], num_rows: int) -> bool:
    characters = "".join(values)
    return (
        2 * len(values) >= num_rows
        and 2 * sum(" " in value.strip() for value in values) >= len(values)
        and 5 * len(set(values)) >= 4 * len(values)
        and len(characters) >= _COLUMN_CHARS * len(values)
        and 2 * sum(map(str.isalpha, characters)) >= len(characters)
    )


def _peek(content: BinaryIO, file: File) -> Iterator[Row]:
    """Yield the first rows of a table that are objects."""
    file_format = require_format(file.name, file.filename)
    plain = decompress(content, file.name, file.filename)
    if file_format != "parquet":
        plain = to_utf8(plain, file.name, "", "replace")
    for row in islice(_PEEKERS[file_format](plain), _ROWS):
        if isinstance(row, Mapping):
            yield row


def _peek_jsonl(file: BinaryIO) -> Iterator[Any]:
    return (json.loads(line) for line in iter(lambda: file.readline(_ROW_BYTES), b"") if line.strip())


def _peek_json(file: BinaryIO) -> Iterator[Any]:
    value = json.loads(file.read().decode("utf-8-sig"))
    return iter(value if isinstance(value, list) else [value])


def _peek_csv(file: BinaryIO) -> Iterator[Any]:
    lines = io.StringIO(file.read(_ROW_BYTES).decode("utf-8-sig", "replace").lstrip(), newline="")
    header = lines.readline()
    delimiter = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    lines.seek(0)
    return ({str(key): value for key, value in row.items()} for row in csv.DictReader(lines, delimiter=delimiter))


def _peek_parquet(file: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file if file.seekable() else copy_to_disk(file))
    return (row for batch in table.iter_batches(batch_size=_ROWS, use_threads=False) for row in batch.to_pylist())


_PEEKERS = {
    "jsonl": _peek_jsonl,
    "json": _peek_json,
    "csv": _peek_csv,
    "tsv": _peek_csv,
    "parquet": _peek_parquet,
}

"""Tables: which part of a row is its text, and the formats that hold rows."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.corpus.formats import ReadOptions
from gptcore.errors import ConfigError, CorpusError
from gptcore.sections import parse

TICKETS: list[dict[str, Any]] = [
    {"id": 1, "subject": "Lamp", "body": "It is dark; very dark.", "meta": {"by": "Zoë", "parts": ["first", "second"]}},
    {"id": 2, "subject": "Door, front", "body": 'It says "closed".\nStill.', "meta": {"by": None, "parts": ["third"]}},
]


def read(directory: Path, name: str, text: str) -> list[tuple[str, str]]:
    files = sources.find_files([name], directory, directory / "downloads").files
    documents = (document for file in files for document in file.read_documents(file.open(directory), options(text)))
    return [(document.name, b"".join(document.chunks).decode()) for document in documents]


def options(text: str) -> ReadOptions:
    return ReadOptions("strict", text)


def delimited(mark: str) -> str:
    rows = [["id", "subject", "body"], *([str(row["id"]), row["subject"], row["body"]] for row in TICKETS)]
    quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row] for row in rows]
    return "".join(mark.join(row) + "\r\n" for row in quoted)


def write(directory: Path, kind: str) -> str:
    path = directory / f"tickets{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in TICKETS)
    whole = json.dumps(TICKETS, indent=2)
    semicolons = kind == ".semicolons.csv"
    texts = {".jsonl": lines, ".ndjson": lines, ".json": whole, ".csv": delimited(","), ".tsv": delimited("\t")}
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(TICKETS), path)
    elif kind == ".json.gz":
        path.write_bytes(gzip.compress(whole.encode()))
    else:
        path.write_text(delimited(";") if semicolons else texts[kind], newline="")
    return path.name


KINDS = [".jsonl", ".ndjson", ".json", ".json.gz", ".csv", ".semicolons.csv", ".tsv", ".parquet"]
NESTED = [".jsonl", ".ndjson", ".json", ".json.gz", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_or_a_template_over_columns_is_the_text(tmp_path: Path, kind: str) -> None:
    name = write(tmp_path, kind)
    assert [text for _, text in read(tmp_path, name, "body")] == [row["body"] for row in TICKETS]
    expected = [f"# {row['subject']} ({row['id']})\n\n{row['body']}" for row in TICKETS]
    assert [text for _, text in read(tmp_path, name, "# {subject} ({id})\n\n{body}")] == expected
    with pytest.raises(
        CorpusError, match=r"tickets.* has no column 'text'; columns found: id, subject, body.*corpus\.text"
    ):
        read(tmp_path, name, "text")


@pytest.mark.parametrize("kind", NESTED)
def test_a_path_leads_into_nested_values(tmp_path: Path, kind: str) -> None:
    name = write(tmp_path, kind)
    assert [text for _, text in read(tmp_path, name, "meta.by")] == ["Zoë", ""]
    assert [text for _, text in read(tmp_path, name, "{subject}: {meta.parts.0}")] == [
        "Lamp: first",
        "Door, front: third",
    ]
    with pytest.raises(CorpusError, match="'meta' must be a string, found dict"):
        read(tmp_path, name, "meta")
    with pytest.raises(CorpusError, match=r"has no column 'meta\.parts\.1'"):
        read(tmp_path, name, "meta.parts.1")


def test_a_json_file_holds_one_object_or_an_array_of_objects_or_texts(tmp_path: Path) -> None:
    for name, value in (("one.json", {"text": "alone"}), ("texts.json", ["a", {"text": "b"}]), ("bad.json", 7)):
        (tmp_path / name).write_text(f"\ufeff{json.dumps(value)}")
    assert read(tmp_path, "one.json", "text") == [("one.json", "alone")]
    assert read(tmp_path, "texts.json", "text") == [("texts.json:1", "a"), ("texts.json:2", "b")]
    with pytest.raises(CorpusError, match=r"bad\.json: expected an array or an object, found 7"):
        read(tmp_path, "bad.json", "text")
    (tmp_path / "cut.json").write_text('[{"text": "a"}')
    with pytest.raises(CorpusError, match=r"cut\.json is not JSON"):
        read(tmp_path, "cut.json", "text")


def test_a_delimiter_is_that_of_the_header_and_blank_lines_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\nkind;text\na,b;one, two\n")
    assert read(tmp_path, "a.csv", "text") == [("a.csv:4", "one, two")]
    (tmp_path / "b.csv").write_text("text\none; two,\n")
    assert read(tmp_path, "b.csv", "text") == [("b.csv:2", "one; two")]
    (tmp_path / "b.csv").write_text("text\none; two, three\n")
    with pytest.raises(
        CorpusError, match=r"b\.csv:2: expected 1 columns, found 2\. Put a text that holds the delimiter"
    ):
        read(tmp_path, "b.csv", "text")
    (tmp_path / "c.tsv").write_text("text\none; two, three\n")
    assert read(tmp_path, "c.tsv", "text") == [("c.tsv:2", "one; two, three")]
    (tmp_path / "d.csv").write_text("text,id,text\none,1,two\n")
    assert read(tmp_path, "d.csv", "text") == [("d.csv:2", "one")], "the first of two columns with one name"
    (tmp_path / "empty.csv").write_text("\n\n")
    assert read(tmp_path, "empty.csv", "text") == []


ONLINE = [["He said", '"Yes", and left.', "1"], ["A pipe", '5" wide', "2"], ["", 'so "it"', "3"]]
"""Rows that a program writes as they are, as text/tab-separated-values says: no cell holds a tab or a line end."""
EXPORTED = [["a\tb", 'He said "Yes".\nThen he left.', "1"], ["", "plain", "2"]]
"""Rows that a program writes as CSV with tabs."""


def test_quotation_marks_of_a_tsv_are_text_unless_all_of_them_enclose_columns(tmp_path: Path) -> None:
    def write(rows: list[list[str]], **settings: Any) -> None:
        with (tmp_path / "a.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t", **settings).writerows([["subject", "body", "id"], *rows])

    def bodies() -> list[str]:
        return [text for _, text in read(tmp_path, "a.tsv", "body")]

    plain = {"quoting": csv.QUOTE_NONE, "quotechar": None}
    for rows in (ONLINE, ONLINE[:1], ONLINE[1:2], [["x", '"never closed', "1"], ["y", 'nor "opened"', "2"]]):
        write(rows, **plain)
        assert bodies() == [row[1] for row in rows]
    for settings in ({}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\n"}):
        write(EXPORTED, **settings)
        (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.tsv").read_bytes())
        assert bodies() == [row[1] for row in EXPORTED]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress((tmp_path / "a.tsv").read_bytes()))
    assert [text for _, text in read(tmp_path, "a.tsv.gz", "body")] == [row[1] for row in EXPORTED]
    write(ONLINE, **plain)
    with (tmp_path / "a.tsv").open("a") as file:
        file.write("x\ta tab\tin a cell\t4\n")
    with pytest.raises(CorpusError, match=r"a\.tsv:5: expected 3 columns, found 4\. Quotation marks are text"):
        bodies()
    (tmp_path / "a.tsv").write_text('subject,body\nx,"one, two"\n')
    assert bodies() == ["one, two"], "a table with commas, whatever its name says"


@pytest.mark.parametrize("text", ["{", "a}", "{}", "{a!r}", "{a:>4}", "{{x}}"])
def test_a_template_that_cannot_be_filled_in_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"pipelines\.yaml: text: "):
        parse(CorpusConfig, {"text": text}, "pipelines.yaml")


def test_a_template_that_yaml_reads_as_a_mapping_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"text: write a template in quotation marks, as in text: '\{title\}'"):
        parse(CorpusConfig, {"text": {"title": None}}, "pipelines.yaml")


def test_escaped_braces_stand_for_braces(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b.c": "y"}\n')
    assert read(tmp_path, "a.jsonl", "{{{a}}} {b.c}") == [("a.jsonl:1", "{x} y")]


def test_bytes_in_a_parquet_column_are_text_if_they_are_utf_8(tmp_path: Path) -> None:
    for kind in (pa.binary(), pa.large_binary()):
        pq.write_table(pa.table({"text": pa.array(["Zoë".encode()], kind)}), tmp_path / "a.parquet")
        assert read(tmp_path, "a.parquet", "text") == [("a.parquet:1", "Zoë")]
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b\.parquet is not UTF-8: .* byte 0xff"):
        read(tmp_path, "b.parquet", "{text}")


def test_a_directory_is_searched_for_tables_but_not_for_json(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.ndjson"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "package.json").write_text('{"name": "settings"}\n')
    (tmp_path / "c.tsv").write_text("text\nx\n")
    assert [name for name, _ in read(tmp_path, ".", "text")] == ["a.jsonl:1", "b.ndjson:1", "c.tsv:2"]

"""What a file's name says about reading it, and corpus.formats."""

from pathlib import Path

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.corpus.file_types import classify, require_format
from gptcore.corpus.ingest import ingest
from gptcore.errors import ConfigError, CorpusError
from gptcore.sections import parse


@pytest.mark.parametrize(
    ("name", "status", "file_format"),
    [
        ("notes.txt", "read", "text"),
        ("A/B.MD.GZ", "read", "text"),
        ("Makefile", "read", "text"),
        ("notes.2024-01-05", "read", "text"),
        ("St. Mary", "read", "text"),
        ("v1.2", "read", "text"),
        ("the text", "read", "text"),
        (".profile", "read", "text"),
        ("main.py", "read", "text"),
        ("rows.ndjson.zst", "read", "jsonl"),
        ("settings.json", "named", "json"),
        ("a.log.1.gz", "named", "text"),
        ("jquery.min.js", "named", "text"),
        ("paper.pdf", "refused", None),
        ("all.tar.gz", "refused", None),
        ("all.tar.bz2", "refused", None),
        ("photo.JPG", "skipped", None),
        ("libtorch.so.2", "skipped", None),
        ("notes.txtt", "unknown", None),
    ],
)
def test_the_name_says_whether_a_file_is_read(name: str, status: str, file_format: str | None) -> None:
    file_type = classify(name, {})
    assert (file_type.status, file_type.format) == (status, file_format)
    assert bool(file_type.reason) == (status != "read")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.txtt", r'unknown suffix \.txtt; did you mean \.txt\? Set corpus\.formats: \{"\.txtt": text\}'),
        ("a.qqq", r'unknown suffix \.qqq\. Set corpus\.formats: \{"\.qqq": text\} if it is plain text'),
        ("paper.pdf", r"PDF is not read\. Convert it: pdftotext -layout FILE FILE\.txt"),
        ("all.tgz", r"an archive is not read\. Convert it: tar xf FILE"),
        ("photo.png", r"a picture is not text"),
    ],
)
def test_a_named_file_that_is_not_read_is_refused_with_the_fix(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"text\n")
    with pytest.raises(CorpusError, match=f"^{name}: {reason}"):
        ingest(CorpusConfig(sources=(name,)), tmp_path / "corpora", tmp_path)


def test_corpus_formats_says_how_a_suffix_is_read() -> None:
    formats = CorpusConfig(formats={".log": "text", ".export": "jsonl"}).formats
    assert classify("a.log", formats).status == "read"
    assert require_format("a", "tickets.export.gz", formats) == "jsonl"
    with pytest.raises(CorpusError, match=r"a: unknown suffix \.exports; did you mean \.export\?"):
        require_format("a", "tickets.exports", formats)


@pytest.mark.parametrize("suffix", ["log", ".LOG", ".gz", ".log.zst", "*.log", ""])
def test_a_suffix_that_no_file_can_have_is_refused(suffix: str) -> None:
    with pytest.raises(ConfigError, match=r"corpus: formats: .* is not a suffix\. Write it in lower case"):
        parse(CorpusConfig, {"formats": {suffix: "text"}}, "corpus")


def test_a_directory_gives_what_is_text_and_the_report_says_the_rest(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    texts = ("README", "a.html", "b.ipynb", "main.py", "old.export")
    for number, name in enumerate((*texts, "a.json", "app.log", "site.min.js", "paper.pdf", "photo.png", "x.qqq")):
        (notes / name).write_text(f"text {number}")
    (notes / "b.ipynb").write_text('{"cells": [{"source": "text"}]}')
    (notes / "program").write_bytes(b"\x7fELF" + b"\0" * 99)
    found = sources.find_files(["notes"], tmp_path, tmp_path / "downloads", formats={".export": "text"})
    assert [Path(file.name).name for file in found.files] == sorted(texts)
    assert found.reading.describe() == [
        '.json: 1 file not read: most JSON files hold settings; name them, as in "DIR/*.json", or set corpus.formats: '
        '{".json": json}.',
        '.log: 1 file not read: most logs are written by programs; name them, as in "DIR/*.log", or set '
        'corpus.formats: {".log": text}.',
        '.min.js: 1 file not read: minified files are written by programs; name them, as in "DIR/*.min.js", or set '
        'corpus.formats: {".min.js": text}.',
        ".pdf: 1 file not read: PDF is not read. Convert it: pdftotext -layout FILE FILE.txt",
        ".png: 1 file not read: a picture is not text.",
        '.qqq: 1 file not read: unknown suffix .qqq. Set corpus.formats: {".qqq": text} if it is plain text.',
        "no suffix: 1 file not read: they look like binary files.",
    ]


def test_a_glob_gives_what_it_names_and_a_directory_of_pictures_says_why_it_has_no_text(tmp_path: Path) -> None:
    for name in ("a.json", "b.log", "c.pdf"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in sources.find_local_paths("*", tmp_path)] == ["a.json", "b.log"]
    with pytest.raises(CorpusError, match=r"'\*\.pdf' matches no file.*\.pdf: 1 file not read: PDF is not read"):
        sources.find_local_paths("*.pdf", tmp_path)


@pytest.mark.parametrize("path", ["text", "text?download=1", "the-verdict.txt", "v1.2", "a.txt?file=b.pdf", ""])
def test_an_address_without_a_suffix_is_text_and_one_of_a_pdf_is_refused_before_it_is_downloaded(path: str) -> None:
    sources.check([f"https://example.org/{path}"], Path())
    with pytest.raises(CorpusError, match=r"^https://example\.org/paper\.pdf: PDF is not read\. Convert it"):
        sources.check(["https://example.org/paper.pdf?key=value"], Path())


def test_a_corpus_in_several_formats_and_an_encoding_is_the_same_snapshot_as_its_plain_text(tmp_path: Path) -> None:
    texts = [f"Café number {number}.\n" + "Many words follow here. " * number + "\n" for number in range(1, 60)]
    for directory in ("plain", "mixed"):
        (tmp_path / directory).mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "plain" / f"{number}.txt").write_text(text)
        (tmp_path / "mixed" / f"{number}.old").write_bytes(text.encode("cp1252" if number % 2 else "utf-16"))
    settings = {"val_fraction": 0.2, "holdout_fraction": 0.2, "block_bytes": 256}
    plain = ingest(CorpusConfig(sources=("plain",), **settings), tmp_path / "corpora", tmp_path)
    mixed = CorpusConfig(sources=("mixed",), formats={".old": "text"}, encoding="cp1252", **settings)
    assert ingest(mixed, tmp_path / "corpora", tmp_path).sha256 == plain.sha256

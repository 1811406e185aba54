"""What a file's name says about reading it, and corpus.formats."""

from pathlib import Path

import pytest

from gptcore.config import CorpusConfig
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

"""Scores by source: sums that were computed by hand, and a table that keeps every name."""

import math

import pytest

from gptcore.corpus.snapshot import ListedDocument
from gptcore.evaluation.sources import (
    SourceComparison,
    SourceScore,
    compare_sources,
    parse_source_scores,
    score_sources,
    write_source_scores,
)

SOURCES = ("notes/", "https://me:secret@example.org/a.txt?sig=hidden", "notes/", "empty/")
DOCUMENTS = [ListedDocument(f"{number}.txt", source, "", 20) for number, source in enumerate(SOURCES)]


def blocks(*bits):
    """Return blocks of 10 bytes of the documents 0, 1, 2 and 2."""
    pairs = zip((0, 1, 2, 2), bits, strict=True)
    return [{"document": document, "bytes": 10, "nats": value * math.log(2)} for document, value in pairs]


def test_each_source_is_scored_on_its_own_blocks_and_no_password_is_shown():
    notes, web, empty = score_sources(blocks(20, 30, 10, 15), DOCUMENTS)
    assert notes == SourceScore("notes/", 3, 30, pytest.approx(1.5))
    assert web == SourceScore("https://example.org/a.txt", 1, 10, pytest.approx(3.0))
    assert (empty.source, empty.blocks, empty.bytes) == ("empty/", 0, 0) and math.isnan(empty.bits_per_byte)


def test_two_models_are_compared_on_the_same_blocks_of_each_source():
    notes, web, _ = compare_sources(blocks(20, 30, 10, 15), blocks(30, 20, 15, 15), DOCUMENTS)
    assert notes == SourceComparison("notes/", 3, 30, pytest.approx(1.5), pytest.approx(2.0))
    assert web == SourceComparison("https://example.org/a.txt", 1, 10, pytest.approx(3.0), pytest.approx(2.0))


def test_the_table_keeps_every_name(tmp_path):
    names = ('a,"b"', "two\nlines\r\n", "größe \x1c\u2028", " ")
    scores = tuple(SourceScore(name, 1, 2, 0.1 + number) for number, name in enumerate(names))
    write_source_scores(tmp_path / "sources.csv", (*scores, SourceScore("empty", 0, 0, math.nan)))
    text = (tmp_path / "sources.csv").read_bytes().decode()
    *read, empty = parse_source_scores(text)
    assert tuple(read) == scores and math.isnan(empty.bits_per_byte)
    assert text.startswith("source,blocks,bytes,bits_per_byte")

"""Progress of a step over a text: logged every few seconds for a large text, and never for a small one."""

import itertools
import logging

import pytest

from gptcore import progress
from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.progress import Progress
from gptcore.tokens.files import tokenize


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test advances."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def said(caplog):
    return [(record.step, record.getMessage()) for record in caplog.records]


def test_progress_is_logged_every_few_seconds_with_the_rate_and_the_time_left(clock, caplog):
    caplog.set_level(logging.INFO, "gptcore.progress")
    known, unknown = Progress("tokenize", "encoded", 1_000_000_000), Progress("ingest", "read")
    for _ in range(10):
        clock[0] += 1.0
        known.add(40_000_000)
    unknown.add(2_500_000_000)
    assert said(caplog) == [
        ("tokenize", "encoded 200 of 1,000 MB, 40.0 MB/s, 20 s left"),
        ("tokenize", "encoded 400 of 1,000 MB, 40.0 MB/s, 15 s left"),
        ("ingest", "read 2,500 MB, 250.0 MB/s"),
    ]


def test_reading_splitting_and_encoding_each_account_for_the_whole_text(caplog, tmp_path, monkeypatch):
    caplog.set_level(logging.INFO, "gptcore.progress")
    monkeypatch.setattr(progress.time, "monotonic", map(float, itertools.count(step=6)).__next__)
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"Paragraph {number} of a text that is not long." for number in range(60_000)))
    snapshot = ingest(CorpusConfig(sources=(str(text),)), tmp_path / "corpora", tmp_path)
    tokenize(snapshot.path, "bytes", tmp_path / "tokens", processes=1)
    last = {(step, line.split()[0]): line.split(",")[0] for step, line in said(caplog)}
    size, encoded = (
        round(number / 1e6) for number in (text.stat().st_size, sum(map(snapshot.bytes.get, ("train", "val"))))
    )
    assert size == 3 and last == {
        ("ingest", "read"): f"read {size} MB",
        ("ingest", "split"): f"split {size} of {size} MB",
        ("tokenize", "encoded"): f"encoded {encoded} of {encoded} MB",
    }

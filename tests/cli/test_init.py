"""`gptflow init`: what it writes for several kinds of text is read by the product's loader and can be ingested."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flows.cli import cli
from flows.cli.init import choose
from flows.config.pipelines import PipelinesFile, find_pipelines_file
from gptcore.corpus import sources
from gptcore.corpus.ingest import ingest
from gptcore.errors import ConfigError, CorpusError, GPTCoreError
from gptcore.tokens import tokenizer
from tests.tiny import prose


def write_prose(directory: Path) -> None:
    for number in range(8):
        (directory / f"{number}.md").write_text(prose(number, 400))
    (directory / "copy.md").write_text(prose(1, 400))
    (directory / "picture.png").write_bytes(b"\xff\xd8")


def rows() -> list[dict[str, str]]:
    return [
        {"id": f"a{number} b", "title": prose(number, 10)[:40], "body": prose(number, 200), "state": "not yet open"}
        for number in range(30)
    ]


def write_csv(directory: Path) -> None:
    with (directory / "tickets.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "title", "body", "state"], delimiter=";")
        writer.writeheader()
        writer.writerows(rows())


def write_jsonl(directory: Path) -> None:
    lines = [json.dumps({"by": row["id"], "message": {"content": row["body"]}}) for row in rows()]
    (directory / "chat.jsonl").write_text("\n".join(lines))
    (directory / "other.jsonl").write_text('{"setting": 1}\n')


def write_text_column(directory: Path) -> None:
    (directory / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": row["body"], "note": row["title"]}) for row in rows())
    )
    (directory / "damaged.jsonl").write_text("{")


@pytest.mark.parametrize(
    ("write", "path", "expected"),
    [
        (write_prose, "My notes", {"text": "text", "exclude": (), "errors": "strict"}),
        (write_prose, ".", {"text": "text", "exclude": ("pipelines.yaml",), "errors": "strict"}),
        (write_prose, "My notes/1.md", None),
        (write_csv, "My notes", {"text": "{title}\n\n{body}", "exclude": (), "errors": "strict"}),
        (write_csv, "My notes/tickets.csv", {"text": "{title}\n\n{body}", "exclude": (), "errors": "strict"}),
        (write_jsonl, "My notes", {"text": "message.content", "exclude": (), "errors": "strict"}),
        (write_text_column, "My notes", {"text": "text", "exclude": (), "errors": "skip"}),
    ],
)
def test_the_written_file_is_valid_and_its_text_can_be_ingested(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    path: str,
    expected: dict[str, Any] | None,
) -> None:
    directory = tmp_path / "My notes"
    directory.mkdir()
    write(directory)
    if expected is None:
        (directory / "1.md").write_text(prose(1, 6000))
    monkeypatch.chdir(directory if path == "." else tmp_path)
    done = CliRunner().invoke(cli, ["init", path])
    assert done.exit_code == 0, done.output
    name = "1" if expected is None else "tickets" if path.endswith(".csv") else "My-notes"
    assert f"train it with: gptflow run {name}\n" in done.output
    written = Path("pipelines.yaml").read_text()
    assert 15 <= len(written.splitlines()) <= 22
    pipeline = PipelinesFile(Path("pipelines.yaml").absolute()).pipeline(name)
    corpus = pipeline.corpus
    assert expected is None or {key: getattr(corpus, key) for key in expected} == expected
    assert (pipeline.model.recipe, pipeline.train.optimizer, corpus.tokenizer) == ("modern", "muon", "bytes")
    sources.check(corpus.sources, Path.cwd(), corpus.exclude, corpus.formats)
    tokenizer.check(corpus.tokenizer)
    snapshot = ingest(corpus, tmp_path / "state" / "corpora", Path.cwd())
    assert snapshot.documents and not any("pipelines.yaml" in source for source in corpus.sources)
    if path == "My notes" and write is write_prose:
        assert ".md: 9 files read; left out: 1 duplicate document" in done.output and ".png: 1 file not" in done.output


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines.yaml").write_text("mine")
    done = CliRunner().invoke(cli, ["init"])
    assert isinstance(done.exception, GPTCoreError) and done.exception.exit_code == 1
    assert "exists already, and is not overwritten" in str(done.exception)
    assert (tmp_path / "pipelines.yaml").read_text() == "mine"


def test_without_enough_text_nothing_is_written_and_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for said in ("has no file of text that may be read", "holds no text that can be used", "1,000 bytes of text"):
        done = CliRunner().invoke(cli, ["init"])
        assert isinstance(done.exception, CorpusError) and said in str(done.exception)
        (tmp_path / "one.txt").write_text(" \n" if "may be read" in said else prose(1)[:1000])
    assert not (tmp_path / "pipelines.yaml").exists()
    with pytest.raises(ConfigError, match="`gptflow init PATH`"):
        find_pipelines_file(None)


def test_the_choice_follows_the_size_of_the_text() -> None:
    draw = random.Random(1)
    words = prose(1, 30_000, ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(2000)])
    small, large, repetitive = choose(30_000, words), choose(20_000_000, words), choose(600_000, "word " * 10_000)
    assert (small.tokenizer, small.size, small.batch_size, small.max_steps) == ("bytes", "mini", 4, 211)
    assert (large.tokenizer, large.size, large.batch_size) == ("bpe:4096", "mini", 32)
    assert 200 < large.max_steps <= 5000 and large.epochs <= 4.01
    assert repetitive.tokenizer == "bytes", "fewer entries than 1024"
    assert choose(2_000_000_000, words).size == "gpt2"

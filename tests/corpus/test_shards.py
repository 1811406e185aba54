"""A corpus processed in shards: the same bytes as from one process, in any order and despite killed workers."""

import gzip
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import contamination, ingest
from gptcore.corpus import shards as parts
from gptcore.errors import CorpusError
from gptcore.processes import WorkerDied, count_cpus, map_in_processes
from gptcore.tokens import encode_shards, files
from gptcore.tokens import tokenizer as tokenizer_room
from tests.corpus.fatal import Fatal, die
from tests.tiny import odd_prose


def small_shards(monkeypatch: pytest.MonkeyPatch, num_bytes: int = 40_000) -> None:
    for room in (parts, contamination, encode_shards):
        monkeypatch.setattr(room, "SHARD_BYTES", num_bytes)
    for room in (ingest, contamination, files):
        monkeypatch.setattr(room, "WHOLE_BYTES", num_bytes)


def write_texts(directory: Path) -> None:
    """Write documents of every kind and size, blank ones, copies, and passages that several documents share."""
    draw = random.Random(7)
    stock = [odd_prose(number, 260) for number in range(40)]
    directory.mkdir()
    for number in range(60):
        text = "".join(f"{draw.choice(stock)}{draw.random()}\n\n" for _ in range(draw.randint(1, 30)))
        (directory / f"{number:02d}.txt").write_text(text)
    (directory / "05.txt").write_bytes((directory / "50.txt").read_bytes())
    (directory / "17.txt").write_text(" \n" * 30_000)
    (directory / "long.md").write_text(odd_prose(99, 150_000))
    rows = [{"text": odd_prose(number, 700)} for number in range(200, 260)] + [{"text": ""}, {"text": stock[0]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / "rows.jsonl.gz").write_bytes(gzip.compress(lines))


def backwards(step: str, action: str, function: Callable[[Any], Any], shards: Sequence[Any]) -> list[Any]:
    """Process the last shard first, and the first shard twice."""
    done = {number: function(shards[number]) for number in (*reversed(range(len(shards))), 0)}
    return [done[number] for number in range(len(shards))]


def in_two(step: str, action: str, function: Callable[[Any], Any], shards: Sequence[Any]) -> list[Any]:
    return map_in_processes(step, action, function, shards, processes=2)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_shards_give_the_same_snapshot_and_token_files_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    write_texts(tmp_path / "texts")
    cfg = CorpusConfig(
        sources=("texts", "python-docs"), split=way, block_bytes=256, val_fraction=0.2, holdout_fraction=0.2
    )
    alone = ingest.ingest(cfg, tmp_path / "alone" / "corpora", tmp_path)
    assert alone.dropped["guard_runs"] and alone.dropped["empty_documents"] and alone.dropped["duplicate_documents"]
    monkeypatch.setattr(tokenizer_room, "PIECE_CHARS", 5_000)
    encoded = files.tokenize(alone.path, "bpe:300", tmp_path / "alone" / "tokens")
    small_shards(monkeypatch)
    counted: dict[str, int] = {}
    for name, map_shards in (("backwards", backwards), ("two", in_two)):

        def counting(step: str, action: str, function: Any, shards: Any, map_shards: Any = map_shards) -> list[Any]:
            counted[action] = max(len(shards), counted.get(action, 0))
            return map_shards(step, action, function, shards)

        made = ingest.ingest(cfg, tmp_path / name / "corpora", tmp_path, counting)
        assert files_of(made.path) == files_of(alone.path)
        if name == "two" and way == "contiguous":
            continue  # worker processes cut longer pieces: PIECE_CHARS is patched in this process only
        again = files.tokenize(made.path, "bpe:300", tmp_path / name / "tokens", map_shards=counting)
        assert files_of(again.path) == files_of(encoded.path)
        assert not list(tmp_path.glob(f"{name}/*/.tmp-*")), "shards are swept"
    assert counted["read"] > 8 and counted["decontaminated"] > 8 and counted["encoded"] > 12


def test_a_small_corpus_is_not_split_into_shards(tmp_path: Path) -> None:
    def refused(*_: Any) -> list[Any]:
        raise AssertionError("nothing is to be distributed")

    write_texts(tmp_path / "texts")
    made = ingest.ingest(CorpusConfig(sources=("texts",)), tmp_path / "corpora", tmp_path, refused)
    files.tokenize(made.path, "bytes", tmp_path / "tokens", map_shards=refused)


def test_the_shard_of_a_killed_process_is_repeated_and_a_shard_that_always_kills_is_an_error(tmp_path: Path) -> None:
    shards = [Fatal(tmp_path, number, times=number == 3) for number in range(6)]
    assert in_two("ingest", "read", die, shards) == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["3-0"]
    with pytest.raises(
        WorkerDied, match=r"killed 3 processes .* exit code -9 \(killed, perhaps because the memory was full\)"
    ):
        in_two("ingest", "read", die, [Fatal(tmp_path, 8, times=9), *shards])


def test_finished_shards_of_an_interrupted_run_are_reused_unless_their_files_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts")
    cfg = CorpusConfig(sources=("texts",), val_fraction=0.2, holdout_fraction=0.2)
    whole = ingest.ingest(cfg, tmp_path / "whole", tmp_path)
    small_shards(monkeypatch)
    written: list[str] = []
    write = parts._write_shard
    monkeypatch.setattr(
        parts, "_write_shard", lambda shard, *rest: written.append(shard.directory.name) or write(shard, *rest)
    )

    def until_killed(step: str, action: str, function: Any, shards: Any) -> list[Any]:
        [function(shard) for shard in shards[:-1]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(cfg, tmp_path / "corpora", tmp_path, until_killed)
    done = len(written)
    [workplace] = (tmp_path / "corpora").glob(".tmp-parts-*")
    damaged = workplace / written[1] / "text.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = (tmp_path / "texts" / "00.txt").stat()
    os.utime(tmp_path / "texts" / "00.txt", ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert ingest.ingest(cfg, tmp_path / "corpora", tmp_path, backwards).sha256 == whole.sha256
    assert len(written) == done + 2, "the last shard and the damaged one"
    # Size and time are the same: only the bytes show the change.
    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(cfg, tmp_path / "corpora", tmp_path, until_killed)
    text = (tmp_path / "texts" / "00.txt").read_text()
    (tmp_path / "texts" / "00.txt").write_text(text.swapcase())
    os.utime(tmp_path / "texts" / "00.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = ingest.ingest(cfg, tmp_path / "corpora", tmp_path, backwards)
    monkeypatch.undo()
    assert changed == ingest.ingest(cfg, tmp_path / "corpora", tmp_path) and changed.sha256 != whole.sha256


def test_an_error_in_a_shard_is_the_error_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "texts" / "33.txt").write_bytes(b"caf\xe9")
    small_shards(monkeypatch)
    with pytest.raises(CorpusError, match=r"33\.txt is not UTF-8: byte 0xe9 at offset 3"):
        ingest.ingest(CorpusConfig(sources=("texts",)), tmp_path / "corpora", tmp_path, in_two)


def test_a_text_with_few_borders_is_cut_at_the_same_places_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = "".join(letter * 3_000 for letter in "abcdefghijklmnopqrstuvwxyz") + " 日本" * 9_000 + "\n" * 5_000
    (tmp_path / "a.txt").write_text(runs + odd_prose(1, 20_000))
    cfg = CorpusConfig(sources=("a.txt",), split="contiguous", val_fraction=0.1, holdout_fraction=0)
    snapshot = ingest.ingest(cfg, tmp_path / "corpora", tmp_path).path
    monkeypatch.setattr(tokenizer_room, "PIECE_CHARS", 700)
    whole = files.tokenize(snapshot, "gpt2", tmp_path / "whole")
    small_shards(monkeypatch, 10_000)
    shards = encode_shards.plan_shards(snapshot, "train", tmp_path)
    assert len(shards) > 10 and max(shard.num_bytes for shard in shards) <= 10_000
    assert files_of(files.tokenize(snapshot, "gpt2", tmp_path / "cut", map_shards=backwards).path) == files_of(
        whole.path
    )


def test_the_processes_end_with_the_work(tmp_path: Path) -> None:
    import psutil

    before = set(psutil.Process().children())
    in_two("ingest", "read", die, [Fatal(tmp_path, number, times=0) for number in range(2)])
    assert set(psutil.Process().children()) <= before
    assert count_cpus() >= 1

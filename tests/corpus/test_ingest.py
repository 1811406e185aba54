"""Snapshots of a corpus: how ingestion splits, deduplicates and decontaminates documents."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptcore import manifest
from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot, load_snapshot, read_block_entries, read_blocks
from gptcore.corpus.split import SIDES
from gptcore.errors import CheckpointError
from tests.corpus.passages import read_passages
from tests.tiny import odd_prose


def write(directory: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8", newline="")


def snapshot_of(tmp_path: Path, texts: dict[str, str], *source: str, **settings: Any) -> Snapshot:
    """Ingest the texts from a fresh directory into the same state root."""
    base = tmp_path / f"base{len(list(tmp_path.glob('base*')))}"
    write(base, texts)
    settings = {"val_fraction": 0.2, "holdout_fraction": 0.2, "block_bytes": 256, **settings}
    return ingest(CorpusConfig(sources=source or ("*",), **settings), tmp_path / "state" / "corpora", base)


def side_of_blocks(snapshot: Snapshot) -> dict[str, str]:
    return {block.sha256: side for side in ("val", "holdout") for block in read_blocks(snapshot.path, side)}


MANY = {f"{number:03d}.txt": odd_prose(number, 900 + 40 * number) for number in range(100)}


def test_python_docs_fill_all_sides_with_the_default_settings(tmp_path: Path) -> None:
    snapshot = ingest(CorpusConfig(), tmp_path / "corpora", tmp_path)
    assert snapshot.documents + snapshot.dropped["duplicate_documents"] > 70
    assert all(snapshot.blocks[side] for side in SIDES)
    assert sum(snapshot.bytes.values()) + sum(
        snapshot.dropped[key] for key in ("duplicate_bytes", "guard_bytes", "val_guard_bytes")
    ) == sum(source["bytes"] for source in manifest.read_about(snapshot.path)["sources"])


def test_the_description_of_a_snapshot_matches_its_content(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path, MANY)
    about = manifest.verify(snapshot.path)
    assert about["kind"] == "corpus"
    assert about["sources"] == [{"source": "*", "documents": 100, "bytes": sum(len(t.encode()) for t in MANY.values())}]
    assert snapshot.path.name == snapshot.sha256[:16]
    assert load_snapshot(snapshot.path) == snapshot
    for side in SIDES:
        text = (snapshot.path / f"{side}.txt").read_text(encoding="utf-8")
        assert "".join(read_passages(snapshot.path, side)) == text
        assert len(text.encode()) == snapshot.bytes[side]
    for side in ("val", "holdout"):
        found = list(read_blocks(snapshot.path, side))
        assert len(found) == snapshot.blocks[side]
        assert [block.text for block in found] == list(read_passages(snapshot.path, side))
    documents = [json.loads(line) for line in (snapshot.path / "documents.jsonl").open()]
    assert len(documents) == snapshot.documents == 100
    assert {document["name"] for document in documents} == set(MANY)
    for block in read_blocks(snapshot.path, "val"):
        assert block.text in MANY[documents[block.document]["name"]]


def test_all_text_is_on_exactly_one_side(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path, MANY)
    assert not any(snapshot.dropped.values())
    assert sum(snapshot.bytes.values()) == sum(len(text.encode()) for text in MANY.values())
    for side in SIDES:
        for passage in read_passages(snapshot.path, side):
            assert sum(passage in text for text in MANY.values()) == 1


def test_neighbouring_train_blocks_are_one_passage(tmp_path: Path) -> None:
    text = odd_prose(1, 40_000)
    snapshot = snapshot_of(tmp_path, {"a.txt": text})
    found = list(read_passages(snapshot.path, "train"))
    assert len(found) < snapshot.blocks["train"]
    rest = text
    for passage in found:
        before, passage_itself, rest = rest.partition(passage)
        assert passage_itself
        assert before or passage is found[0]


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_every_train_block_that_was_not_cut_for_contamination_is_at_its_listed_offset(tmp_path: Path, way: str) -> None:
    drawn = random.Random(5)
    stock = [odd_prose(number, 260) for number in range(40)]
    texts = {f"{number}.txt": "\n\n".join(drawn.choices(stock, k=9)) + odd_prose(number, 5000) for number in range(20)}
    snapshot = snapshot_of(tmp_path, texts, split=way)
    train = (snapshot.path / "train.txt").read_bytes()
    entries = list(read_block_entries(snapshot.path, "train"))
    assert len(entries) == snapshot.blocks["train"]
    whole = [(entry.offset, entry.bytes, entry.sha256) for entry in entries if entry.offset is not None]
    assert 10 < len(whole) < len(entries)
    for offset, size, sha256 in whole:
        assert hashlib.sha256(train[offset : offset + size]).hexdigest() == sha256
    assert sum(entry.bytes for entry in entries) == snapshot.bytes["train"] + snapshot.dropped["guard_bytes"]


def test_a_snapshot_of_an_earlier_release_is_refused_when_its_train_blocks_are_read(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path, MANY)
    (snapshot.path / "train-blocks.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"train-blocks\.jsonl is missing: an earlier release made this snapshot"):
        list(read_block_entries(snapshot.path, "train"))


def test_the_same_files_give_the_same_bytes_again(tmp_path: Path) -> None:
    first, second = (snapshot_of(tmp_path / root, MANY) for root in ("one", "two"))
    assert first.sha256 == second.sha256
    for side in SIDES:
        assert (first.path / f"{side}.txt").read_bytes() == (second.path / f"{side}.txt").read_bytes()


def test_an_altered_snapshot_is_made_again_from_the_same_sources(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {"one.txt": odd_prose(1, 20_000)}
    snapshot = snapshot_of(tmp_path, texts)
    file = snapshot.path / "holdout.txt"
    intact = file.read_bytes()
    file.write_bytes(bytes(100) + intact[100:])
    assert snapshot_of(tmp_path, texts) == snapshot
    assert file.read_bytes() == intact
    assert str(file) in caplog.text and "made again" in caplog.text


def test_renaming_reordering_copying_and_repacking_change_nothing(tmp_path: Path) -> None:
    texts = list(MANY.values())
    first = snapshot_of(tmp_path, MANY)
    renamed = {f"other/{99 - number}.md": text for number, text in enumerate(texts)}
    lines = "\n".join(json.dumps({"text": text}) for text in reversed(texts))
    for again in (
        snapshot_of(tmp_path, renamed, "other"),
        snapshot_of(tmp_path, {**MANY, "copy.txt": texts[0], "empty.txt": "", "blank.txt": " \n\t\n"}),
        snapshot_of(tmp_path, {"all.jsonl": lines}),
        snapshot_of(tmp_path, MANY, "09?.txt", "*.txt"),
    ):
        assert again == first
    assert len(list((tmp_path / "state" / "corpora").iterdir())) == 1


def test_copies_and_blank_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    more = {"copy.txt": MANY["000.txt"], "empty.txt": "", "blank.txt": " \n\u2003\t" * 200_000}
    snapshot = snapshot_of(tmp_path, {**MANY, **more})
    assert snapshot.documents == 100
    assert snapshot.dropped == {
        "empty_documents": 2,
        "duplicate_documents": 1,
        "duplicate_blocks": 0,
        "duplicate_bytes": len(MANY["000.txt"].encode()),
        "guard_runs": 0,
        "guard_bytes": 0,
        "val_guard_runs": 0,
        "val_guard_bytes": 0,
    }


def test_a_block_that_is_in_two_documents_is_kept_once(tmp_path: Path) -> None:
    common = odd_prose(500, 30_000)
    texts = {"a.txt": common + odd_prose(501, 9000), "b.txt": common + odd_prose(502, 9000)}
    snapshot = snapshot_of(tmp_path, texts)
    assert snapshot.dropped["duplicate_blocks"] > 20
    assert snapshot.dropped["duplicate_bytes"] > 25_000
    found = [block.sha256 for side in ("val", "holdout") for block in read_blocks(snapshot.path, side)]
    assert len(found) == len(set(found))


def test_a_growing_corpus_leaves_every_block_on_its_side(tmp_path: Path) -> None:
    half = dict(list(MANY.items())[::2])
    before, after = snapshot_of(tmp_path, half), snapshot_of(tmp_path, MANY)
    assert before.sha256 != after.sha256
    assert side_of_blocks(before).items() < side_of_blocks(after).items()
    train = (after.path / "train.txt").read_text(encoding="utf-8")
    for side in ("val", "holdout"):
        assert not any(block.text in train for block in read_blocks(before.path, side))


def test_an_edited_document_leaves_the_other_blocks_on_their_sides(tmp_path: Path) -> None:
    text = odd_prose(7, 60_000)
    before = snapshot_of(tmp_path, {"a.txt": text})
    after = snapshot_of(tmp_path, {"a.txt": text[:20_000] + " An insertion. " + text[20_000:]})
    assert len(side_of_blocks(before).items() ^ side_of_blocks(after).items()) <= 6


def test_the_settings_of_the_split_are_part_of_the_identity_of_a_snapshot(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"block_bytes": 512}, {"val_fraction": 0.3}, {"split": "contiguous"}]
    assert len({snapshot_of(tmp_path, MANY, **one).sha256 for one in settings}) == len(settings)


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_no_train_passage_shares_200_bytes_with_another_side(tmp_path: Path, way: str) -> None:
    drawn = random.Random(3)
    stock = [odd_prose(number, 260) for number in range(40)]
    texts = {
        f"{number}.txt": "".join(f"{drawn.choice(stock)}{drawn.random()}\n\n" for _ in range(30))
        for number in range(20)
    }
    snapshot = snapshot_of(tmp_path, texts, split=way)
    assert snapshot.dropped["guard_runs"] > 10
    held = {
        data[start : start + 200]
        for side in ("val", "holdout")
        for passage in read_passages(snapshot.path, side)
        for data in [passage.encode()]
        for start in range(len(data) - 199)
    }
    kept = 0
    for passage in read_passages(snapshot.path, "train"):
        data = passage.encode()
        kept += len(data)
        assert not any(data[start : start + 200] in held for start in range(len(data) - 199))
    assert kept == snapshot.bytes["train"] > 0


@pytest.mark.parametrize("chars", [20_479, 20_480, 99_991, 8191])
def test_contiguous_trains_on_the_first_nine_tenths_of_the_text_as_in_the_book(tmp_path: Path, chars: int) -> None:
    text = odd_prose(chars, chars)
    snapshot = snapshot_of(tmp_path, {"a.txt": text}, split="contiguous", val_fraction=0.1, holdout_fraction=0)
    border = int(0.9 * len(text))
    assert list(read_passages(snapshot.path, "train")) == [text[:border]]
    assert list(read_passages(snapshot.path, "val")) == [text[border:]]
    assert list(read_passages(snapshot.path, "holdout")) == []
    assert "".join(block.text for block in read_blocks(snapshot.path, "val")) == text[border:]


def test_a_contiguous_split_follows_the_order_of_the_sources(tmp_path: Path) -> None:
    texts = {name: odd_prose(number, 5000) for number, name in enumerate("cab")}
    snapshot = snapshot_of(tmp_path, texts, "c", "a", "b", split="contiguous", val_fraction=0.05, holdout_fraction=0.05)
    whole = texts["c"] + texts["a"] + texts["b"]
    assert list(read_passages(snapshot.path, "train")) == [texts["c"], texts["a"], texts["b"][:3500]]
    assert list(read_passages(snapshot.path, "val")) == [whole[13_500:14_250]]
    assert list(read_passages(snapshot.path, "holdout")) == [whole[14_250:]]
    other = snapshot_of(tmp_path, texts, "a", "b", "c", split="contiguous", val_fraction=0.05, holdout_fraction=0.05)
    assert other.sha256 != snapshot.sha256


def test_a_killed_ingestion_leaves_nothing_that_counts_as_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            snapshot_of(tmp_path, MANY)
    corpora = tmp_path / "state" / "corpora"
    assert not list(corpora.iterdir())
    with pytest.raises(CheckpointError, match="never completed"):
        load_snapshot(corpora)
    assert snapshot_of(tmp_path, MANY).documents == 100

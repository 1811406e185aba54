"""Clean blocks, against a brute-force search of every window of the views."""

import random
from pathlib import Path

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import clean_blocks, contamination
from gptcore.corpus.clean_blocks import find_clean_blocks
from gptcore.corpus.contamination import RUN_BYTES, find_contained
from gptcore.corpus.ingest import ingest
from gptcore.corpus.normalize import normalize
from gptcore.corpus.snapshot import Snapshot, read_blocks
from tests.corpus.passages import read_passages
from tests.tiny import odd_prose


def snapshot(tmp_path: Path, name: str, texts: list[str], **settings: object) -> Snapshot:
    base = tmp_path / name
    base.mkdir()
    for number, text in enumerate(texts):
        (base / f"{number:03d}.txt").write_text(text, encoding="utf-8", newline="")
    fractions = {"val_fraction": 0.2, "holdout_fraction": 0.3, "block_bytes": 512, **settings}
    return ingest(CorpusConfig(sources=(".",), **fractions), tmp_path / "corpora", base)  # type: ignore[arg-type]


def windows(data: bytes) -> set[bytes]:
    view = normalize(data)
    return {view[at : at + RUN_BYTES] for at in range(len(view) - RUN_BYTES + 1)}


TEXTS = [odd_prose(seed, 300 + 30 * seed) for seed in range(60)]


def test_the_holdout_of_a_snapshot_is_clean_of_its_own_training_text(tmp_path: Path) -> None:
    own = snapshot(tmp_path, "own", TEXTS)
    clean = find_clean_blocks(own.path, "holdout", [own.path])
    assert clean.excluded_bytes == 0
    assert list(clean.blocks) == list(read_blocks(own.path, "holdout"))
    assert find_clean_blocks(own.path, "holdout", []) == clean


@pytest.mark.parametrize("split", ["hash", "contiguous"])
def test_exactly_the_blocks_that_are_in_another_training_text_are_excluded(tmp_path: Path, split: str) -> None:
    own = snapshot(tmp_path, "own", TEXTS, split=split)
    held_out = [block.text for block in read_blocks(own.path, "holdout")]
    other_texts = [odd_prose(900 + seed, 2000) for seed in range(10)]
    other_texts[0] += held_out[0]  # a block in the middle of another text
    other_texts[1] = held_out[1][:110] + other_texts[1]  # too short a run to count
    other_texts[2] = other_texts[2][:700] + held_out[2][20:260] + other_texts[2][700:]
    other = snapshot(tmp_path, "other", other_texts, val_fraction=0.01, holdout_fraction=0, split="contiguous")
    clean = find_clean_blocks(own.path, "holdout", [own.path, other.path])
    learned = set().union(
        *(windows(text.encode()) for at in (own.path, other.path) for text in read_passages(at, "train"))
    )
    every = list(read_blocks(own.path, "holdout"))
    expected = [block for block in every if not windows(block.text.encode()) & learned]
    assert list(clean.blocks) == expected and len(expected) < len(every)
    lost = [block for block in every if block not in expected]
    assert clean.excluded_bytes == sum(len(block.text.encode()) for block in lost)


def test_a_block_shorter_than_a_run_is_excluded_if_the_other_text_contains_all_of_it(tmp_path: Path) -> None:
    short = [f"Note {seed}: {odd_prose(seed, 40 + seed)}" for seed in range(60)]
    own = snapshot(tmp_path, "own", short)
    held_out = [block.text for block in read_blocks(own.path, "holdout")]
    other_texts = [odd_prose(99, 3000), f"Before it. {held_out[0]} After it. {odd_prose(98, 400)}", held_out[1][:-1]]
    other = snapshot(tmp_path, "other", other_texts, val_fraction=0.01, holdout_fraction=0, split="contiguous")
    clean = find_clean_blocks(own.path, "holdout", [other.path])
    assert [block.text for block in clean.blocks] == held_out[1:]
    assert clean.excluded_bytes == len(held_out[0].encode())


@pytest.mark.parametrize("most_pairs", [20_000, 0])
def test_needles_of_any_length_are_found_at_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_pairs: int
) -> None:
    monkeypatch.setattr(contamination, "_MOST_PAIRS", most_pairs)
    text = odd_prose(7, 3 << 19).encode()  # several chunks
    draw = random.Random(8)
    lengths = [1, 3, 11, 14, 15, 16, 30, 31, 46, 47, 48, 94, 95, 96, 127, 128]
    edge = 1 << 19
    there = {text[edge - back : edge - back + length] for length in lengths for back in (0, 1, length // 2, length)}
    there |= {text[at : at + length] for length in lengths for at in [draw.randrange(len(text) - 200)]}
    there |= {text[:length] for length in lengths} | {text[-length:] for length in lengths}
    absent = {needle[:-1] + b"\x00" for needle in there if len(needle) > 1} | {b"\x01" * 100}
    (tmp_path / "text").write_bytes(text)
    assert find_contained(there | absent, tmp_path / "text") == {needle for needle in there if needle in text}
    assert find_contained([], tmp_path / "text") == set()


NOTES = [odd_prose(seed, 200 + 2 * seed) for seed in range(300)]


def test_of_old_and_of_new_blocks_the_clean_ones_with_the_lowest_hashes_are_taken(tmp_path: Path) -> None:
    own = snapshot(tmp_path, "own", NOTES)
    every = list(read_blocks(own.path, "holdout"))
    ages = [number % 3 > 0 for number in range(len(every))]
    other = snapshot(tmp_path, "other", [block.text + odd_prose(7, 300) for block in every[::4]], holdout_fraction=0.0)
    learned = set().union(*(windows(text.encode()) for text in read_passages(other.path, "train")))
    clean = find_clean_blocks(own.path, "holdout", [own.path, other.path], 15_000, ages)
    excluded = 0
    for age in (True, False):
        order = sorted((b for b, old in zip(every, ages) if old == age), key=lambda block: block.sha256)
        sizes = {block.sha256: len(block.text.encode()) for block in order}
        taken = [block for block, old in zip(clean.blocks, clean.is_old) if old == age]
        left = [block for block in order if not windows(block.text.encode()) & learned]
        count = next((n for n in range(len(left)) if sum(sizes[b.sha256] for b in left[: n + 1]) > 15_000), len(left))
        assert sorted(taken, key=lambda block: block.sha256) == left[: max(count, 25)]
        first = order[: order.index(left[max(count, 25)])] if len(left) > max(count, 25) else order
        excluded += sum(sizes[block.sha256] for block in first if block not in left)
        weight = sum(sizes.values()) / sum(sizes[block.sha256] for block in first)
        assert {w for w, old in zip(clean.weights, clean.is_old) if old == age} == {weight}
        assert (weight > 1) == age, "there is more old text than is scored, and less new text"
    assert clean.excluded_bytes == excluded > 0
    assert [block for block in every if block in clean.blocks] == list(clean.blocks)


def test_up_to_the_limit_all_clean_blocks_are_taken(tmp_path: Path) -> None:
    own = snapshot(tmp_path, "own", TEXTS)
    other = snapshot(tmp_path, "other", TEXTS[::2], val_fraction=0.01, holdout_fraction=0, split="contiguous")
    every = find_clean_blocks(own.path, "holdout", [own.path, other.path])
    assert find_clean_blocks(own.path, "holdout", [own.path, other.path], 1_000_000) == every
    assert every.excluded_bytes > 0 and set(every.weights) == {1.0}


def test_the_search_continues_until_enough_blocks_are_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = snapshot(tmp_path, "own", NOTES)
    by_hash = sorted(read_blocks(own.path, "holdout"), key=lambda block: block.sha256)
    known = [block.text for block in by_hash[:20]]
    other = snapshot(tmp_path, "other", known, val_fraction=0.01, holdout_fraction=0, split="contiguous")
    searched = []
    search = clean_blocks._are_clean
    monkeypatch.setattr(clean_blocks, "_are_clean", lambda *given: searched.append(len(given[0])) or search(*given))
    clean = find_clean_blocks(own.path, "holdout", [other.path], 1)
    assert {block.sha256 for block in clean.blocks} == {block.sha256 for block in by_hash[20:45]}
    assert len(searched) > 1 and sum(searched) < len(by_hash), "no more than needed"

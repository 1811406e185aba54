"""Differences between two snapshots, against changes made by hand and divergences known in advance."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gptcore.config import CorpusConfig
from gptcore.corpus.diff import (
    Delta,
    compare_snapshots,
    count_documents,
    find_old_blocks,
    measure_lost_share,
    pick_new_blocks,
)
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import read_block_entries, read_blocks
from gptcore.corpus.split import SIDES
from gptcore.errors import CheckpointError
from gptcore.tokens.divergence import compute_token_divergence, compute_train_divergence
from gptcore.tokens.encode import encode_side
from gptcore.tokens.files import tokenize
from tests.tiny import odd_prose

TEXTS = {f"{number:02d}.txt": odd_prose(number, 600 + 50 * number) for number in range(40)} | {
    "long.txt": odd_prose(99, 50_000)
}
TOTAL = sum(len(text.encode()) for text in TEXTS.values())


def snapshot(tmp_path: Path, texts: dict[str, str], *source: str, **settings: Any) -> Path:
    base = tmp_path / f"base{len(list(tmp_path.glob('base*')))}"
    for name, text in texts.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text, encoding="utf-8", newline="")
    settings = {"val_fraction": 0.2, "holdout_fraction": 0.2, "block_bytes": 512, **settings}
    return ingest(CorpusConfig(sources=source or ("*",), **settings), tmp_path / "corpora", base).path


def test_added_removed_and_changed_documents_are_counted_with_their_bytes(tmp_path: Path) -> None:
    added, edited, removed = odd_prose(50, 1000), odd_prose(51, 1200), TEXTS["01.txt"]
    now = {**TEXTS, "more.txt": added, "02.txt": edited}
    del now["01.txt"]
    delta = compare_snapshots(snapshot(tmp_path, TEXTS), snapshot(tmp_path, now))
    new_bytes = len((added + edited).encode())
    removed_bytes = len((removed + TEXTS["02.txt"]).encode())
    assert delta == Delta(
        documents_added=1,
        documents_removed=1,
        documents_changed=1,
        documents_kept=39,
        bytes=TOTAL + new_bytes - removed_bytes,
        new_bytes=new_bytes,
        old_bytes=TOTAL,
        removed_bytes=removed_bytes,
        has_same_documents=False,
    )
    assert delta.new_share == new_bytes / (TOTAL + new_bytes - removed_bytes)
    assert delta.removed_share == removed_bytes / TOTAL


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_renaming_copying_and_reordering_do_not_count_as_changes(tmp_path: Path, way: str) -> None:
    renamed = {f"other/{99 - n}.md": text for n, text in enumerate(TEXTS.values())}
    lines = "\n".join(json.dumps({"text": text}) for text in reversed(TEXTS.values()))
    before = snapshot(tmp_path, TEXTS, split=way)
    for after in (
        snapshot(tmp_path, renamed, "other", split=way),
        snapshot(tmp_path, {**TEXTS, "copy.txt": TEXTS["03.txt"], "empty.txt": ""}, split=way),
        snapshot(tmp_path, {"all.jsonl": lines}, split=way),
    ):
        assert compare_snapshots(before, after) == Delta(0, 0, 0, 41, TOTAL, 0, TOTAL, 0, True)
        assert pick_new_blocks(before, after, 10**9) == []


def test_other_settings_for_blocks_and_split_make_no_text_new(tmp_path: Path) -> None:
    before = snapshot(tmp_path, TEXTS)
    for settings in ({"block_bytes": 256}, {"val_fraction": 0.3}, {"split": "contiguous"}):
        assert compare_snapshots(before, snapshot(tmp_path, TEXTS, **settings)).new_share == 0


def test_text_that_is_edited_reformatted_or_cut_differently_is_not_lost(tmp_path: Path) -> None:
    before = snapshot(tmp_path, TEXTS)
    whole = "".join(TEXTS.values())
    for text, settings in (
        (whole.replace("\n", "\r\n"), {}),
        ("".join(f"> {line}\n" for line in whole.upper().split("\n")), {"block_bytes": 2048}),
        (whole.replace("model", "system"), {"split": "contiguous"}),
    ):
        after = snapshot(tmp_path, {"all.txt": text}, **settings)
        assert compare_snapshots(before, after).removed_share > 0.5
        assert measure_lost_share(before, after) < 0.3
    assert measure_lost_share(before, before) == 0


def test_the_lost_share_is_that_of_the_removed_text(tmp_path: Path) -> None:
    log = "".join(
        f"2026-11-{n // 100:02d} 10:{n % 60:02d} INFO worker {n % 7}: request {n * 7919} was served\n"
        for n in range(3000)
    )
    lines = log.splitlines(keepends=True)
    before = snapshot(tmp_path, {"a.txt": "".join(lines[:1100]), "b.txt": "".join(lines[1100:])})
    after = snapshot(tmp_path, {"a.txt": "".join(lines[:1100]), "other.txt": odd_prose(3, 100_000)})
    assert measure_lost_share(before, after) == pytest.approx(1900 / 3000, abs=0.05)
    assert count_documents(before) == count_documents(after) == {"*": 2}


def test_held_out_blocks_are_old_if_the_snapshot_before_held_them_out_or_held_their_whole_document(
    tmp_path: Path,
) -> None:
    more = {f"more{n}.txt": odd_prose(100 + n, 900) for n in range(40)}
    edited = TEXTS["long.txt"].replace(" ", " An insertion. ", 1)
    before, after = snapshot(tmp_path, TEXTS), snapshot(tmp_path, {**TEXTS, **more, "long.txt": edited})
    own, blocks = (list(read_blocks(path, "holdout")) for path in (before, after))
    assert find_old_blocks(before, before, own) == [True] * len(own)
    is_old = find_old_blocks(before, after, blocks)
    assert [block.text in {block.text for block in own} for block in blocks] == is_old
    assert 0 < sum(is_old) < len(is_old)
    recut = snapshot(tmp_path, {**TEXTS, **more}, block_bytes=256)
    cut_again = list(read_blocks(recut, "holdout"))
    is_new = [block.text in more.values() for block in cut_again]
    assert find_old_blocks(before, recut, cut_again) == [not new for new in is_new] and any(is_new)


def test_an_edit_of_a_long_document_makes_only_the_blocks_around_it_new(tmp_path: Path) -> None:
    text = TEXTS["long.txt"]
    edited = text[:20_000] + " An insertion. " + text[20_000:]
    before, after = snapshot(tmp_path, TEXTS), snapshot(tmp_path, {**TEXTS, "long.txt": edited})
    delta = compare_snapshots(before, after)
    assert (delta.documents_changed, delta.documents_added, delta.documents_kept) == (1, 0, 40)
    assert 0 < delta.new_bytes - delta.removed_bytes == len(" An insertion. ")
    found = pick_new_blocks(before, after, 10**9)
    assert 1 <= len(found) <= 3
    assert any(" An insertion. " in block.text for block in found)
    assert sum(len(block.text.encode()) for block in found) == delta.new_bytes < 8 * 512


def test_text_that_moved_from_one_document_to_another_is_not_new(tmp_path: Path) -> None:
    """Blocks count, not files: both halves, which are cut where blocks are cut, existed before."""
    before = snapshot(tmp_path, TEXTS)
    entries = [entry for side in SIDES for entry in read_block_entries(before, side)]
    text = TEXTS["long.txt"]
    paragraphs = text.split("\n\n")
    turned = "\n\n".join(paragraphs[len(paragraphs) // 2 :] + paragraphs[: len(paragraphs) // 2])
    delta = compare_snapshots(before, snapshot(tmp_path, {**TEXTS, "long.txt": turned}))
    assert delta.documents_changed == 1
    assert delta.new_bytes < 4 * max(entry.bytes for entry in entries if entry.bytes < 4096) < len(text) / 4


def test_new_blocks_come_from_every_side_with_their_own_text(tmp_path: Path) -> None:
    more = {f"more{n}.txt": odd_prose(100 + n, 900) for n in range(40)}
    before, after = snapshot(tmp_path, TEXTS), snapshot(tmp_path, {**TEXTS, **more})
    found = pick_new_blocks(before, after, 10**9)
    assert sorted(block.text for block in found) == sorted(more.values())
    entries = {entry.sha256: side for side in SIDES for entry in read_block_entries(after, side)}
    assert {entries[block.sha256] for block in found} == set(SIDES)
    documents = [json.loads(line)["sha256"] for line in (after / "documents.jsonl").open()]
    assert all(documents[block.document] == block.sha256 for block in found), "each document is one block"


def test_a_choice_of_new_blocks_is_repeatable_within_its_size_and_from_all_sides(tmp_path: Path) -> None:
    more = {f"more{n}.txt": odd_prose(100 + n, 900) for n in range(60)}
    before, after = snapshot(tmp_path, TEXTS), snapshot(tmp_path, {**TEXTS, **more})
    chosen = pick_new_blocks(before, after, 30_000)
    assert pick_new_blocks(before, after, 30_000) == chosen
    assert 27_000 < sum(len(block.text.encode()) for block in chosen) <= 30_000
    entries = {entry.sha256: side for side in SIDES for entry in read_block_entries(after, side)}
    assert {entries[block.sha256] for block in chosen} == set(SIDES)
    fewer = pick_new_blocks(before, after, 10_000)
    assert {block.sha256 for block in fewer} < {block.sha256 for block in chosen}
    assert len(pick_new_blocks(before, after, 1)) == 1


def test_a_train_block_cut_for_contamination_is_counted_but_not_scored(tmp_path: Path) -> None:
    before = snapshot(tmp_path, TEXTS, split="contiguous")
    holdout = (before / "holdout.txt").read_text(encoding="utf-8")
    carrier = odd_prose(200, 500) + holdout[:400] + odd_prose(201, 500)
    after = snapshot(tmp_path, {"00": carrier, **TEXTS}, split="contiguous")
    cut = [entry for entry in read_block_entries(after, "train") if entry.offset is None]
    assert len(cut) == 1
    assert cut[0].sha256 not in {block.sha256 for block in pick_new_blocks(before, after, 10**9)}
    assert compare_snapshots(before, after).new_bytes == len(carrier.encode())


def test_a_snapshot_of_an_earlier_release_is_not_compared(tmp_path: Path) -> None:
    before = snapshot(tmp_path, TEXTS)
    (before / "train-blocks.jsonl").unlink()
    with pytest.raises(CheckpointError, match="an earlier release made this snapshot"):
        compare_snapshots(before, before)


def ids(*values: int) -> list[np.ndarray]:
    return [np.array(values, np.uint16)]


def test_the_divergence_of_equal_distributions_is_zero_whatever_the_lengths() -> None:
    assert compute_token_divergence(ids(0, 1, 1), ids(1, 0, 1, 1, 1, 0), 5) == 0.0


def test_the_divergence_of_disjoint_distributions_is_one_bit() -> None:
    assert compute_token_divergence(ids(0, 1, 1), ids(2, 3), 5) == 1.0


def test_the_divergence_equals_the_value_computed_by_hand() -> None:
    """P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4): (log2(4/3) + log2(2/3)/2 + log2(2)/2) / 2."""
    by_hand = (np.log2(4 / 3) + np.log2(2 / 3) / 2 + 1 / 2) / 2
    assert compute_token_divergence(ids(0), ids(0, 1), 2) == pytest.approx(by_hand, abs=1e-15)


def test_the_divergence_does_not_depend_on_the_chunks_of_ids() -> None:
    whole, other = np.arange(100) % 7, [np.arange(50) % 5]
    assert compute_token_divergence([whole[:3], whole[3:60], whole[60:]], other, 7) == compute_token_divergence(
        [whole], other, 7
    )


texts = arrays(np.uint16, st.integers(1, 60), elements=st.integers(0, 9))


@given(texts, texts)
def test_the_divergence_is_symmetric_between_zero_and_one(one: np.ndarray, other: np.ndarray) -> None:
    there, back = compute_token_divergence([one], [other], 10), compute_token_divergence([other], [one], 10)
    assert there == back
    assert 0 <= there <= 1
    assert (there < 1e-12) == np.allclose(*(np.bincount(ids, minlength=10) / len(ids) for ids in (one, other)))


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_two_train_sides_are_compared_with_the_tokenizer_of_the_older_snapshot(tmp_path: Path, name: str) -> None:
    before = snapshot(tmp_path, TEXTS)
    after = snapshot(tmp_path, {**TEXTS, "digits.txt": "".join(f"{n * 7919}\n" for n in range(30_000))})
    old, new = (tokenize(path, name, tmp_path / "tokens") for path in (before, after))
    assert (old.tokenizer_sha256 == new.tokenizer_sha256) == (name == "bytes")
    expected = compute_token_divergence(
        [old.side("train")], encode_side(after, "train", old.path / "tokenizer"), old.n_vocab
    )
    assert compute_train_divergence(old, new, after) == expected > 0.01
    assert compute_train_divergence(old, old, before) == 0


def test_a_side_encoded_again_has_the_ids_of_its_token_file(tmp_path: Path) -> None:
    made = tokenize(snapshot(tmp_path, TEXTS), "bpe:300", tmp_path / "tokens")
    path = next((tmp_path / "corpora").iterdir())
    assert np.concatenate(list(encode_side(path, "val", made.path / "tokenizer"))).tolist() == made.side("val").tolist()


def test_snapshots_with_kept_copies_are_compared(tmp_path: Path) -> None:
    first = snapshot(tmp_path, TEXTS, duplicates="keep")
    more = {"copy.txt": TEXTS["05.txt"], "odd.txt": odd_prose(77, 900)}
    second = snapshot(tmp_path, {**TEXTS, **more}, duplicates="keep")
    delta = compare_snapshots(first, second)
    assert (delta.documents_added, delta.documents_removed) == (1, 0) and delta.removed_bytes == 0
    assert 0 < delta.new_bytes < 10_000
    assert pick_new_blocks(first, second, 1_000)

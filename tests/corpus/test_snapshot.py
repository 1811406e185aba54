"""The sample of held-out blocks that is scored: which blocks it holds, and what a growing corpus does to it."""

from pathlib import Path

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import MIN_SAMPLED_BLOCKS, Snapshot, read_blocks, sample_blocks
from tests.tiny import prose


def grown(directory: Path, documents: int, split: str = "hash") -> Snapshot:
    """Return the snapshot of so many documents, the first of which are always the same."""
    text = directory / f"text-{documents}"
    text.mkdir()
    for number in range(documents):
        (text / f"{number}.txt").write_text(prose(number, 1500))
    fractions = {"val_fraction": 0.2, "holdout_fraction": 0.3}
    cfg = CorpusConfig(sources=(str(text),), block_bytes=256, split=split, **fractions)
    return ingest(cfg, directory / "corpora", directory)


@pytest.mark.parametrize(("side", "split"), [("holdout", "hash"), ("val", "hash"), ("holdout", "contiguous")])
def test_a_sample_holds_the_blocks_with_the_lowest_hashes_in_the_order_of_the_text(
    tmp_path: Path, side: str, split: str
) -> None:
    snapshot = grown(tmp_path, 20, split)
    every = list(read_blocks(snapshot.path, side))
    by_hash = sorted(every, key=lambda block: block.sha256)
    sample = sample_blocks(snapshot.path, side, 16_000)
    assert sample == [block for block in every if block in by_hash[: len(sample)]]
    size = sum(len(block.text.encode()) for block in sample)
    assert MIN_SAMPLED_BLOCKS < len(sample) < len(every)
    assert size <= 16_000 < size + len(by_hash[len(sample)].text.encode())


def test_text_up_to_the_limit_is_scored_as_a_whole(tmp_path: Path) -> None:
    snapshot = grown(tmp_path, 3)
    every = list(read_blocks(snapshot.path, "holdout"))
    for limit in (None, snapshot.bytes["holdout"]):
        assert sample_blocks(snapshot.path, "holdout", limit) == every


def test_a_sample_has_enough_blocks_for_the_gate_however_large_they_are(tmp_path: Path) -> None:
    snapshot = grown(tmp_path, 12)
    assert len(sample_blocks(snapshot.path, "holdout", 1)) == MIN_SAMPLED_BLOCKS


def test_the_sample_of_a_corpus_that_grows_hardly_changes(tmp_path: Path) -> None:
    before, after = grown(tmp_path, 40), grown(tmp_path, 44)
    old, new = ({block.sha256 for block in sample_blocks(one.path, "holdout", 20_000)} for one in (before, after))
    known = {block.sha256 for block in read_blocks(before.path, "holdout")}
    assert len(old & new) >= 0.8 * len(old) and new - known
    assert new & known <= old, "only new blocks come into the sample"

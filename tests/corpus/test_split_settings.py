"""Settings of the split that the configuration leaves empty: what is chosen for a text, and what is kept."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import split
from gptcore.corpus.clean_blocks import find_clean_blocks
from gptcore.corpus.ingest import ingest
from gptcore.corpus.split import SplitSettings, fill_settings
from gptcore.errors import ConfigError, CorpusError
from gptcore.evaluation.compare import MIN_BLOCKS
from tests.tiny import WORDS, prose

Texts = Callable[[int, int], list[str]]


def one_text(seed: int, size: int) -> list[str]:
    return [prose(seed, size // 4)[:size]]


def notes(seed: int, size: int) -> list[str]:
    """Return texts of 3 kB each: whole documents would leave a side empty."""
    text = prose(seed, size // 4)
    return [text[start : start + 3000] for start in range(0, size, 3000)]


def long_paragraphs(seed: int, size: int) -> list[str]:
    return ["\n\n".join(prose(seed + number, 150, WORDS).replace("\n\n", " ") for number in range(size // 750))]


def chosen_for(texts: list[str], **given: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what is chosen for these texts, and the number of blocks on each side."""
    with tempfile.TemporaryDirectory() as name:
        for number, text in enumerate(texts):
            (Path(name) / f"{number}.txt").write_text(text)
        snapshot = ingest(CorpusConfig(sources=("*.txt",), **given), Path(name) / "corpora", Path(name))
        return snapshot.split, snapshot.blocks


def test_the_reference_text_of_python_is_split_so_that_the_gate_can_decide(tmp_path: Path) -> None:
    snapshot = ingest(CorpusConfig(), tmp_path / "corpora", tmp_path)
    clean = find_clean_blocks(snapshot.path, "holdout", [snapshot.path])
    assert len(clean.blocks) >= split.ENOUGH_BLOCKS > MIN_BLOCKS
    smaller, larger = (ingest(CorpusConfig(block_bytes=size), tmp_path, tmp_path).split for size in (256, 2048))
    assert smaller["holdout_fraction"] < snapshot.split["holdout_fraction"] < larger["holdout_fraction"]


@pytest.mark.parametrize("make", [one_text, notes, long_paragraphs])
@pytest.mark.parametrize("size", [10_000, 20_000, 50_000])
def test_no_side_of_a_small_text_is_empty_and_the_holdout_has_the_blocks_that_the_gate_needs(
    make: Texts, size: int
) -> None:
    for seed in range(4):
        settings, counts = chosen_for(make(seed, size))
        assert all(counts[side] >= 5 for side in split.SIDES), (seed, settings, counts)
        assert counts["holdout"] >= (15 if size == 10_000 else MIN_BLOCKS), (seed, settings, counts)


def test_more_text_gets_larger_blocks_and_smaller_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [chosen_for(one_text(1, size))[0] for size in (10_000, 60_000, 400_000, 1_300_000)]
    for key in ("block_bytes", "val_fraction", "holdout_fraction"):
        values = [settings[key] for settings in chosen]
        assert values == sorted(values, reverse=key != "block_bytes") and len(set(values)) > 2
    assert chosen[-1] == SplitSettings("hash", 2048, 0.05, 0.05, "drop").to_record()
    monkeypatch.setattr(split, "LARGE_BYTES", 400_000)
    assert chosen_for(one_text(1, 400_000))[0] == chosen[-1] != chosen[2], "the blocks of a large text are not counted"


def test_given_keys_stay_and_a_fraction_that_is_chosen_beside_a_given_one_leaves_text_to_train_on() -> None:
    texts = one_text(1, 20_000)
    assert chosen_for(texts, block_bytes=512)[0]["block_bytes"] == 512
    settings, counts = chosen_for(texts, holdout_fraction=0.9)
    assert settings["holdout_fraction"] == 0.9 and settings["val_fraction"] <= 0.05 and counts["train"]
    settings, counts = chosen_for(texts, holdout_fraction=0.0)
    assert counts["val"] >= split.ENOUGH_BLOCKS and not counts["holdout"]
    settings, counts = chosen_for(texts, split="contiguous")
    assert counts["holdout"] >= split.ENOUGH_BLOCKS


def test_what_a_snapshot_recorded_fills_the_empty_keys_only() -> None:
    record = SplitSettings("hash", 192, 0.15, 0.25, "drop").to_record()
    kept = fill_settings(CorpusConfig(block_bytes=512), record, "the record")
    assert (kept.block_bytes, kept.val_fraction, kept.holdout_fraction) == (512, 0.15, 0.25)
    assert fill_settings(CorpusConfig(), {}, "no record") == CorpusConfig()
    with pytest.raises(ConfigError, match=r"the record: val_fraction 0.15 and holdout_fraction 0.9 add up"):
        fill_settings(CorpusConfig(holdout_fraction=0.9), record, "the record")


def test_a_text_that_is_too_small_is_refused_with_the_size_that_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A short note about nothing.")
    with pytest.raises(CorpusError, match=r"(?s)by chance.*unlikely from about \d+ kB .* 10 kB .*are empty when"):
        ingest(CorpusConfig(sources=("a.txt",)), tmp_path / "corpora", tmp_path)

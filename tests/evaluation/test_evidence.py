"""What a run says if the held-out text is too small for the gate."""

import re
from pathlib import Path

import pytest

from gptcore.evaluation.compare import MIN_BLOCKS
from gptcore.evaluation.evidence import explain_shortage
from tests.tiny import make_snapshot

LARGE = {"block_bytes": 2048, "val_fraction": 0.05, "holdout_fraction": 0.05}


def test_each_fix_that_is_suggested_for_a_small_holdout_gives_the_blocks_that_the_gate_needs(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path, 60_000, **LARGE)
    said = explain_shortage(snapshot)
    found = re.fullmatch(
        r"holdout has (\d+) blocks; the gate needs 20 that are clean for both models: set corpus.block_bytes to (\d+) "
        r"or corpus.holdout_fraction to ([0-9.]+), or add about ([0-9,]+) kB of text",
        said,
    )
    assert found and int(found[1]) == snapshot.blocks["holdout"] < MIN_BLOCKS, said
    more = 60_000 + int(int(found[4].replace(",", "")) * 60_000 / (sum(snapshot.bytes.values()) / 1000))
    for number, (words, fix) in enumerate(
        [(60_000, {"block_bytes": int(found[2])}), (60_000, {"holdout_fraction": float(found[3])}), (more, {})]
    ):
        fixed = make_snapshot(tmp_path / str(number), words, **{**LARGE, **fix})
        assert fixed.blocks["holdout"] >= MIN_BLOCKS and explain_shortage(fixed) == ""


@pytest.mark.parametrize("holdout", [0.2, 0.0])
def test_what_is_said_about_clean_blocks_names_the_side_that_is_reported(tmp_path: Path, holdout: float) -> None:
    side = "holdout" if holdout else "val"
    snapshot = make_snapshot(tmp_path, 9000, holdout_fraction=holdout)
    assert explain_shortage(snapshot) == explain_shortage(snapshot, 20) == ""
    said = explain_shortage(snapshot, 19)
    assert said.startswith(f"{side} has 19 blocks that are clean for both models; the gate needs 20: set corpus.")
    assert f"corpus.{side}_fraction to 0.25, or add about" in said

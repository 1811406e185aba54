"""Held-out text that was altered, or learned from by way of another document. (FAULTS 23)"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.releases.gate import Verdict
from flows.state import StateRoot
from gptcore import manifest
from gptcore.corpus import Snapshot, block_entries, blocks, passages
from gptcore.errors import CheckpointError
from gptcore.text import split
from tests.flows.judging import sentences
from tests.flows.test_gate import (
    champion_version,
    judged,
    register,
    scores,
    snapshot,
    summary,
    text_snapshot,
    trained,
)
from tests.gptcore.test_corpus import MANY, prose, snapshot_of

__all__ = ["judged", "register", "scores", "snapshot", "trained"]


def test_an_altered_holdout_is_not_scored_on(
    root: StateRoot, snapshot: Snapshot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    challenger = register("good")
    holdout = snapshot.path / "holdout.txt"
    whole = holdout.read_text()
    holdout.write_text(whole.replace("ba", "do"))
    with pytest.raises(CheckpointError) as raised:
        judged(challenger)
    listed = json.loads((snapshot.path / "manifest.json").read_text())["files"]["holdout.txt"]["sha256"]
    for part in (listed, manifest.sha256_of_file(holdout), "it was altered", f"Delete the directory {snapshot.path}"):
        assert part in str(raised.value)
    kept = summary(root, challenger)
    assert (champion_version(root), kept["verdict"], kept["gate_kind"]) == ("1", None, "holdout altered")
    holdout.write_text(whole)
    assert judged(challenger).promoted


def test_held_out_text_that_is_copied_into_a_training_document_is_removed_there_and_counted(
    root: StateRoot, snapshot: Snapshot
) -> None:
    block = max((block.text for block in blocks(snapshot.path, "holdout")), key=len)
    assert len(block) > 200
    again = text_snapshot(root, "again", sentences(1, 700) + f"\n\nQuoted: {block} {sentences(5, 100)}")
    assert block in "".join(one.text for one in blocks(again.path, "holdout"))
    assert again.dropped["guard_bytes"] >= len(block.encode())
    assert block not in (again.path / "train.txt").read_text()


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_holdout_text_copied_into_train_is_removed_and_counted(tmp_path: Path, way: str) -> None:
    before = snapshot_of(tmp_path, MANY, split=way)
    stolen = max([block.text for block in blocks(before.path, "holdout")][-5:], key=len)
    carriers = (f"{prose(seed, 700)}<<{stolen}>>{prose(seed, 800)}" for seed in range(900, 1000))
    carrier = next(one for one in carriers if split.side(hashlib.sha256(one.encode()).hexdigest(), 0.2, 0.2) == "train")
    after = snapshot_of(tmp_path, {"0.txt": carrier, **MANY}, split=way)
    train = list(passages(after.path, "train"))
    assert any(passage.endswith("<<") for passage in train)
    assert any(passage.startswith(">>") for passage in train)
    assert not any(stolen in passage for passage in train)
    assert (after.dropped["guard_runs"], after.dropped["guard_bytes"]) == (1, len(stolen.encode()))
    entries = list(block_entries(after.path, "train"))
    assert sum(entry.bytes for entry in entries) == after.bytes["train"] + len(stolen.encode())
    assert sum(entry.offset is None for entry in entries) == 1

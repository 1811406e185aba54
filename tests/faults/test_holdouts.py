"""Held-out text that was altered, or copied into a training document."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cards.verdict import Verdict
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.corpus import split
from gptcore.corpus.snapshot import Snapshot, read_block_entries, read_blocks
from gptcore.errors import CheckpointError
from tests.corpus.passages import read_passages
from tests.corpus.test_ingest import MANY, snapshot_of
from tests.registry.test_gate import (
    champion_version,
    judged,
    register,
    scores,
    snapshot,
    summary,
    trained,
)
from tests.tiny import odd_prose

__all__ = ["judged", "register", "scores", "snapshot", "trained"]


def test_an_altered_holdout_is_not_used_for_scores(
    root: StateRoot, snapshot: Snapshot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    challenger = register("good")
    holdout = snapshot.path / "holdout.txt"
    whole = holdout.read_text()
    holdout.write_text(whole.swapcase())
    with pytest.raises(CheckpointError) as raised:
        judged(challenger)
    listed = json.loads((snapshot.path / "manifest.json").read_text())["files"]["holdout.txt"]["sha256"]
    for part in (listed, manifest.sha256_of_file(holdout), "it was altered", f"Delete the directory {snapshot.path}"):
        assert part in str(raised.value)
    kept = summary(root, challenger)
    assert (champion_version(root), kept["verdict"], kept["gate_kind"]) == ("1", None, "holdout altered")
    holdout.write_text(whole)
    assert judged(challenger).promoted


@pytest.mark.parametrize("way", ["hash", "contiguous"])
def test_holdout_text_copied_into_train_is_removed_and_counted(tmp_path: Path, way: str) -> None:
    before = snapshot_of(tmp_path, MANY, split=way)
    stolen = max([block.text for block in read_blocks(before.path, "holdout")][-5:], key=len)
    carriers = (f"{odd_prose(seed, 700)}<<{stolen}>>{odd_prose(seed, 800)}" for seed in range(900, 1000))
    carrier = next(
        one for one in carriers if split.side_of(hashlib.sha256(one.encode()).hexdigest(), 0.2, 0.2) == "train"
    )
    after = snapshot_of(tmp_path, {"0.txt": carrier, **MANY}, split=way)
    train = list(read_passages(after.path, "train"))
    assert any(passage.endswith("<<") for passage in train)
    run = stolen.rstrip(". \n")  # a run ends with a letter
    assert any(passage.startswith(f"{stolen.removeprefix(run)}>>") for passage in train)
    assert not any(run in passage for passage in train)
    assert (after.dropped["guard_runs"], after.dropped["guard_bytes"]) == (1, len(run.encode()))
    entries = list(read_block_entries(after.path, "train"))
    assert sum(entry.bytes for entry in entries) == after.bytes["train"] + len(run.encode())
    assert sum(entry.offset is None for entry in entries) == 1

"""Ten nights of a corpus that grows, is edited, renamed, copied and thinned out: what is scored was never learned.

Every night the real ingest, guard and gate are at work. What the gate scores on is then looked up byte by byte in the
training texts as they were on the nights of their trainings, by comparing strings, which shares no code with the guard.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.releases import gate, registry
from flows.releases.gate import judge
from flows.state import StateRoot
from gptcore.config import GateConfig
from gptcore.corpus import Block, Snapshot, blocks
from tests.flows.judging import NAME, register, scores_of, sentences, snapshot_of, weights_after

RUN_BYTES = 200
SETTINGS = {"block_bytes": 1024, "val_fraction": 0.1, "holdout_fraction": 0.25}
UPDATES = (10, 20, 15, 30, 40, 35, 50, 60, 45, 80)
"""What each night's model has behind it: some nights it is worse than the champion."""


class Corpus:
    """A directory of text, and what people do to it."""

    def __init__(self, path: Path) -> None:
        self.path, self.draw, self.written = path, random.Random(5), 0
        path.mkdir()

    def some(self, count: int) -> list[Path]:
        return self.draw.sample(sorted(self.path.iterdir()), count)

    def grow(self, last_night: Snapshot | None = None) -> None:
        for _ in range(6):
            self.written += 1
            (self.path / f"{self.written:03}.txt").write_text(sentences(self.written, 140))

    def edit(self, last_night: Snapshot | None = None) -> None:
        """One word in every paragraph of half of the documents: most of each block stands as it stood before."""
        for path in self.some(len(list(self.path.iterdir())) // 2):
            paragraphs = path.read_text().split("\n\n")
            path.write_text("\n\n".join(text.replace(" ", f" {self.draw.random():.3f} ", 1) for text in paragraphs))

    def rename(self, last_night: Snapshot | None = None) -> None:
        for path in self.some(4):
            path.rename(path.with_name(f"renamed-{path.name}"))

    def duplicate(self, last_night: Snapshot | None = None) -> None:
        for path in self.some(3):
            shutil.copy(path, path.with_name(f"copy-{path.name}"))

    def delete(self, last_night: Snapshot | None = None) -> None:
        for path in self.some(3):
            path.unlink()

    def quote(self, last_night: Snapshot | None = None) -> None:
        """New documents take whole passages from what was held out the night before, in the middle of paragraphs."""
        assert last_night is not None
        held_out = [block.text for block in blocks(last_night.path, "holdout")]
        for path, text in zip(self.some(5), self.draw.sample(held_out, 5)):
            path.write_text(f"{path.read_text()} As was said: {text.strip()} {sentences(900, 20)}")


def runs_of(text: bytes) -> set[bytes]:
    """Every stretch of 200 bytes."""
    return {text[begin : begin + RUN_BYTES] for begin in range(len(text) - RUN_BYTES + 1)}


def learned(block: Block, text: bytes, runs: set[bytes]) -> bool:
    """Whether the block, or 200 bytes of it, stand in the text."""
    return block.text.encode() in text or not runs.isdisjoint(runs_of(block.text.encode()))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[Block]]:
    """What the gate has given to each model to score."""
    given: list[list[Block]] = []
    evaluate = gate.evaluate_blocks
    monkeypatch.setattr(gate, "evaluate_blocks", lambda *args: given.append(list(args[2])) or evaluate(*args))
    return given


@pytest.mark.slow
def test_in_ten_nights_no_scored_block_nor_a_run_of_it_was_in_either_models_training_text(
    root: StateRoot, tmp_path: Path, scored: list[list[Block]]
) -> None:
    corpus = Corpus(tmp_path / "nights")
    nights: list[list[Callable[..., None]]] = [
        [corpus.grow, corpus.grow],
        [corpus.grow],
        [corpus.edit],
        [corpus.rename],
        [corpus.duplicate],
        [corpus.delete, corpus.edit],
        [corpus.quote],
        [corpus.grow, corpus.rename],
        [corpus.edit, corpus.duplicate],
        [corpus.quote, corpus.delete, corpus.grow],
    ]
    MlflowClient(root.tracking_uri).create_registered_model(NAME)
    texts: dict[str, tuple[bytes, set[bytes]]] = {}
    snapshot, promoted, excluded_bytes, guarded_bytes = None, [], 0, 0
    for changes, weights in zip(nights, weights_after(UPDATES)):
        before = snapshot
        for change in changes:
            change(before)
        snapshot = snapshot_of(root, corpus.path, **SETTINGS)
        if before is not None and changes in ([corpus.rename], [corpus.duplicate]):
            assert snapshot.sha256 == before.sha256
        champion = registry.champion_of(root, NAME)
        version = register(root, weights, snapshot)
        text = (snapshot.path / "train.txt").read_bytes()
        texts[version] = text, runs_of(text)
        scored.clear()
        verdict = judge(root, NAME, version, snapshot, scores_of(snapshot), GateConfig(), False)
        models = [version] if champion is None else [version, str(champion.version)]
        assert len(scored) == len(models) and scored[0] == scored[-1] and len(scored[0]) == verdict.blocks >= 20
        for block in scored[0]:
            assert not any(learned(block, *texts[model]) for model in models), (version, block)
        promoted += [version] if verdict.promoted else []
        excluded_bytes += verdict.excluded_bytes
        guarded_bytes += snapshot.dropped["guard_bytes"]
    assert 1 < len(promoted) < len(nights), promoted
    assert excluded_bytes > 0 and guarded_bytes > 0

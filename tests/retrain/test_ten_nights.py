"""Ten nights of a corpus that grows, is edited, renamed, copied and thinned out: no scored text was trained on.

Every night runs the real ingest, contamination check and gate. The test then looks up the blocks that the gate scores,
letter by letter, in the training texts as they were on the nights of the trainings. It compares strings and shares no
code with the contamination check.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.registry import gate, versions
from flows.registry.gate import judge
from flows.state.root import StateRoot
from gptcore.config import GateConfig
from gptcore.corpus.snapshot import Block, Snapshot, read_blocks
from tests.registry.judging import NAME, register, scores_of, snapshot_of, weights_after
from tests.tiny import prose

RUN_LETTERS = 128
SETTINGS = {"block_bytes": 1024, "val_fraction": 0.1, "holdout_fraction": 0.25}
UPDATES = (10, 20, 15, 30, 40, 35, 50, 60, 45, 80)
"""The updates of each night's model: on some nights it is worse than the champion."""


class Corpus:
    """A directory of text, and the ways in which people change it."""

    def __init__(self, path: Path) -> None:
        self.path, self.draw, self.written = path, random.Random(5), 0
        path.mkdir()

    def some(self, count: int) -> list[Path]:
        return self.draw.sample(sorted(self.path.iterdir()), count)

    def grow(self, last_night: Snapshot | None = None) -> None:
        for _ in range(6):
            self.written += 1
            (self.path / f"{self.written:03}.txt").write_text(prose(self.written, 1400))

    def edit(self, last_night: Snapshot | None = None) -> None:
        """Change one word in every paragraph of half of the documents. Most of each block stays as it was."""
        for path in self.some(len(list(self.path.iterdir())) // 2):
            paragraphs = path.read_text().split("\n\n")
            path.write_text("\n\n".join(text.replace(" ", f" {self.draw.random():.3f} ", 1) for text in paragraphs))

    def rename(self, last_night: Snapshot | None = None) -> None:
        for path in self.some(4):
            path.rename(path.with_name(f"renamed-{path.name}"))

    def duplicate(self, last_night: Snapshot | None = None) -> None:
        """Copy documents, two of them with other line ends and as a quotation."""
        forms: list[Callable[[str], str]] = [str, lambda text: text.replace("\n", "\r\n"), quoted]
        for path, form in zip(self.some(3), forms):
            path.with_name(f"copy-{path.name}").write_text(form(path.read_text()), newline="")

    def delete(self, last_night: Snapshot | None = None) -> None:
        for path in self.some(3):
            path.unlink()

    def quote(self, last_night: Snapshot | None = None) -> None:
        """Quote whole passages of the last night's holdout in five documents, in the middle of paragraphs."""
        assert last_night is not None
        held_out = [block.text for block in read_blocks(last_night.path, "holdout")]
        for path, text in zip(self.some(5), self.draw.sample(held_out, 5)):
            path.write_text(f"{path.read_text()} As was said: {quoted(text.upper())} {prose(900, 200)}")


def quoted(text: str) -> str:
    return "".join(f"> {line}\n" for line in text.strip().splitlines())


def letters_of(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def runs_of(letters: str) -> set[str]:
    """Return every run of 128 letters and digits."""
    return {letters[begin : begin + RUN_LETTERS] for begin in range(len(letters) - RUN_LETTERS + 1)}


def learned(block: Block, letters: str, runs: set[str]) -> bool:
    """Whether the text with these letters contains the block, or 128 letters of it."""
    return letters_of(block.text) in letters or not runs.isdisjoint(runs_of(letters_of(block.text)))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[Block]]:
    """The blocks that the gate has given to each model to score."""
    given: list[list[Block]] = []
    evaluate = gate.evaluate_blocks
    monkeypatch.setattr(gate, "evaluate_blocks", lambda *args: given.append(list(args[2])) or evaluate(*args))
    return given


@pytest.mark.slow
def test_in_ten_nights_neither_model_was_trained_on_a_scored_block_or_on_128_letters_of_it(
    root: StateRoot, tmp_path: Path, scored: list[list[Block]]
) -> None:
    corpus = Corpus(tmp_path / "nights")
    nights: list[list[Callable[..., None]]] = [
        [corpus.grow, corpus.grow, corpus.grow],
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
    texts: dict[str, tuple[str, set[str]]] = {}
    snapshot, promoted, excluded_bytes, guarded_bytes = None, [], 0, 0
    for changes, weights in zip(nights, weights_after(UPDATES)):
        before = snapshot
        for change in changes:
            change(before)
        snapshot = snapshot_of(root, corpus.path, **SETTINGS)
        if before is not None and changes in ([corpus.rename], [corpus.duplicate]):
            assert snapshot.sha256 == before.sha256
        champion = versions.find_champion(root, NAME)
        version = register(root, weights, snapshot)
        letters = letters_of((snapshot.path / "train.txt").read_text())
        texts[version] = letters, runs_of(letters)
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

"""Hold a run whose text looks like an accident: much of the text is gone, or something else has taken its place.

A directory that is not mounted, a failed export or a log in the wrong place would otherwise become the next night's
model. A held run trains nothing and ends as Failed with the name Held, until a person accepts the text. The text is
compared with that of the newest finished training. So a text that was accepted and trained on is not questioned again.
accepted.json records an accepted text, because its training may be paused or fail.

    runs/<pipeline>/accepted.json   {"corpus_sha256": "...", "since": "4"}
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.config.pipelines import Pipeline
from flows.state.root import StateRoot
from gptcore.corpus.diff import Delta, compare_snapshots, count_documents, measure_lost_share, pick_new_blocks
from gptcore.corpus.snapshot import Snapshot, read_blocks
from gptcore.errors import CheckpointError
from gptcore.manifest import write_atomically
from gptcore.records import read_record

MAX_SURPRISE = 3.0
"""Bits per byte by which the champion may be worse on the new text than on its own holdout, if most text is new."""
_SAMPLE_BYTES = 32_768
_MOST_NAMED = 3  # sources that a sentence names
_KINDS = {
    "letters": re.compile(r"[^\W\d_]"),
    "digits": re.compile(r"\d"),
    "not ASCII": re.compile(r"[^\x00-\x7f]"),
    "control characters": re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]"),
}


@dataclass(frozen=True)
class Accepted:
    """A text that a person accepted."""

    corpus_sha256: str
    since: str
    """The newest finished version then. The record is void once a newer training has finished."""


def explain_hold(
    pipeline: Pipeline, snapshot: Snapshot, before: Path, delta: Delta, surprise: float | None, since: str
) -> str | None:
    """Return a sentence that says why the text looks like an accident. None if it does not.

    `before` is the snapshot of version `since`. `surprise` is by how many bits per byte the champion is worse on the
    new text than on its own holdout, None if it is unknown.
    """
    limit = pipeline.retrain.max_removed_share
    if delta.removed_share > limit and (lost := measure_lost_share(before, snapshot.path)) > limit:
        loss = _describe_loss(before, snapshot.path, delta)
        return f"{lost:.1%} of the text of version {since} is gone: {loss}"
    if surprise is not None and surprise > MAX_SURPRISE and delta.new_share > limit:
        worse = f"the champion is worse on it by {surprise:.2f} bits per byte"
        kinds = _describe_characters(before, snapshot.path)
        return f"{delta.new_share:.1%} of the text is new since version {since} and unlike that: {worse}; {kinds}"
    return None


def is_accepted(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, since: str) -> bool:
    """Whether a person accepted this text, or one whose text is mostly still there and most of this one."""
    accepted = read_record(_path(root, pipeline), Accepted)
    if accepted is None or accepted.since != since:
        return False
    if accepted.corpus_sha256 == snapshot.sha256:
        return True
    before, limit = root.fetch_corpus(accepted.corpus_sha256), pipeline.retrain.max_removed_share
    try:
        delta = compare_snapshots(before, snapshot.path)
    except (CheckpointError, OSError):  # the accepted text was deleted
        return False
    return max(delta.removed_share, delta.new_share) <= limit


def accept(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, since: str) -> None:
    """Record that a person accepted the text."""
    path = _path(root, pipeline)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(Accepted(snapshot.sha256, since))) + "\n")


def _path(root: StateRoot, pipeline: Pipeline) -> Path:
    return root.path / "runs" / pipeline.name / "accepted.json"


def _describe_loss(before: Path, after: Path, delta: Delta) -> str:
    """Return how many documents are gone, and the sources that lost most of them."""
    then, now = count_documents(before), count_documents(after)
    counts = (
        f"of {then.total():,} documents, {delta.documents_removed:,} are missing, {delta.documents_changed:,} changed"
    )
    lost = (then - now).most_common(_MOST_NAMED)
    return "; ".join([counts, *(f"{source} had {then[source]:,} and has {now[source]:,}" for source, _ in lost)])


def _describe_characters(before: Path, after: Path) -> str:
    """Return the share of each kind of characters in the new text, and in the text before."""
    new = "".join(block.text for block in pick_new_blocks(before, after, _SAMPLE_BYTES))
    old = "".join(block.text for block in read_blocks(before, "val"))
    shares = ((kind, _measure_share(kind, old), _measure_share(kind, new)) for kind in _KINDS)
    return ", ".join(f"{kind} {now:.0%} (before: {then:.0%})" for kind, then, now in shares)


def _measure_share(kind: str, text: str) -> float:
    return len(_KINDS[kind].findall(text)) / max(1, len(text))

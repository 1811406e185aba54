"""Hold a run whose text looks like an accident: much of the text is gone, or something else has taken its place.

A directory that is not mounted, a failed export or a log in the wrong place would otherwise become the next night's
model. A held run trains nothing and ends as Failed with the name Held, until a person accepts the text. The text is
compared with that of the newest finished training. So a text that was accepted and trained on is not questioned again.
An accepted text is recorded, because its training may be paused or fail. `gptflow doctor` reads why a run was held.

    runs/<pipeline>/accepted.json   {"corpus_sha256": "...", "since": "4"}
    runs/<pipeline>/held.json       {"at": "2026-03-01T02:31:07+00:00", "reason": "63.0% of the text ..."}
"""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from flows.config.pipelines import Pipeline
from flows.state.root import StateRoot
from gptcore.corpus.diff import Delta, compare_snapshots, count_documents, measure_lost_share, pick_new_blocks
from gptcore.corpus.snapshot import Snapshot, sample_blocks
from gptcore.errors import CheckpointError
from gptcore.manifest import write_atomically
from gptcore.records import read_record

MAX_SURPRISE = 3.0
"""Bits per byte by which the champion may be worse on the new text than on its own holdout, if most of the text is new.

Measured with champions of four texts, in bits per byte:

    new text                     Python's reference    Python code    Shakespeare    reference, hardly trained
    more of the same kind                       0.0            0.4            0.0                          0.0
    Python code                          1.1 to 1.2            0.0     5.2 to 5.3                          0.7
    other English prose and documents    0.9 to 2.6     0.8 to 2.5     0.9 to 6.8                   0.7 to 1.4
    German, French                       3.9 to 4.4     4.1 to 4.5     5.0 to 5.6                   1.5 to 1.6
    logs                                 3.3 to 4.6     2.5 to 3.4    9.1 to 14.2                   2.3 to 4.3
    CSV of numbers, hex, base64          7.0 to 9.8     3.7 to 8.0   12.9 to 20.0                   5.5 to 5.9
    Chinese, Russian                    9.2 to 10.1   18.4 to 21.0   21.0 to 22.8                   6.8 to 7.9

A champion that has hardly learned anything notices only what hardly uses the letters of its text.
"""
_SAMPLE_BYTES = 32_768
_OLD_BYTES = 1_000_000
_MAX_NAMED = 3  # sources that a sentence names
_KINDS = {
    "letters": re.compile(r"[^\W\d_]"),
    "digits": re.compile(r"\d"),
    "characters beyond ASCII": re.compile(r"[^\x00-\x7f]"),
    "control characters": re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]"),
}
_NOTABLE = 0.1  # a smaller change of a share is not worth a word


@dataclass(frozen=True)
class Accepted:
    """A text that a person accepted."""

    corpus_sha256: str
    since: str
    """The newest finished version then. The record is void once a newer training has finished."""


@dataclass(frozen=True)
class Held:
    """The last run that was held."""

    at: datetime
    reason: str


def explain_hold(
    pipeline: Pipeline, snapshot: Snapshot, before: Path, delta: Delta, surprise: float | None, since: str
) -> str | None:
    """Return a sentence that says why the text looks like an accident. None if it does not.

    `before` is the snapshot of version `since`. `surprise` is by how many bits per byte the champion is worse on the
    new text than on its own holdout, None if it is unknown.
    """
    limit, reasons = pipeline.retrain.max_removed_share, []
    if delta.removed_share > limit and (lost := measure_lost_share(before, snapshot.path)) > limit:
        loss = _describe_loss(before, snapshot.path, delta)
        reasons.append(f"{lost:.1%} of the text of version {since} is gone: {loss}")
    if surprise is not None and surprise > MAX_SURPRISE and delta.new_share > limit:
        worse = f"the champion is worse on it by {surprise:.2f} bits per byte"
        why = ", ".join([worse, *_compare_characters(before, snapshot.path)])
        reasons.append(f"{delta.new_share:.1%} of the text is new and unlike that of version {since}: {why}")
    return "; ".join(reasons) or None


def is_accepted(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, since: str) -> bool:
    """Whether a person accepted this text, or one whose text is mostly still there and most of this one."""
    accepted = read_accepted(root, pipeline.name)
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
    _write(_accepted_path(root, pipeline.name), asdict(Accepted(snapshot.sha256, since)))


def read_accepted(root: StateRoot, pipeline: str) -> Accepted | None:
    """Return the text that was accepted last. None if there is no record, or if a power cut damaged it."""
    return read_record(_accepted_path(root, pipeline), Accepted)


def record_held(root: StateRoot, pipeline: str, reason: str) -> None:
    """Record that a run of the pipeline has just been held."""
    _write(_held_path(root, pipeline), {"at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason})


def read_held(root: StateRoot, pipeline: str) -> Held | None:
    """Return the last run that was held. None if there is no record, or if a power cut damaged it."""
    return read_record(_held_path(root, pipeline), Held)


def _write(path: Path, body: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(body) + "\n")


def _accepted_path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "runs" / pipeline / "accepted.json"


def _held_path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "runs" / pipeline / "held.json"


def _describe_loss(before: Path, after: Path, delta: Delta) -> str:
    """Return how many documents are gone, and the sources that lost most of them."""
    then, now = count_documents(before), count_documents(after)
    counts = (
        f"of {then.total():,} documents, {delta.documents_removed:,} are missing, {delta.documents_changed:,} changed"
    )
    lost = (then - now).most_common(_MAX_NAMED)
    return "; ".join([counts, *(f"{source} had {then[source]:,} and has {now[source]:,}" for source, _ in lost)])


def _compare_characters(before: Path, after: Path) -> list[str]:
    """Return the kinds of characters whose share of the new text is notably another one than before."""
    new = "".join(block.text for block in pick_new_blocks(before, after, _SAMPLE_BYTES))
    old = "".join(block.text for block in sample_blocks(before, "val", _OLD_BYTES))
    shares = [(kind, _measure_share(kind, old), _measure_share(kind, new)) for kind in _KINDS]
    return [
        f"{kind} are {now:.0%} of it (before: {then:.0%})" for kind, then, now in shares if abs(now - then) >= _NOTABLE
    ]


def _measure_share(kind: str, text: str) -> float:
    return len(_KINDS[kind].findall(text)) / max(1, len(text))

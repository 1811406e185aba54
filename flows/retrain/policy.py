"""Whether a run has a reason to train: it compares text and settings with those of the newest finished training.

The verdict on that training does not matter, so that a rejected or rolled-back training is not repeated every night.
Changed settings are always a reason. `retrain.when` says when a changed text is a reason. See gptcore.corpus.diff for
how two snapshots are compared.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.loading import load
from flows.registry.tags import VersionTags
from flows.retrain import hold
from flows.retrain.changed_settings import describe_changed_settings
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.corpus.diff import Delta, compare_snapshots, pick_new_blocks
from gptcore.corpus.snapshot import Snapshot
from gptcore.devices import choose_usable_device, release_memory
from gptcore.errors import CheckpointError, ConfigError
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.sections import parse_recorded
from gptcore.tokens.directory import Tokens
from gptcore.tokens.divergence import compute_train_divergence
from gptcore.tokens.files import load_tokens

DRIFT_BYTES = 32_768
"""Maximum of new text that the champion is scored on, in bytes."""

Row = tuple[str, str]


@dataclass(frozen=True)
class Reason:
    """Whether a run trains, and why."""

    must_train: bool
    text: str
    """The reason, in a sentence."""
    since: str | None = None
    """Version of the newest finished training, which text and settings are compared with."""
    changes: tuple[Row, ...] = ()
    """What changed in the text since that training, for people to read."""
    hold: str | None = None
    """Why the text looks like an accident, so that a person has to accept it. None if it does not."""


def find_reason(
    root: StateRoot, pipeline: Pipeline, settings: str, snapshot: Snapshot, left_open: Collection[str] = ()
) -> Reason:
    """Compare text and settings with those of the newest finished training. `settings` is a settings_key.

    `left_open` names the keys of `train` that were requested as `auto`: another machine's value is not a change.
    """
    newest = versions.find_newest_finished(root, pipeline)
    if newest is None:
        return Reason(True, "it is the first training")
    number = str(newest.version)
    reason = replace(_compare_text(root, pipeline, snapshot, newest), since=number)
    if VersionTags.from_tags(newest.tags).settings_key != settings:
        return replace(reason, must_train=True, text=_describe_settings(root, pipeline, newest, left_open))
    if pipeline.retrain.when == "always":
        return replace(reason, must_train=True, text="retrain.when is always")
    return reason


def measure_divergence(
    root: StateRoot, pipeline: Pipeline, since: str, tokens: Tokens, snapshot: Snapshot
) -> tuple[Row, ...]:
    """Measure how far the token distribution of the training text has moved since version `since`.

    Return one row with the Jensen-Shannon divergence in bits. Empty if the text is the same, or if the version's tokens
    were deleted.
    """
    tags = VersionTags.from_tags(versions.resolve(root, f"models:/{pipeline.model_name}/{since}").tags)
    if tags.corpus_sha256 == snapshot.sha256:
        return ()
    try:
        before = load_tokens(root.fetch_tokens(tags.tokens_sha256 or ""))
        moved = compute_train_divergence(before, tokens, snapshot.path)
    except CheckpointError:
        return ()
    return (("token distribution", f"Jensen-Shannon divergence {moved:.5f} bits"),)


def _compare_text(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, newest: ModelVersion) -> Reason:
    """Return whether the text has changed since the newest training, and whether that is a reason to train."""
    number, sha256 = newest.version, VersionTags.from_tags(newest.tags).corpus_sha256 or ""
    if sha256 == snapshot.sha256:
        unchanged = (("text", f"the same as version {number} learned from"),)
        return Reason(False, f"nothing changed since version {number} of {newest.name}", changes=unchanged)
    before = root.fetch_corpus(sha256)
    try:
        manifest.verify(before)
        delta = compare_snapshots(before, snapshot.path)
    except CheckpointError as error:
        return Reason(True, f"the text changed since version {number}; how much is unknown: {error}")
    if delta.has_same_documents:
        same = (("text", f"the same documents as version {number} learned from; this release splits them differently"),)
        return Reason(False, f"nothing changed since version {number} of {newest.name}", changes=same)
    drift, drift_row = _measure_drift(root, pipeline, snapshot, newest)
    rows = (*_build_rows(delta), drift_row)
    why = hold.explain_hold(pipeline, snapshot, before, delta, surprise=drift, since=str(number))
    if why is not None and hold.is_accepted(root, pipeline, snapshot, since=str(number)):
        why = None
    return replace(_apply_policy(pipeline, delta, drift, number), changes=rows, hold=why)


def _apply_policy(pipeline: Pipeline, delta: Delta, drift: float | None, number: Any) -> Reason:
    """Return whether a changed text is a reason to train, by `retrain.when`. `drift` is in bits per byte."""
    retrain = pipeline.retrain
    new = f"{delta.new_share:.1%} of the text is new since version {number}"
    if retrain.when == "share":
        above = delta.new_share > retrain.min_new_share
        sign = "more than" if above else "no more than"
        return Reason(above, f"{new}, {sign} retrain.min_new_share {retrain.min_new_share:.1%}")
    if retrain.when == "drift" and drift is not None:
        above = drift > retrain.drift_margin
        sign = "more than" if above else "no more than"
        drifted = f"on new text the champion is worse by {drift:.4f} bits per byte"
        return Reason(above, f"{drifted}, {sign} retrain.drift_margin {retrain.drift_margin:g}")
    if retrain.when == "drift" and not delta.new_bytes:
        return Reason(False, f"no text is new since version {number}, so the drift of the champion is unknown")
    counts = (delta.documents_added, delta.documents_changed, delta.documents_removed)
    return Reason(True, f"{new}: {counts[0]:,} documents added, {counts[1]:,} changed, {counts[2]:,} removed")


def _measure_drift(
    root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, newest: ModelVersion
) -> tuple[float | None, Row]:
    """Measure how much worse the champion is on new text than on its own holdout, in bits per byte.

    Return the difference and a row that explains it. The difference is None if it is unknown.
    """
    label = "champion on the new text"
    champion = versions.find_champion(root, pipeline.model_name)
    if champion is None:
        return None, (label, "there is no champion")
    tags = VersionTags.from_tags(champion.tags)
    if tags.corpus_sha256 is None:
        return None, (label, "unknown: the champion's text is not known")
    seen = root.fetch_corpus(tags.corpus_sha256)
    try:
        manifest.read_about(seen)
        chosen = pick_new_blocks(seen, snapshot.path, DRIFT_BYTES)
        loaded = load(root, champion, str(choose_usable_device(pipeline.train.device)))
    except (CheckpointError, versions.RegistryError) as error:
        return None, (label, f"unknown: {error}")
    own = tags.holdout_bits_per_byte
    if not chosen or own is None:
        return None, (label, "no text is new" if not chosen else "unknown: the champion has no score of its own")
    scored = evaluate_blocks(loaded.model, loaded.tokenizer, chosen, loaded.device, "new")
    del loaded
    release_memory()  # for the trainer, a process of its own
    worse = scored.bits_per_byte - own
    size = f"{scored.bytes:,} bytes"
    return worse, (label, f"{scored.bits_per_byte:.4f} bits per byte on {size}, {own:.4f} on its own holdout")


def _build_rows(delta: Delta) -> tuple[Row, ...]:
    counts = {
        "added": delta.documents_added,
        "changed": delta.documents_changed,
        "removed": delta.documents_removed,
        "kept": delta.documents_kept,
    }
    new = f"{delta.new_bytes:,} of {delta.bytes:,} bytes, {delta.new_share:.1%}; {delta.removed_bytes:,} bytes removed"
    return (("documents", ", ".join(f"{count:,} {change}" for change, count in counts.items())), ("new text", new))


def _describe_settings(root: StateRoot, pipeline: Pipeline, newest: ModelVersion, left_open: Collection[str]) -> str:
    """Return a sentence that names the settings that differ from those of the newest training."""
    sentence = f"the settings are not those of version {newest.version}"
    try:
        lineage = versions.read_lineage(root, newest)
        recorded = parse_recorded(RunConfig, lineage["run_config"], "config.json") if "run_config" in lineage else None
        changed = describe_changed_settings(pipeline, lineage["config"], recorded, left_open)
    except (versions.RegistryError, ConfigError, KeyError):
        return sentence
    return f"{sentence}: {changed}" if changed else sentence

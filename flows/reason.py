"""Whether a run has a reason to train: its text and settings against those of the newest finished training.

What became of that training does not matter, so that a rejected or rolled-back night is not repeated every night. Other
settings are always a reason; of another text, `retrain.when` says when it is one. How two snapshots are compared stands
in gptcore.text.delta.
"""

from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from flows.pipelines import Pipeline
from flows.releases import registry
from flows.releases.loading import load
from flows.state import StateRoot
from flows.tracking import flat
from gptcore import manifest
from gptcore.config import EXECUTION_KEYS
from gptcore.corpus import Snapshot
from gptcore.data import Tokens, load_tokens
from gptcore.errors import CheckpointError
from gptcore.evaluate import evaluate_blocks
from gptcore.text.delta import Delta, compare_snapshots, new_blocks, train_divergence

DRIFT_BYTES = 32_768
"""Of new text, at most, that the champion is scored on."""
_NAMED = 3  # differing keys that a sentence names

Row = tuple[str, str]


@dataclass(frozen=True)
class Reason:
    """Why a run trains, or does not."""

    must_train: bool
    text: str
    """A sentence."""
    since: str | None = None
    """Version of the newest finished training: what text and settings are compared with."""
    changes: tuple[Row, ...] = ()
    """What changed in the text since, for people to read."""


def weigh(root: StateRoot, pipeline: Pipeline, settings: str, snapshot: Snapshot) -> Reason:
    """Compares text and settings with those of the newest finished training. `settings` is a settings_key."""
    newest = registry.newest_finished(root, pipeline)
    if newest is None:
        return Reason(True, "it is the first training")
    number = str(newest.version)
    reason = replace(_of_text(root, pipeline, snapshot, newest), since=number)
    if newest.tags.get("settings_key") != settings:
        return replace(reason, must_train=True, text=_settings_sentence(root, pipeline, newest))
    if pipeline.retrain.when == "always":
        return replace(reason, must_train=True, text="retrain.when is always")
    return reason


def divergence(root: StateRoot, pipeline: Pipeline, since: str, tokens: Tokens, snapshot: Snapshot) -> tuple[Row, ...]:
    """How far the token distribution of the training text has moved since a version, as a row.

    None if it is the same text, or if that version's tokens are gone.
    """
    tags = registry.resolve(root, f"models:/{pipeline.model_name}/{since}").tags
    if tags.get("corpus_sha256") == snapshot.sha256:
        return ()
    try:
        before = load_tokens(root.token_files(tags.get("tokens_sha256", "")))
        moved = train_divergence(before, tokens, snapshot.path)
    except CheckpointError:
        return ()
    return (("token distribution", f"Jensen-Shannon divergence {moved:.5f} bits"),)


def _of_text(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, newest: ModelVersion) -> Reason:
    number, sha256 = newest.version, newest.tags.get("corpus_sha256", "")
    if sha256 == snapshot.sha256:
        unchanged = (("text", f"the same as version {number} learned from"),)
        return Reason(False, f"nothing changed since version {number} of {newest.name}", changes=unchanged)
    before = root.corpus(sha256)
    try:
        manifest.verify(before)
        delta = compare_snapshots(before, snapshot.path)
    except CheckpointError as error:
        return Reason(True, f"the text changed since version {number}; how much is unknown: {error}")
    drift, drift_row = _drift(root, pipeline, snapshot, newest)
    rows = (*_delta_rows(delta), drift_row)
    return replace(_by_policy(pipeline, delta, drift, number), changes=rows)


def _by_policy(pipeline: Pipeline, delta: Delta, drift: float | None, number: Any) -> Reason:
    policy = pipeline.retrain
    new = f"{delta.new_share:.1%} of the text is new since version {number}"
    if policy.when == "share":
        above = delta.new_share > policy.min_new_share
        sign = "more than" if above else "no more than"
        return Reason(above, f"{new}, {sign} retrain.min_new_share {policy.min_new_share:.1%}")
    if policy.when == "drift" and drift is not None:
        above = drift > policy.drift_margin
        sign = "more than" if above else "no more than"
        drifted = f"on new text the champion is worse by {drift:.4f} bits per byte"
        return Reason(above, f"{drifted}, {sign} retrain.drift_margin {policy.drift_margin:g}")
    if policy.when == "drift" and not delta.new_bytes:
        return Reason(False, f"no text is new since version {number}, so nothing says that the champion drifts")
    counts = (delta.documents_added, delta.documents_changed, delta.documents_removed)
    return Reason(True, f"{new}: {counts[0]:,} documents added, {counts[1]:,} changed, {counts[2]:,} removed")


def _drift(root: StateRoot, pipeline: Pipeline, snapshot: Snapshot, newest: ModelVersion) -> tuple[float | None, Row]:
    """How much worse the champion is on text that it has not seen than on its own holdout, in bits per byte."""
    label = "champion on the new text"
    champion = registry.champion_of(root, pipeline.model_name)
    if champion is None:
        return None, (label, "there is no champion")
    seen = root.corpus(champion.tags.get("corpus_sha256", ""))
    try:
        chosen = new_blocks(seen, snapshot.path, DRIFT_BYTES)
        loaded = load(root, champion)
    except (CheckpointError, registry.RegistryError) as error:
        return None, (label, f"unknown: {error}")
    own = champion.tags.get("holdout_bits_per_byte")
    if not chosen or own is None:
        return None, (label, "there is none" if not chosen else "unknown: it has no score of its own")
    scored = evaluate_blocks(loaded.model, loaded.tokenizer, chosen, "cpu", "new")
    worse = scored.bits_per_byte - float(own)
    size = f"{scored.bytes:,} bytes"
    return worse, (label, f"{scored.bits_per_byte:.4f} bits per byte on {size}, {float(own):.4f} on its own holdout")


def _delta_rows(delta: Delta) -> tuple[Row, ...]:
    counts = {
        "added": delta.documents_added,
        "changed": delta.documents_changed,
        "removed": delta.documents_removed,
        "kept": delta.documents_kept,
    }
    new = f"{delta.new_bytes:,} of {delta.bytes:,} bytes, {delta.new_share:.1%}; {delta.removed_bytes:,} bytes removed"
    return (("documents", ", ".join(f"{count:,} {what}" for what, count in counts.items())), ("new text", new))


def _settings_sentence(root: StateRoot, pipeline: Pipeline, newest: ModelVersion) -> str:
    """Which settings are others than those of the newest training."""
    sentence = f"the settings are not those of version {newest.version}"
    try:
        then = flat(registry.lineage_of(root, newest.name, str(newest.version))["config"])
    except (registry.RegistryError, KeyError):
        return sentence
    now = flat(pipeline.model_dump(mode="json"))
    outside = ("retrain.", "gate.", "sample.", "corpus.sources", *(f"train.{key}" for key in EXECUTION_KEYS))
    differing = [
        f"{key} {then.get(key, 'absent')} -> {now[key]}"
        for key in now
        if key in then and then[key] != now[key] and not key.startswith(outside)
    ]
    named = ", ".join(differing[:_NAMED]) + (f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else "")
    return f"{sentence}: {named}" if named else sentence

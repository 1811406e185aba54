"""The gate: whether a registered version becomes the champion.

Champion and challenger are scored here, with their own tokenizers, on the same held-out blocks, and only on those that
neither of them can have learned by heart. Everything the verdict rests on is kept on the version as tags. How two
models are compared stands in gptcore.judging.compare, which blocks are clean in gptcore.text.clean; registering stands
in release.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from flows.releases.ancestry import line_of, texts_of
from flows.releases.champion import GATE, promote, withdrawal
from flows.releases.loading import load
from flows.releases.registry import SOURCES_OVERRIDDEN, RegistryError, champion_of, resolve
from flows.sharing import advisory
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import Loaded
from gptcore.config import GateConfig
from gptcore.corpus import Block, Snapshot, blocks
from gptcore.errors import CheckpointError
from gptcore.evaluate import evaluate_blocks
from gptcore.judging.compare import MIN_BLOCKS, Comparison, compare, gains
from gptcore.judging.dossier import Scores, reported_side
from gptcore.text.clean import CleanBlocks, clean_blocks

WITHDRAWN = "withdrawn"


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about a challenger, and why."""

    promoted: bool
    kind: str
    """better, worse, tie within noise, not finite, insufficient evidence; of a first version beats unigram, does not
    beat unigram, not finite; or sources overridden, withdrawn."""
    reason: str
    """A sentence with the numbers."""
    bits_per_byte: float
    """NaN where no block was clean for both."""
    champion_bits_per_byte: float | None = None
    """The champion's on the same text; None where there was none."""
    champion_version: str | None = None
    low: float | None = None
    """Bounds of the improvement in bits per byte, each one-sided at the configured confidence."""
    high: float | None = None
    blocks: int = 0
    bytes: int = 0
    """Of text that was scored."""
    excluded_bytes: int = 0
    """Of held-out text that one of the two may have learned from."""
    unknown: str = ""
    """Which training text could not be looked into, and why; empty where all of it could."""
    comparison: Comparison | None = field(default=None, repr=False, compare=False)
    """What was compared, where champion and challenger were scored in this very process."""
    gains: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """By how many bits per byte the challenger was better on each block; not kept on the version."""

    def tags(self) -> dict[str, str]:
        """What is kept of it on the version."""
        numbers = {
            "gate_bits_per_byte": self.bits_per_byte,
            "gate_champion_bits_per_byte": self.champion_bits_per_byte,
            "gate_low": self.low,
            "gate_high": self.high,
        }
        return {
            "reason": self.reason,
            "gate_kind": self.kind,
            "gate_champion_version": self.champion_version or "",
            **{key: "" if value is None else f"{value:.6f}" for key, value in numbers.items()},
            "gate_blocks": str(self.blocks),
            "gate_bytes": str(self.bytes),
            "gate_excluded_bytes": str(self.excluded_bytes),
            "gate_unknown": self.unknown,
        }


def judge(
    root: StateRoot,
    model_name: str,
    version: str,
    snapshot: Snapshot,
    scores: Scores,
    cfg: GateConfig,
    sources_overridden: bool,
) -> Verdict:
    """Decides about a version and, if it is the better one, makes it champion.

    The first version must be finite and beat the unigram model. Raises CheckpointError if the snapshot was altered on
    disk, RegistryError if the champion cannot be loaded: then nothing is promoted, the version's tags say why, and it
    stays undecided, so that the next run decides about it once the damage is mended.

    The tag `verdict` is written last. A run killed after the alias was moved finds the numbers in the other tags, and
    one killed after the verdict the verdict.
    """
    client = MlflowClient(root.tracking_uri)
    own = resolve(root, f"models:/{model_name}/{version}").tags
    if "verdict" in own and own.get("gate_kind") != SOURCES_OVERRIDDEN:
        return _recorded(own)
    rolled_back = withdrawal(root, model_name, version)  # also completes a promotion that was killed half-way
    champion = champion_of(root, model_name)
    is_champion = champion is not None and str(champion.version) == version
    if champion is not None and is_champion and "gate_kind" in champion.tags:
        verdict = _recorded(champion.tags)
    else:
        try:
            rival = None if is_champion else champion
            if rolled_back or (rival is not None and sources_overridden):
                verdict = _left_alone(rival, scores, rolled_back)
            else:
                verdict = _verdict(root, model_name, version, rival, snapshot, scores, cfg)
        except (CheckpointError, RegistryError) as error:
            kind = "model damaged" if isinstance(error, RegistryError) else "holdout altered"
            _set_tags(client, model_name, version, {"reason": str(error)[:4000], "gate_kind": kind})
            raise
        _set_tags(client, model_name, version, verdict.tags())
        if verdict.promoted:
            promote(root, model_name, version, verdict.reason, GATE, over=verdict.champion_version)
    advisory.ensure_held()
    _set_tags(client, model_name, version, {"verdict": "promoted" if verdict.promoted else "rejected"})
    return verdict


def first_verdict(bits_per_byte: float, scores: Scores) -> Verdict:
    """On a version without a champion to beat: it must be finite and beat the unigram model.

    Both learned from the same training text, so they are compared on every block.
    """
    simple, reported = scores.baselines.unigram_bits_per_byte, scores.reported
    is_better = bits_per_byte < simple
    sign = "<" if is_better else ">=" if bits_per_byte >= simple else "is not comparable with"
    kind = "beats unigram" if is_better else "does not beat unigram" if math.isfinite(bits_per_byte) else "not finite"
    reason = (
        f"first version: {bits_per_byte:.4f} bits per byte {sign} {simple:.4f} of the unigram model on the same "
        f"{reported.blocks} blocks ({reported.bytes:,} bytes)"
    )
    return Verdict(is_better, kind, reason, bits_per_byte, blocks=reported.blocks, bytes=reported.bytes)


def decide(
    comparison: Comparison, cfg: GateConfig, champion_version: str, excluded_bytes: int = 0, unknown: str = ""
) -> Verdict:
    """The verdict on a comparison. Only a challenger that is better by more than the margin wins."""
    kind = comparison.finding(cfg.margin)
    scored = (
        f"{comparison.challenger:.4f} bits per byte against {comparison.champion:.4f} of version {champion_version} on "
        f"the same {comparison.blocks} blocks ({comparison.bytes:,} bytes scored, {excluded_bytes:,} excluded)"
    )
    gain = f"improvement {comparison.improvement:.4f}"
    if comparison.low is not None and comparison.high is not None:
        gain += f", from {comparison.low:.4f} to {comparison.high:.4f}"
    sure = f"above the margin of {cfg.margin:g} with {cfg.confidence:.4g} confidence, {comparison.drawn_by}s drawn anew"
    conclusion = {
        "better": f"{gain}, is {sure}",
        "worse": f"{gain}, so it is worse",
        "tie within noise": f"{gain}, is not {sure}",
        "not finite": "a score that is not finite does not win",
        "insufficient evidence": f"fewer than {MIN_BLOCKS} blocks clean for both are no sufficient evidence",
    }[kind]
    note = f"; unknown is what some of the training text was: {unknown}" if unknown else ""
    return Verdict(
        promoted=kind == "better",
        kind=kind,
        reason=f"{kind}: {scored}: {conclusion}{note}",
        bits_per_byte=comparison.challenger,
        champion_bits_per_byte=comparison.champion,
        champion_version=champion_version,
        low=comparison.low,
        high=comparison.high,
        blocks=comparison.blocks,
        bytes=comparison.bytes,
        excluded_bytes=excluded_bytes,
        unknown=unknown,
    )


def _verdict(
    root: StateRoot,
    model_name: str,
    version: str,
    rival: ModelVersion | None,
    snapshot: Snapshot,
    scores: Scores,
    cfg: GateConfig,
) -> Verdict:
    _verify(snapshot)
    side = reported_side(snapshot)
    challenger = resolve(root, f"models:/{model_name}/{version}")
    if rival is None:
        scored = _scored(load(root, challenger), list(blocks(snapshot.path, side)), side)
        total = sum(block["nats"] for block in scored) / math.log(2) / sum(block["bytes"] for block in scored)
        return first_verdict(total, scores)
    champion = load(root, rival)
    clean, unknown = _clean(root, snapshot, side, challenger, rival)
    theirs = _scored(champion, clean.blocks, side)
    own = _scored(load(root, challenger), clean.blocks, side)
    compared = compare(own, theirs, cfg.confidence)
    verdict = decide(compared, cfg, str(rival.version), clean.excluded_bytes, unknown)
    return replace(verdict, comparison=compared, gains=gains(own, theirs))


def _left_alone(rival: ModelVersion | None, scores: Scores, rolled_back: str | None) -> Verdict:
    """On a version that does not compete: it was rolled back, or learned from other sources than the pipeline's."""
    own = scores.reported
    kind, why = (WITHDRAWN, rolled_back) if rolled_back else (SOURCES_OVERRIDDEN, "corpus.sources were overridden")
    number = None if rival is None else str(rival.version)
    stays = f"version {number} stays champion without a comparison" if number else "there is still no champion"
    score = f"{own.bits_per_byte:.4f} bits per byte on {own.side}, {own.bytes:,} bytes"
    return Verdict(False, kind, f"{kind}: {why}; {stays}. Its own score: {score}", own.bits_per_byte, None, number)


def _verify(snapshot: Snapshot) -> None:
    """Raises CheckpointError, with both hashes, if what is to be scored on is not what was ingested."""
    try:
        manifest.verify(snapshot.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the gate does not score on this snapshot, and nothing is promoted: {error} Delete the directory "
            f"{snapshot.path}; the next run makes it again from the sources."
        ) from None


def _clean(
    root: StateRoot, snapshot: Snapshot, side: str, challenger: ModelVersion, rival: ModelVersion
) -> tuple[CleanBlocks, str]:
    """The blocks that are clean for both and for what they were made from, and what is unknown about that.

    Where a training text is gone, altered, or was never here, the comparison goes on without it, and says so.
    """
    learned = {snapshot.path: ""}
    for version in (rival, challenger):
        learned |= dict(texts_of(root, line_of(root, version)))
    unknown = "; ".join(filter(None, learned.values()))
    return clean_blocks(snapshot.path, side, [path for path, gap in learned.items() if not gap]), unknown


def _scored(loaded: Loaded, chosen: Sequence[Block], side: str) -> Sequence[dict[str, Any]]:
    """What a model makes of each block, in their order."""
    return evaluate_blocks(loaded.model, loaded.tokenizer, chosen, "cpu", side).per_block if chosen else ()


def _set_tags(client: MlflowClient, model_name: str, version: str, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)


def _recorded(tags: dict[str, str]) -> Verdict:
    """The verdict that a killed run left on a version; without the tag, one in favour of a version that is champion."""
    numbers = {key: float(tags[key]) if tags[key] else None for key in ("gate_low", "gate_high")}
    rival = tags["gate_champion_bits_per_byte"]
    return Verdict(
        promoted=tags.get("verdict", "promoted") == "promoted",
        kind=tags["gate_kind"],
        reason=tags["reason"],
        bits_per_byte=float(tags["gate_bits_per_byte"]),
        champion_bits_per_byte=float(rival) if rival else None,
        champion_version=tags["gate_champion_version"] or None,
        low=numbers["gate_low"],
        high=numbers["gate_high"],
        blocks=int(tags["gate_blocks"]),
        bytes=int(tags["gate_bytes"]),
        excluded_bytes=int(tags["gate_excluded_bytes"]),
        unknown=tags["gate_unknown"],
    )

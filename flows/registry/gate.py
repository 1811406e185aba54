"""The gate: it decides whether a registered version, the challenger, becomes the champion.

The gate scores champion and challenger on the same held-out blocks, each with its own tokenizer. It uses only blocks
that neither of them can have learned by heart. Blocks that were in the champion's snapshot (old) and the others (new)
are also compared separately. Of much text, a sample of each is scored. The gate stores the verdict and its numbers as
tags of the version. See gptcore.evaluation.compare for how two models are compared and for the rule about old blocks,
gptcore.corpus.clean_blocks for which blocks are clean, gptcore.corpus.diff for which are old, and register.py for how a
version is registered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from flows.cards.verdict import SOURCES_OVERRIDDEN, WITHDRAWN, Verdict, describe_share
from flows.registry.ancestry import check_training_texts, read_ancestry
from flows.registry.champion import GATE, complete_log, explain_withdrawal, promote
from flows.registry.loading import load
from flows.registry.tags import VersionTags
from flows.registry.versions import RegistryError, find_champion, resolve
from flows.state import postgres_lock
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import LoadedModel
from gptcore.config import GateConfig
from gptcore.corpus.clean_blocks import CleanBlocks, find_clean_blocks
from gptcore.corpus.diff import find_old_blocks
from gptcore.corpus.snapshot import Block, Snapshot, read_block_entries, read_document_list, sample_blocks
from gptcore.devices import choose_usable_device
from gptcore.errors import CheckpointError
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.evaluation.compare import MIN_BLOCKS, Comparison, Finding, compare, compare_by_age, compute_gains
from gptcore.evaluation.evidence import explain_shortage
from gptcore.evaluation.run_report import Scores, reported_side
from gptcore.evaluation.sources import compare_sources


def judge(
    root: StateRoot,
    model_name: str,
    version: str,
    snapshot: Snapshot,
    scores: Scores,
    cfg: GateConfig,
    sources_overridden: bool,
    max_bytes: int | None = None,
    device: str = "cpu",
) -> Verdict:
    """Decide whether a version becomes champion, and promote it if it does.

    Both models are scored on `device` if this machine has it, else on the one that `auto` means here. They are scored
    on at most `max_bytes` of old and of new text each; None stands for all text. Raises CheckpointError if the snapshot
    was altered on disk, and RegistryError if the champion cannot be loaded. The version's tags then give the reason.
    The version stays undecided until a run finds that the damage is fixed.

    The tag `verdict` is written last. If a run is killed before that, the next one reads the numbers of a promotion
    that took place from the other tags. If the tag exists, the next run returns the recorded verdict.
    """
    challenger = resolve(root, f"models:/{model_name}/{version}")
    own = VersionTags.from_tags(challenger.tags)
    if own.verdict is not None and own.gate_kind != SOURCES_OVERRIDDEN:
        return own.to_verdict()
    complete_log(root, model_name)  # completes a promotion that was killed half-way
    champion = find_champion(root, model_name)
    is_champion = champion is not None and str(champion.version) == version
    if is_champion and own.gate_bits_per_byte is not None:
        verdict = own.to_verdict()
    else:
        opponent = None if is_champion else champion
        usable = str(choose_usable_device(device))
        verdict = _reach_verdict(
            root, challenger, opponent, snapshot, scores, cfg, sources_overridden, max_bytes, device=usable
        )
        _set_tags(root, challenger, VersionTags.from_verdict(verdict))
        if verdict.promoted:
            promote(root, model_name, version, verdict.reason, GATE, over=verdict.champion_version)
    postgres_lock.ensure_held()
    _set_tags(root, challenger, VersionTags(verdict="promoted" if verdict.promoted else "rejected"))
    return verdict


def judge_without_champion(bits_per_byte: float, scores: Scores) -> Verdict:
    """Return the verdict on a version without a champion to beat: it must be finite and beat the unigram model.

    `bits_per_byte` is the version's score. Version and unigram model learned from the same training text, so they are
    compared on every block.
    """
    simple, reported = scores.baselines.unigram_bits_per_byte, scores.reported
    is_better = bits_per_byte < simple
    sign = "<" if is_better else ">=" if bits_per_byte >= simple else "is not comparable with"
    kind = "beats unigram" if is_better else "does not beat unigram" if math.isfinite(bits_per_byte) else "not finite"
    share = describe_share(reported.bytes, reported.available_bytes)
    reason = (
        f"first version: {bits_per_byte:.4f} bits per byte {sign} {simple:.4f} of the unigram model on the same "
        f"{reported.blocks} blocks ({reported.bytes:,} bytes{f', {share}' if share else ''})"
    )
    return Verdict(
        is_better,
        kind,
        reason,
        bits_per_byte,
        blocks=reported.blocks,
        bytes=reported.bytes,
        available_bytes=reported.available_bytes,
    )


def judge_comparison(
    comparison: Comparison,
    cfg: GateConfig,
    challenger: ModelVersion,
    champion_version: str,
    excluded_bytes: int = 0,
    unknown: str = "",
    shortage: str = "",
) -> Verdict:
    """Return the verdict on a comparison. `shortage` says what evidence is missing, if any.

    A challenger wins only if it is better by more than the margin, and not worse on old text by more than
    `gate.forget`.
    """
    kind = comparison.classify(cfg.margin, cfg.forget_margin)
    scored = _describe_scores(comparison, cfg, kind, champion_version, excluded_bytes)
    missing = f". {shortage[0].upper()}{shortage[1:]}" if kind == "insufficient evidence" and shortage else ""
    old = _describe_old(comparison, cfg, challenger, kind)
    note = f"; some training text is unknown: {unknown}" if unknown else ""
    return Verdict(
        promoted=kind == "better",
        kind=kind,
        reason=f"{kind}: {scored}{missing}{old}{note}",
        bits_per_byte=comparison.challenger,
        champion_bits_per_byte=comparison.champion,
        champion_version=champion_version,
        low=comparison.low,
        high=comparison.high,
        blocks=comparison.blocks,
        bytes=comparison.bytes,
        available_bytes=comparison.available_bytes,
        excluded_bytes=excluded_bytes,
        unknown=unknown,
        old=comparison.old,
        new=comparison.new,
    )


def _describe_scores(
    comparison: Comparison, cfg: GateConfig, kind: Finding, champion_version: str, excluded_bytes: int
) -> str:
    """Describe both scores, and why they lead to `kind`."""
    share = describe_share(comparison.bytes, comparison.available_bytes)
    size = f"{comparison.bytes:,} bytes scored, {f'{share}, ' if share else ''}{excluded_bytes:,} excluded"
    scored = (
        f"{comparison.challenger:.4f} bits per byte against {comparison.champion:.4f} of version {champion_version} on "
        f"the same {comparison.blocks} blocks ({size})"
    )
    gain = f"improvement {comparison.improvement:.4f}"
    if comparison.low is not None and comparison.high is not None:
        gain += f", from {comparison.low:.4f} to {comparison.high:.4f}"
    sure = f"above the margin of {cfg.margin:g} with {cfg.confidence:.4g} confidence, drawn by {comparison.drawn_by}s"
    conclusions: dict[Finding, str] = {
        "better": f"{gain}, is {sure}",
        "worse": f"{gain}, so it is worse",
        "tie within noise": f"{gain}, is not {sure}",
        "worse on old text": f"{gain}, is {sure}, but only because of new text",
        "not finite": "a score that is not finite does not win",
        "insufficient evidence": f"fewer than {MIN_BLOCKS} blocks are clean for both, which is not enough evidence",
    }
    return f"{scored}: {conclusions[kind]}"


def _describe_old(comparison: Comparison, cfg: GateConfig, challenger: ModelVersion, kind: Finding) -> str:
    """Describe the finding on the old blocks, and what a person may do if it prevents the promotion."""
    old = comparison.old
    if old is None or not old.is_worse_by(cfg.forget_margin):
        return ""
    finding = (
        f"; on the {old.blocks} old blocks, which were in the champion's corpus already, the improvement "
        f"{old.improvement:.4f}, from {old.low:.4f} to {old.high:.4f}, is below -{cfg.forget_margin:g} (gate.forget)"
    )
    if kind != "worse on old text":
        return finding
    command = f"gptflow promote {challenger.name} {challenger.version} --reason WHY"
    return f"{finding}. If the text is meant to change, promote this version with `{command}`, or raise gate.forget"


@dataclass(frozen=True)
class _ComparableBlocks:
    """The blocks that count in a comparison."""

    clean: CleanBlocks
    unknown: str
    """The training text that could not be checked, and why; empty if all of it was checked."""
    knows_old: bool
    """Whether it is known which blocks the champion's snapshot held."""


def _reach_verdict(
    root: StateRoot,
    challenger: ModelVersion,
    champion: ModelVersion | None,
    snapshot: Snapshot,
    scores: Scores,
    cfg: GateConfig,
    sources_overridden: bool,
    max_bytes: int | None,
    device: str,
) -> Verdict:
    """Compare the challenger with the champion, unless it does not compete. If that fails, its tags give the reason."""
    withdrawal = explain_withdrawal(root, challenger.name, str(challenger.version))
    if withdrawal or (champion is not None and sources_overridden):
        return _reject_without_comparison(champion, scores, withdrawal)
    try:
        return _compare_with_champion(root, challenger, champion, snapshot, scores, cfg, max_bytes, device)
    except (CheckpointError, RegistryError) as error:
        kind = "model damaged" if isinstance(error, RegistryError) else "holdout altered"
        _set_tags(root, challenger, VersionTags(reason=str(error)[:4000], gate_kind=kind))
        raise


def _compare_with_champion(
    root: StateRoot,
    challenger: ModelVersion,
    champion: ModelVersion | None,
    snapshot: Snapshot,
    scores: Scores,
    cfg: GateConfig,
    max_bytes: int | None,
    device: str,
) -> Verdict:
    """Score champion and challenger on clean blocks and decide. Without a champion, judge the version by itself."""
    _verify_snapshot(snapshot)
    side = reported_side(snapshot)
    if champion is None:
        scored = _score_blocks(load(root, challenger, device), sample_blocks(snapshot.path, side, max_bytes), side)
        total = sum(block["nats"] for block in scored) / math.log(2) / sum(block["bytes"] for block in scored)
        return judge_without_champion(total, scores)
    champion_model = load(root, champion, device)
    comparable = _find_comparable_blocks(root, snapshot, side, challenger, champion, max_bytes)
    clean = comparable.clean
    champion_scores = _score_blocks(champion_model, clean.blocks, side)
    challenger_scores = _score_blocks(load(root, challenger, device), clean.blocks, side)
    if comparable.knows_old:
        comparison = compare_by_age(challenger_scores, champion_scores, cfg.confidence, clean.is_old, clean.weights)
    else:
        comparison = compare(challenger_scores, champion_scores, cfg.confidence, clean.weights)
    verdict = judge_comparison(
        comparison,
        cfg,
        challenger,
        champion_version=str(champion.version),
        excluded_bytes=clean.excluded_bytes,
        unknown=comparable.unknown,
        shortage=explain_shortage(snapshot, len(clean.blocks)),
    )
    return replace(
        verdict,
        comparison=comparison,
        gains=compute_gains(challenger_scores, champion_scores),
        sources=compare_sources(challenger_scores, champion_scores, read_document_list(snapshot.path)),
    )


def _reject_without_comparison(champion: ModelVersion | None, scores: Scores, withdrawal: str | None) -> Verdict:
    """Return the verdict on a version that does not compete.

    The version was rolled back (`withdrawal` says why), or it learned from other sources than the pipeline's.
    """
    own = scores.reported
    kind, why = (WITHDRAWN, withdrawal) if withdrawal else (SOURCES_OVERRIDDEN, "corpus.sources were overridden")
    number = None if champion is None else str(champion.version)
    stays = f"version {number} stays champion without a comparison" if number else "there is still no champion"
    score = f"{own.bits_per_byte:.4f} bits per byte on {own.side}, {own.bytes:,} bytes"
    return Verdict(
        promoted=False,
        kind=kind,
        reason=f"{kind}: {why}; {stays}. Its own score: {score}",
        bits_per_byte=own.bits_per_byte,
        champion_version=number,
    )


def _verify_snapshot(snapshot: Snapshot) -> None:
    """Raise CheckpointError, with both hashes, if the snapshot was altered since it was ingested."""
    try:
        manifest.verify(snapshot.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"the gate does not score on this snapshot, and nothing is promoted: {error} Delete the directory "
            f"{snapshot.path}; the next run makes it again from the sources."
        ) from None


def _find_comparable_blocks(
    root: StateRoot,
    snapshot: Snapshot,
    side: str,
    challenger: ModelVersion,
    champion: ModelVersion,
    max_bytes: int | None,
) -> _ComparableBlocks:
    """Return blocks that are clean for both versions and their ancestors, and which of them are old.

    If old or new blocks have more than `max_bytes`, those with the lowest hashes are returned. If a training text was
    deleted, altered, or never on this machine, the comparison ignores it and says so.
    """
    champion_texts = list(check_training_texts(root, read_ancestry(root, champion), {snapshot.path}))
    verified = {snapshot.path, *(path for path, problem in champion_texts if not problem)}
    challenger_texts = list(check_training_texts(root, read_ancestry(root, challenger), verified))
    learned = dict([(snapshot.path, ""), *champion_texts, *challenger_texts])
    known = [path for path, problem in learned.items() if not problem]
    champion_snapshot, problem = champion_texts[0]  # the next ones are those of its ancestors
    entries = list(read_block_entries(snapshot.path, side))
    is_old = None if problem else find_old_blocks(champion_snapshot, snapshot.path, entries)  # (entries,)
    clean = find_clean_blocks(snapshot.path, side, known, max_bytes, is_old)
    return _ComparableBlocks(clean, "; ".join(filter(None, learned.values())), is_old is not None)


def _score_blocks(loaded: LoadedModel, chosen: Sequence[Block], side: str) -> Sequence[dict[str, Any]]:
    """Return a model's scores of each block, in the order of the blocks."""
    if not chosen:
        return ()
    return evaluate_blocks(loaded.model, loaded.tokenizer, chosen, loaded.device, side).per_block


def _set_tags(root: StateRoot, version: ModelVersion, tags: VersionTags) -> None:
    # Before each tag, MLflow's client asks whether the name is a prompt's, which takes longer than setting the tag.
    registry = MlflowClient(root.tracking_uri)._get_registry_client()
    for key, value in tags.to_tags().items():
        registry.set_model_version_tag(version.name, str(version.version), key, value)

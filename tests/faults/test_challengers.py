"""The gate: a challenger must be clearly better, and a first version must have learned anything at all."""

import json
from collections.abc import Callable

import pytest

from flows.cards.verdict import Verdict
from flows.registry import versions
from flows.state.root import StateRoot
from gptcore.bundle import WEIGHTS
from tests.registry.judging import NAME
from tests.registry.test_gate import champion_version, judged, register, scores, snapshot, summary, trained

__all__ = ["judged", "register", "scores", "snapshot", "trained"]


@pytest.mark.parametrize(
    ("current", "challenger", "kind"),
    [
        ("poor", "good", "better"),
        ("good", "poor", "worse"),
        ("good", "good", "tie within noise"),
        ("nearly", "good", "tie within noise"),
        ("poor", "nan", "not finite"),
    ],
)
def test_only_a_clearly_better_challenger_becomes_champion(
    root: StateRoot,
    register: Callable[..., str],
    judged: Callable[..., Verdict],
    current: str,
    challenger: str,
    kind: str,
) -> None:
    judged(register(current))
    verdict = judged(register(challenger))
    assert (verdict.kind, verdict.promoted) == (kind, kind == "better")
    assert champion_version(root) == ("2" if kind == "better" else "1")
    kept = summary(root, "2")
    assert kept["verdict"] == ("promoted" if kind == "better" else "rejected")
    assert (kept["gate_kind"], kept["reason"], kept["gate_champion_version"]) == (kind, verdict.reason, "1")
    assert kept["gate_champion_bits_per_byte"] == pytest.approx(verdict.champion_bits_per_byte, abs=1e-6)
    assert (kept["gate_blocks"], kept["gate_bytes"], kept["gate_excluded_bytes"]) == (verdict.blocks, verdict.bytes, 0)
    json.dumps(kept, allow_nan=False)
    assert kept["gate_old"]["blocks"] == verdict.blocks and kept["gate_new"]["blocks"] == 0, "the same text"
    assert kept["gate_old"]["low"] == pytest.approx(kept["gate_low"], abs=1e-6)
    assert ("is below -0.005 (gate.forget)" in verdict.reason) == (kind == "worse")
    assert "gptflow promote" not in verdict.reason
    if kind == "not finite":
        assert kept["gate_bits_per_byte"] is kept["gate_low"] is kept["gate_high"] is None
    else:
        gain = kept["gate_champion_bits_per_byte"] - kept["gate_bits_per_byte"]
        assert kept["gate_low"] <= gain <= kept["gate_high"]
        assert f"{kept['gate_bits_per_byte']:.4f} bits per byte against" in verdict.reason
    assert f"{kind}: " in verdict.reason and "of version 1 on the same" in verdict.reason


@pytest.mark.parametrize(
    ("weights", "kind", "is_promoted"),
    [("good", "beats unigram", True), ("none", "does not beat unigram", False), ("nan", "not finite", False)],
)
def test_a_first_version_must_be_finite_and_beat_the_unigram_model(
    root: StateRoot,
    register: Callable[..., str],
    judged: Callable[..., Verdict],
    weights: str,
    kind: str,
    is_promoted: bool,
) -> None:
    verdict = judged(register(weights))
    assert (verdict.kind, verdict.promoted) == (kind, is_promoted)
    assert "of the unigram model on the same" in verdict.reason
    assert champion_version(root) == ("1" if is_promoted else None)


def test_a_champion_with_missing_files_stays_and_blocks_promotions_until_they_are_restored(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    weights = root.path / "models" / "1" / "artifacts" / versions.BUNDLE / WEIGHTS
    kept = weights.rename(root.path / "kept")
    challenger = register("good")
    with pytest.raises(versions.RegistryError, match=f"models:/{NAME}/1 cannot be loaded, and nothing is promoted"):
        judged(challenger)
    assert (champion_version(root), summary(root, challenger)["verdict"]) == ("1", None)
    kept.rename(weights)
    assert judged(challenger).promoted and champion_version(root) == "2"

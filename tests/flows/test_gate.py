"""The gate over a real registry: who becomes champion, who does not, and what is written down about it."""

import math
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from mlflow import MlflowClient

from flows.pipelines import Pipeline, overrides_sources
from flows.releases import champion, gate, registry
from flows.releases.gate import Verdict, first_verdict, judge
from flows.releases.lineage import run_key
from flows.state import StateRoot
from gptcore.bundle import WEIGHTS
from gptcore.config import GateConfig
from gptcore.corpus import Snapshot, blocks
from gptcore.data import Tokens
from gptcore.judging.dossier import Scores
from gptcore.model import GPTModel
from tests.flows.judging import CFG, NAME, Weights, scores_of, sentences, snapshot_of, weights_after
from tests.flows.judging import register as registered


def text_snapshot(root: StateRoot, name: str, text: str, **settings: Any) -> Snapshot:
    directory = root.path / "text" / name
    directory.mkdir(parents=True)
    (directory / "one.txt").write_text(text)
    return snapshot_of(root, directory, **settings)


@pytest.fixture(scope="module")
def trained() -> dict[str, Weights]:
    """Weights after few and after more updates, the latter also disturbed a little, and broken."""
    poor, good = weights_after([30, 80])
    return {
        "poor": poor,
        "good": good,
        "nearly": {key: value + 1e-4 * torch.randn_like(value) for key, value in good.items()},
        "nan": {**good, "final_norm.scale": torch.full((32,), math.nan)},
        "none": {key: value.detach() for key, value in GPTModel(CFG).state_dict().items()},
    }


@pytest.fixture
def snapshot(root: StateRoot) -> Snapshot:
    return text_snapshot(root, "own", sentences(1, 700))


@pytest.fixture
def scores(snapshot: Snapshot) -> Scores:
    return scores_of(snapshot)


@pytest.fixture
def register(root: StateRoot, snapshot: Snapshot, trained: dict[str, Weights]) -> Callable[..., str]:
    """Registers weights by name; returns the version."""
    MlflowClient(root.tracking_uri).create_registered_model(NAME)
    return lambda weights, corpus=snapshot: registered(root, trained[weights], corpus)


@pytest.fixture
def judged(root: StateRoot, snapshot: Snapshot, scores: Scores) -> Callable[..., Verdict]:
    def call(version: str, cfg: GateConfig | None = None, sources_overridden: bool = False) -> Verdict:
        return judge(root, NAME, version, snapshot, scores, cfg or GateConfig(), sources_overridden)

    return call


def champion_version(root: StateRoot) -> str | None:
    found = registry.champion_of(root, NAME)
    return None if found is None else str(found.version)


def summary(root: StateRoot, version: str) -> dict[str, Any]:
    return registry.summary(root, registry.resolve(root, f"models:/{NAME}/{version}"))


@pytest.mark.parametrize("bits", [2.5, math.inf, math.nan])
def test_as_good_as_the_unigram_model_is_not_enough(bits: float) -> None:
    simple = SimpleNamespace(unigram_bits_per_byte=2.5)
    scores = cast(Scores, SimpleNamespace(baselines=simple, reported=SimpleNamespace(blocks=40, bytes=1)))
    assert not first_verdict(bits, scores).promoted
    assert first_verdict(2.4999, scores).promoted


def test_the_margin_is_the_pipeline_s(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    verdict = judged(register("good"), GateConfig(margin=5.0, confidence=0.9))
    assert verdict.kind == "tie within noise" and "margin of 5 with 0.9 confidence" in verdict.reason
    assert champion_version(root) == "1"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_champion_stays_and_the_challenger_is_decided_about_once_it_is_mended(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict], damage: str
) -> None:
    judged(register("poor"))
    weights = root.path / "models" / "1" / "artifacts" / registry.BUNDLE / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 64]))
    challenger = register("good")
    with pytest.raises(registry.RegistryError, match=f"models:/{NAME}/1 cannot be loaded, and nothing is promoted"):
        judged(challenger)
    kept = summary(root, challenger)
    assert champion_version(root) == "1"
    assert (kept["verdict"], kept["gate_kind"]) == (None, "model damaged")
    assert "models:/gpt-tiny/1 cannot be loaded" in kept["reason"]
    weights.write_bytes(whole)
    assert judged(challenger).promoted and champion_version(root) == "2"


def test_what_the_champion_learned_from_is_excluded_and_reported(
    root: StateRoot, snapshot: Snapshot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    known = [block.text for block in blocks(snapshot.path, "holdout")][:3]
    text = sentences(3, 50) + "".join(known) + sentences(4, 50)
    older = text_snapshot(root, "older", text, split="contiguous", val_fraction=0.01, holdout_fraction=0.0)
    judged(register("poor", older))
    verdict = judged(register("good"))
    assert verdict.excluded_bytes >= sum(len(text.encode()) for text in known)
    assert verdict.bytes + verdict.excluded_bytes == snapshot.bytes["holdout"]
    assert summary(root, "2")["gate_excluded_bytes"] == verdict.excluded_bytes
    assert f"{verdict.excluded_bytes:,} excluded" in verdict.reason and verdict.promoted


def test_with_too_few_clean_blocks_the_champion_stays(
    root: StateRoot, snapshot: Snapshot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    older = text_snapshot(root, "older", sentences(1, 700), split="contiguous", val_fraction=0.01, holdout_fraction=0.0)
    judged(register("poor", older))
    verdict = judged(register("good"))
    assert verdict.kind == "insufficient evidence" and verdict.blocks < 20
    assert (verdict.low, champion_version(root)) == (None, "1")
    assert summary(root, "2")["verdict"] == "rejected"


def test_a_champion_s_training_text_that_is_gone_is_called_unknown_and_the_comparison_goes_on(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    older = text_snapshot(root, "older", sentences(6, 300))
    judged(register("poor", older))
    shutil.rmtree(older.path)
    verdict = judged(register("good"))
    assert verdict.kind == "better"
    assert "unknown is what some of the training text was" in verdict.reason and str(older.path) in verdict.reason
    assert "of models:/gpt-tiny/1 is gone" in summary(root, "2")["gate_unknown"]


def test_a_run_on_other_sources_leaves_an_existing_champion_alone_until_the_sources_are_the_pipeline_s(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    assert judged(register("poor"), sources_overridden=True).promoted
    challenger = register("good")
    verdict = judged(challenger, sources_overridden=True)
    assert (verdict.kind, verdict.promoted, champion_version(root)) == (gate.SOURCES_OVERRIDDEN, False, "1")
    assert "version 1 stays champion without a comparison" in verdict.reason
    assert judged(challenger).promoted


def test_only_corpus_sources_given_on_the_command_line_count_as_overridden() -> None:
    assert overrides_sources(["train.seed=1", "corpus.sources=[other.txt]"])
    assert overrides_sources(["corpus={sources: [other.txt]}"])
    assert not overrides_sources(["corpus.block_bytes=512", "train.seed=1"])


def test_a_run_killed_after_the_alias_moved_ends_with_the_verdict_it_had(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(register("poor"))
    challenger = register("good")
    write = gate._set_tags

    def killed(client: MlflowClient, model_name: str, version: str, tags: dict[str, str]) -> None:
        if "verdict" in tags:
            raise KeyboardInterrupt
        write(client, model_name, version, tags)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("flows.releases.gate._set_tags", killed)
        judged(challenger)
    assert (champion_version(root), summary(root, challenger)["verdict"]) == ("2", None)
    verdict = judged(challenger)
    assert (verdict.kind, verdict.champion_version, verdict.promoted) == ("better", "1", True)
    kept = summary(root, challenger)
    assert (kept["verdict"], kept["reason"], kept["gate_low"]) == ("promoted", verdict.reason, verdict.low)


def test_weights_that_were_rolled_back_are_not_promoted_again(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    judged(register("good"))
    champion.rollback(root, NAME, "it swears", by="ada")
    verdict = judged(register("good"))
    assert (verdict.kind, verdict.promoted, champion_version(root)) == (gate.WITHDRAWN, False, "1")
    assert "it swears" in verdict.reason


def test_the_gate_s_settings_do_not_change_what_is_trained(tiny: Pipeline) -> None:
    tokens = cast(Tokens, SimpleNamespace(sha256="0", n_vocab=257))
    strict = tiny.model_copy(update={"gate": GateConfig(margin=1.0)})
    assert run_key(tiny, tokens, 1) == run_key(strict, tokens, 1)

"""The gate on a real registry: which versions become champion, and the recorded reasons and figures."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from flows.cards.verdict import SOURCES_OVERRIDDEN, WITHDRAWN, Verdict
from flows.config.pipelines import Pipeline, overrides_sources
from flows.registry import champion, gate, versions
from flows.registry.gate import judge, judge_without_champion
from flows.registry.lineage import run_key, settings_key
from flows.registry.loading import load
from flows.registry.tags import VersionTags
from flows.state.root import StateRoot
from gptcore.bundle import WEIGHTS
from gptcore.config import CorpusConfig, EvaluateConfig, GateConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot, read_blocks
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.evaluation.run_report import Scores
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from tests.fake_gpu import FakeGpu
from tests.registry.judging import CFG, NAME, Weights, figures, scores_of, snapshot_of, weights_after
from tests.registry.judging import register as registered
from tests.tiny import prose

ROUNDED = ("bits_per_byte", "champion_bits_per_byte", "low", "high")
"""The numbers that tags keep with 6 digits."""


def text_snapshot(root: StateRoot, name: str, text: str, **settings: Any) -> Snapshot:
    directory = root.path / "text" / name
    directory.mkdir(parents=True)
    (directory / "one.txt").write_text(text)
    return snapshot_of(root, directory, **settings)


@pytest.fixture(scope="module")
def trained() -> dict[str, Weights]:
    """Weights after 30 and after 80 updates, the latter also slightly disturbed and with NaN, and untrained weights.

    `forgetful` has learned mostly figures instead of words.
    """
    poor, good = weights_after([30, 80])
    (forgetful,) = weights_after([80], figures(1, 300) + prose(2, 1000))
    torch.manual_seed(1)  # noise that improves about as many blocks as it worsens
    return {
        "forgetful": forgetful,
        "poor": poor,
        "good": good,
        "nearly": {key: value + 1e-4 * torch.randn_like(value) for key, value in good.items()},
        "nan": {**good, "final_norm.scale": torch.full((32,), math.nan)},
        "none": {key: value.detach() for key, value in GPTModel(CFG).state_dict().items()},
    }


@pytest.fixture
def snapshot(root: StateRoot) -> Snapshot:
    return text_snapshot(root, "own", prose(1, 7000))


@pytest.fixture
def scores(snapshot: Snapshot) -> Scores:
    return scores_of(snapshot)


@pytest.fixture
def register(root: StateRoot, snapshot: Snapshot, trained: dict[str, Weights]) -> Callable[..., str]:
    """A function that registers weights by name and returns the version."""
    MlflowClient(root.tracking_uri).create_registered_model(NAME)
    return lambda weights, corpus=snapshot: registered(root, trained[weights], corpus)


@pytest.fixture
def judged(root: StateRoot, snapshot: Snapshot, scores: Scores) -> Callable[..., Verdict]:
    def call(version: str, cfg: GateConfig | None = None, sources_overridden: bool = False) -> Verdict:
        return judge(root, NAME, version, snapshot, scores, cfg or GateConfig(), sources_overridden)

    return call


def champion_version(root: StateRoot) -> str | None:
    found = versions.find_champion(root, NAME)
    return None if found is None else str(found.version)


def summary(root: StateRoot, version: str) -> dict[str, Any]:
    return versions.summarize(root, versions.resolve(root, f"models:/{NAME}/{version}"))


@pytest.mark.parametrize("bits", [2.5, math.inf, math.nan])
def test_the_first_version_must_be_better_than_the_unigram_model(bits: float) -> None:
    simple = SimpleNamespace(unigram_bits_per_byte=2.5)
    reported = SimpleNamespace(blocks=40, bytes=1, available_bytes=None)
    scores = cast(Scores, SimpleNamespace(baselines=simple, reported=reported))
    assert not judge_without_champion(bits, scores).promoted
    assert judge_without_champion(2.4999, scores).promoted


def test_the_gate_uses_the_margin_and_confidence_of_the_pipeline(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    verdict = judged(register("good"), GateConfig(margin=5.0, confidence=0.9))
    assert verdict.kind == "tie within noise" and "margin of 5 with 0.9 confidence" in verdict.reason
    assert champion_version(root) == "1"


def test_champion_and_challenger_are_scored_on_the_gpu_with_the_scores_of_the_cpu(
    root: StateRoot, snapshot: Snapshot, scores: Scores, register: Callable[..., str], gpu: FakeGpu
) -> None:
    judge(root, NAME, register("poor"), snapshot, scores, GateConfig(), False)
    challenger = register("good")
    gpu.products.clear()
    verdict = judge(root, NAME, challenger, snapshot, scores, GateConfig(), False, device="cuda")
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    blocks = list(read_blocks(snapshot.path, "holdout"))
    loaded = (load(root, versions.resolve(root, f"models:/{NAME}/{number}")) for number in (challenger, "1"))
    own, champions = (evaluate_blocks(one.model, one.tokenizer, blocks, "cpu").bits_per_byte for one in loaded)
    assert verdict.promoted and verdict.bytes == snapshot.bytes["holdout"]
    assert (verdict.bits_per_byte, verdict.champion_bits_per_byte) == pytest.approx((own, champions), abs=1e-9)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_champion_stays_and_the_challenger_is_judged_after_the_repair(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict], damage: str
) -> None:
    judged(register("poor"))
    weights = root.path / "models" / "1" / "artifacts" / versions.BUNDLE / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 64]))
    challenger = register("good")
    with pytest.raises(versions.RegistryError, match=f"models:/{NAME}/1 cannot be loaded, and nothing is promoted"):
        judged(challenger)
    kept = summary(root, challenger)
    assert champion_version(root) == "1"
    assert (kept["verdict"], kept["gate_kind"]) == (None, "model damaged")
    assert "models:/gpt-tiny/1 cannot be loaded" in kept["reason"]
    weights.write_bytes(whole)
    assert judged(challenger).promoted and champion_version(root) == "2"


def test_a_version_that_a_person_promoted_after_a_failed_comparison_gets_its_verdict(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("poor"))
    shutil.rmtree(root.path / "models" / "1")
    challenger = register("good")
    with pytest.raises(versions.RegistryError):
        judged(challenger)
    champion.promote(root, NAME, challenger, "the champion is lost", by="ada")
    verdict = judged(challenger)
    assert (verdict.kind, verdict.promoted, summary(root, challenger)["verdict"]) == ("beats unigram", True, "promoted")


def test_text_that_the_champion_learned_from_is_excluded_and_reported(
    root: StateRoot, snapshot: Snapshot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    known = [block.text for block in read_blocks(snapshot.path, "holdout")][:3]
    text = prose(3, 500) + "".join(known) + prose(4, 500)
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
    older = text_snapshot(root, "older", prose(1, 7000), split="contiguous", val_fraction=0.01, holdout_fraction=0.0)
    judged(register("poor", older))
    verdict = judged(register("good"))
    assert verdict.kind == "insufficient evidence" and verdict.blocks < 20
    assert f"Holdout has {verdict.blocks} blocks that are clean for both models; the gate needs 20" in verdict.reason
    assert (verdict.low, champion_version(root)) == (None, "1")
    assert summary(root, "2")["verdict"] == "rejected"


def test_missing_training_text_of_the_champion_is_reported_as_unknown_and_the_comparison_continues(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    older = text_snapshot(root, "older", prose(6, 3000))
    judged(register("poor", older))
    shutil.rmtree(older.path)
    verdict = judged(register("good"))
    assert verdict.kind == "better"
    assert "some training text is unknown" in verdict.reason and str(older.path) in verdict.reason
    assert "of models:/gpt-tiny/1 is gone" in summary(root, "2")["gate_unknown"]
    assert verdict.old is verdict.new is None, "it is unknown which blocks are old, so all decide"


@pytest.fixture
def judged_with_figures(root: StateRoot, register: Callable[..., str]) -> Callable[..., Iterator[Verdict]]:
    """A function that judges `forgetful` against `good`, whose text had so many words, but no figures.

    It does so with one gate after another.
    """

    def call(num_words: int, *cfgs: GateConfig) -> Iterator[Verdict]:
        old = text_snapshot(root, "nights", prose(1, num_words))
        judge(root, NAME, register("good", old), old, scores_of(old), GateConfig(), False)
        (root.path / "text" / "nights" / "two.txt").write_text(figures(2, 800))
        now = snapshot_of(root, root.path / "text" / "nights")
        for cfg in cfgs:
            yield judge(root, NAME, register("forgetful", now), now, scores_of(now), cfg, False)

    return call


def test_a_challenger_that_is_better_on_new_text_and_worse_on_old_text_is_promoted_only_if_forget_allows_it(
    root: StateRoot, judged_with_figures: Callable[..., Iterator[Verdict]]
) -> None:
    verdicts = judged_with_figures(7000, GateConfig(), GateConfig(forget=8.0))
    verdict = next(verdicts)
    assert (verdict.kind, verdict.promoted, champion_version(root)) == ("worse on old text", False, "1")
    old, new = verdict.old, verdict.new
    assert old and new and verdict.low and verdict.low > 0.005
    assert old.blocks >= 20 and old.high is not None and old.high < -0.005 and new.low is not None and new.low > 0
    assert (old.blocks + new.blocks, old.bytes + new.bytes) == (verdict.blocks, verdict.bytes)
    assert f"on the {old.blocks} old blocks" in verdict.reason and "below -0.005 (gate.forget)" in verdict.reason
    assert f"`gptflow promote {NAME} 2 --reason WHY`, or raise gate.forget" in verdict.reason
    kept = summary(root, "2")
    assert kept["gate_old"] == {key: value for key, value in asdict(old).items() if key not in ("old", "new")}
    assert kept["gate_new"]["low"] == new.low and kept["verdict"] == "rejected"
    assert VersionTags.from_tags(versions.resolve(root, f"models:/{NAME}/2").tags).to_verdict() == replace(
        verdict, **{key: pytest.approx(getattr(verdict, key), abs=1e-6) for key in ROUNDED}
    )
    assert next(verdicts).promoted and champion_version(root) == "3"


def test_of_much_text_a_sample_of_old_and_of_new_blocks_is_scored_and_the_verdict_says_of_how_much(
    root: StateRoot, register: Callable[..., str]
) -> None:
    before = text_snapshot(root, "grows", prose(1, 30_000))
    judge(root, NAME, register("poor", before), before, scores_of(before), GateConfig(), False, 12_500)
    (root.path / "text" / "grows" / "two.txt").write_text(prose(2, 25_000))
    now = snapshot_of(root, root.path / "text" / "grows")
    version, scores = register("good", now), scores_of(now)
    verdict = judge(root, NAME, version, now, scores, GateConfig(), False, 12_500)
    old, new = verdict.old, verdict.new
    assert old and new and verdict.kind == "better"
    for part in (old, new):
        assert part.blocks >= 25 and part.bytes <= 12_500 < cast(int, part.available_bytes) and part.low is not None
    assert verdict.bytes == old.bytes + new.bytes
    assert verdict.available_bytes == now.bytes["holdout"], "no block shares text with a training text"
    share = f"{verdict.bytes / 1e3:.1f} kB of {now.bytes['holdout'] / 1e3:.1f} kB"
    assert f"({verdict.bytes:,} bytes scored, {share}, " in verdict.reason and " percent, 0 excluded)" in verdict.reason
    kept = VersionTags.from_tags(versions.resolve(root, f"models:/{NAME}/{version}").tags).to_verdict()
    assert (kept.available_bytes, kept.old, kept.new) == (verdict.available_bytes, old, new)
    whole = judge(root, NAME, register("nearly", now), now, scores, GateConfig(), False)
    assert whole.bytes == whole.available_bytes == now.bytes["holdout"]


def test_a_comparison_is_also_made_source_by_source(root: StateRoot, register: Callable[..., str]) -> None:
    directory = root.path / "text" / "sources"
    directory.mkdir(parents=True)
    (directory / "a.txt").write_text(prose(1, 5000))
    (directory / "b.txt").write_text(prose(2, 3000))
    sources = (str(directory / "a.txt"), str(directory / "b.txt"))
    cfg = CorpusConfig(sources=sources, val_fraction=0.1, holdout_fraction=0.2, block_bytes=256)
    both = ingest(cfg, root.corpora, root.path)
    judge(root, NAME, register("poor", both), both, scores_of(both), GateConfig(), False)
    verdict = judge(root, NAME, register("good", both), both, scores_of(both), GateConfig(), False)
    assert tuple(one.source for one in verdict.sources) == sources
    assert all(one.challenger < one.champion for one in verdict.sources)
    assert sum(one.blocks for one in verdict.sources) == verdict.blocks
    weighted = sum(one.challenger * one.bytes for one in verdict.sources) / verdict.bytes
    assert weighted == pytest.approx(verdict.bits_per_byte)


def test_with_fewer_than_20_old_blocks_all_blocks_decide_together(
    judged_with_figures: Callable[..., Iterator[Verdict]],
) -> None:
    (verdict,) = judged_with_figures(3500, GateConfig())
    assert verdict.old and 0 < verdict.old.blocks < 20 and verdict.old.improvement < -0.1 and verdict.old.high is None
    assert (verdict.kind, verdict.promoted) == ("better", True)


def test_a_run_on_other_sources_does_not_replace_a_champion_but_one_on_the_pipelines_sources_does(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    assert judged(register("poor"), sources_overridden=True).promoted
    challenger = register("good")
    verdict = judged(challenger, sources_overridden=True)
    assert (verdict.kind, verdict.promoted, champion_version(root)) == (SOURCES_OVERRIDDEN, False, "1")
    assert "version 1 stays champion without a comparison" in verdict.reason
    assert judged(challenger).promoted


def test_only_corpus_sources_given_on_the_command_line_count_as_overridden() -> None:
    assert overrides_sources(["train.seed=1", "corpus.sources=[other.txt]"])
    assert overrides_sources(["corpus={sources: [other.txt]}"])
    assert not overrides_sources(["corpus.block_bytes=512", "train.seed=1"])


def test_a_run_killed_after_the_alias_moved_is_still_recorded_as_promoted(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(register("poor"))
    challenger = register("good")
    write = gate._set_tags

    def killed(root: StateRoot, version: ModelVersion, tags: VersionTags) -> None:
        if tags.verdict is not None:
            raise KeyboardInterrupt
        write(root, version, tags)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("flows.registry.gate._set_tags", killed)
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
    assert (verdict.kind, verdict.promoted, champion_version(root)) == (WITHDRAWN, False, "1")
    assert "it swears" in verdict.reason


def test_settings_of_gate_and_evaluation_do_not_change_the_keys_of_a_training(tiny: Pipeline) -> None:
    tokens = cast(Tokens, SimpleNamespace(sha256="0", n_vocab=257))
    update = {"gate": GateConfig(margin=1.0), "evaluate": EvaluateConfig(max_bytes=None)}
    strict = tiny.model_copy(update=update)
    assert run_key(tiny, tokens, 1) == run_key(strict, tokens, 1)
    assert settings_key(tiny) == settings_key(strict)


def test_keys_that_say_how_text_is_read_do_not_change_the_keys_of_a_training_because_the_text_counts(
    tiny: Pipeline,
) -> None:
    tokens = cast(Tokens, SimpleNamespace(sha256="0", n_vocab=257))
    update = {"exclude": ("drafts/",), "formats": {".log": "text"}, "encoding": "cp1252", "text": "body"}
    other = tiny.model_copy(update={"corpus": tiny.corpus.model_copy(update=update)})
    assert run_key(tiny, tokens, 1) == run_key(other, tokens, 1)
    assert settings_key(tiny) == settings_key(other)

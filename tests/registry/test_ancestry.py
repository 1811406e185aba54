"""Warm starts: the weights that a training begins with, its version's ancestors, and their text at the gate."""

import re
from pathlib import Path

import pytest

from flows.config.pipelines import Pipeline
from flows.operations.retention import prune
from flows.registry import ancestry, versions
from flows.registry.ancestry import read_ancestry
from flows.state.root import StateRoot
from gptcore.errors import ConfigError
from gptcore.training.run_directory import RunDirectory
from tests.retrain.test_policy import asking, run
from tests.tiny import prose

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server", "root")]


def test_a_warm_start_begins_with_the_champions_weights_and_its_version_names_its_ancestors(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 30})
    assert run(warm)[0] == "promoted"  # nothing to start from yet
    (project / "text" / "two.txt").write_text(prose(2, 9000))
    _, outcome = run(warm)
    first, second = versions.list_versions(root, "gpt-tiny")
    assert second.tags["started_from"] == "models:/gpt-tiny/1" and "started_from" not in first.tags
    directory = RunDirectory(Path(outcome.run_directory))
    assert directory.read_config().start is not None
    assert directory.read_config().start.weights_sha256 == first.tags["weights_sha256"]
    before = RunDirectory(next((root.path / "runs" / "tiny").glob(f"{first.tags['run_key'][:16]}-1")))
    assert directory.read_metrics()[0]["loss"] < before.read_metrics()[0]["loss"] - 1
    assert [ancestor["uri"] for ancestor in read_ancestry(root, second)] == ["models:/gpt-tiny/2", "models:/gpt-tiny/1"]
    assert versions.describe(root, second)["ancestors"] == [
        {"uri": "models:/gpt-tiny/1", **{k: first.tags[k] for k in ("weights_sha256", "corpus_sha256")}}
    ]
    # Whether the champion changed or not, there is no reason to train on the same text again.
    assert run(warm)[0] == "skipped"


def test_the_gate_does_not_score_on_text_that_an_ancestor_learned_from(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    """The champion's ancestor learned from a text that then left the corpus and returns in another holdout."""
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 40})
    lost = project / "text" / "lost.txt"
    lost.write_text(prose(7, 9000))
    run(warm)
    lost.unlink()
    run(asking(warm, gate={"margin": 0.0, "confidence": 0.5}, train={"max_steps": 120}))
    champion = versions.find_champion(root, "gpt-tiny")
    assert champion is not None and champion.tags["started_from"] == "models:/gpt-tiny/1"
    lost.write_text(prose(7, 9000))
    scratch = asking(tiny, corpus={"val_fraction": 0.05, "holdout_fraction": 0.4})
    _, outcome = run(scratch)
    described = versions.describe(root, versions.resolve(root, outcome.uri))
    assert described["gate_champion_version"] == str(champion.version)
    # The new holdout (0.4 of the text instead of 0.15) contains lost text that the ancestor trained on.
    assert described["gate_excluded_bytes"] > 0.15 * len(prose(7, 9000))


def test_a_start_that_does_not_fit_is_refused_with_both_values(tiny: Pipeline, root: StateRoot) -> None:
    run(tiny)
    for section, keys, part in (
        ("corpus", {"tokenizer": "gpt2"}, "tokenizer bytes, corpus.tokenizer is gpt2"),
        ("model", {"emb_dim": 64}, "model.emb_dim 32, here it is 64"),
        ("model", {"recipe": "modern"}, "Set model.recipe: gpt2, or train.start_from: scratch."),
        ("train", {"start_from": "models:/gpt-tiny/9"}, "models:/gpt-tiny/9 does not exist"),
    ):
        warm = asking(asking(tiny, train={"start_from": "champion"}), **{section: keys})
        with pytest.raises((ConfigError, versions.UnknownVersion), match=re.escape(part)):
            ancestry.resolve_start(root, warm)


def test_a_warm_start_keeps_the_bpe_vocabulary(tiny: Pipeline, project: Path, root: StateRoot) -> None:
    warm = asking(tiny, corpus={"tokenizer": "bpe:300"}, train={"start_from": "champion"})
    run(warm)
    (project / "text" / "two.txt").write_text(prose(2, 3000).replace("e", "é"))
    run(warm)
    first, second = versions.list_versions(root, "gpt-tiny")
    assert first.tags["corpus_sha256"] != second.tags["corpus_sha256"]
    assert first.tags["tokenizer_sha256"] == second.tags["tokenizer_sha256"]


@pytest.mark.deep
def test_retention_keeps_the_ancestors_of_a_kept_version(tiny: Pipeline, project: Path, root: StateRoot) -> None:
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 40}, gate={"margin": 0.0, "confidence": 0.5})
    for night in range(3):
        (project / "text" / f"{night}.txt").write_text(prose(night + 10, 2000))
        run(warm)
    third = versions.list_versions(root, "gpt-tiny")[-1]
    needed = {str(ancestor["uri"]) for ancestor in read_ancestry(root, third)}
    prune(root, {"gpt-tiny": 1})
    assert needed <= {versions.uri_of(version) for version in versions.list_versions(root, "gpt-tiny")}

"""Warm starts: what a training begins with, what its version says about it, and whose text counts at the gate."""

import re
from pathlib import Path

import pytest

from flows.pipelines import Pipeline
from flows.releases import ancestry, registry
from flows.releases.ancestry import line_of
from flows.releases.prune import prune
from flows.state import StateRoot
from gptcore.errors import ConfigError
from gptcore.learning.rundir import RunDirectory
from tests.fixtures import prose

from .test_reason import asking, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server", "root")]


def test_a_warm_start_begins_with_the_champions_weights_and_its_version_names_its_ancestors(
    tiny: Pipeline, project: Path, root: StateRoot
) -> None:
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 30})
    assert run(warm)[0] == "Promoted"  # nothing to start from yet
    (project / "text" / "two.txt").write_text(prose(2, 9000))
    _, outcome = run(warm)
    first, second = registry.versions(root, "gpt-tiny")
    assert second.tags["started_from"] == "models:/gpt-tiny/1" and "started_from" not in first.tags
    directory = RunDirectory(Path(outcome.run_directory))
    assert directory.config().start is not None
    assert directory.config().start.weights_sha256 == first.tags["weights_sha256"]
    before = RunDirectory(next((root.path / "runs" / "tiny").glob(f"{first.tags['run_key'][:16]}-1")))
    assert directory.read_metrics()[0]["loss"] < before.read_metrics()[0]["loss"] - 1
    assert [ancestor["uri"] for ancestor in line_of(root, second)] == ["models:/gpt-tiny/2", "models:/gpt-tiny/1"]
    assert registry.describe(root, second)["ancestors"] == [
        {"uri": "models:/gpt-tiny/1", **{k: first.tags[k] for k in ("weights_sha256", "corpus_sha256")}}
    ]
    # The champion has moved, or not: neither is a reason to train on the same text again.
    assert run(warm)[0] == "Skipped"


def test_text_that_an_ancestor_learned_from_is_not_scored_on(tiny: Pipeline, project: Path, root: StateRoot) -> None:
    """The champion's ancestor learned from a text that has left the corpus and comes back into another holdout."""
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 40})
    lost = project / "text" / "lost.txt"
    lost.write_text(prose(7, 9000))
    run(warm)
    lost.unlink()
    run(asking(warm, gate={"margin": 0.0, "confidence": 0.5}, train={"max_steps": 120}))
    champion = registry.champion_of(root, "gpt-tiny")
    assert champion is not None and champion.tags["started_from"] == "models:/gpt-tiny/1"
    lost.write_text(prose(7, 9000))
    scratch = asking(tiny, corpus={"val_fraction": 0.05, "holdout_fraction": 0.4})
    _, outcome = run(scratch)
    described = registry.describe(root, registry.resolve(root, outcome.uri))
    assert described["gate_champion_version"] == str(champion.version)
    # What the ancestor trained on of the lost text stands in the new holdout (0.4 of it instead of 0.15).
    assert described["gate_excluded_bytes"] > 0.15 * len(prose(7, 9000))


def test_a_start_that_does_not_fit_is_refused_with_both_values(tiny: Pipeline, root: StateRoot) -> None:
    run(tiny)
    for section, keys, part in (
        ("corpus", {"tokenizer": "gpt2"}, "tokenizer bytes, corpus.tokenizer is gpt2"),
        ("model", {"emb_dim": 64}, "model.emb_dim 32, here it is 64"),
        ("train", {"start_from": "models:/gpt-tiny/9"}, "models:/gpt-tiny/9 does not exist"),
    ):
        warm = asking(asking(tiny, train={"start_from": "champion"}), **{section: keys})
        with pytest.raises((ConfigError, registry.UnknownVersion), match=re.escape(part)):
            ancestry.start_of(root, warm)


def test_a_bpe_vocabulary_stays_with_a_warm_start(tiny: Pipeline, project: Path, root: StateRoot) -> None:
    warm = asking(tiny, corpus={"tokenizer": "bpe:300"}, train={"start_from": "champion"})
    run(warm)
    (project / "text" / "two.txt").write_text(prose(2, 3000).replace("e", "é"))
    run(warm)
    first, second = registry.versions(root, "gpt-tiny")
    assert first.tags["corpus_sha256"] != second.tags["corpus_sha256"]
    assert first.tags["tokenizer_sha256"] == second.tags["tokenizer_sha256"]


def test_retention_keeps_what_a_kept_version_started_from(tiny: Pipeline, project: Path, root: StateRoot) -> None:
    warm = asking(tiny, train={"start_from": "champion", "max_steps": 40}, gate={"margin": 0.0, "confidence": 0.5})
    for night in range(3):
        (project / "text" / f"{night}.txt").write_text(prose(night + 10, 2000))
        run(warm)
    third = registry.versions(root, "gpt-tiny")[-1]
    needed = {str(ancestor["uri"]) for ancestor in line_of(root, third)}
    prune(root, {"gpt-tiny": 1})
    assert needed <= {registry.uri_of(version) for version in registry.versions(root, "gpt-tiny")}

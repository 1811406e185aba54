"""The decision card of a retraining, gathered and stored: for the Prefect run and for the MLflow run.

Who decides about a model looks at one page: it is made for versions that were promoted, rejected or never compared.
What stands on it and how, is report.py's; here the champion is looked up, made to continue the same prompts, and both
servers' addresses are found. Nothing here can change a verdict: a champion that is damaged or gone leaves its column
empty, with the reason.
"""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact

from flows import faults, tracking
from flows.pipelines import Pipeline
from flows.releases import registry
from flows.releases.gate import Verdict
from flows.releases.report import Card, Rows, Side, page, sentence, text
from flows.state import StateRoot
from gptcore.corpus import Snapshot
from gptcore.errors import GPTCoreError
from gptcore.judging.dossier import Scores, plot_rival, read_samples, sample_rival
from gptcore.learning.rundir import Result, RunDirectory


@dataclass(frozen=True)
class Retrained:
    """A retraining whose version has its verdict."""

    pipeline: Pipeline
    run: RunDirectory
    snapshot: Snapshot
    result: Result
    scores: Scores
    version: str
    verdict: Verdict
    mlflow_run_id: str
    flow_run_id: str
    samples: Path
    plots: Path


def publish(root: StateRoot, done: Retrained, changes: Rows | None = None) -> list[Path]:
    """Stores the card as an artifact of the Prefect flow run that calls this, and as card.md of the MLflow run.

    `changes` are name and value of what changed in the corpus since the training before; None on a first one. Returns
    the directories that were made for it, whose files belong to the MLflow run too.
    """
    theirs = _champion_samples(root, done)
    comparison = _comparison(done)
    card = _card(root, done, theirs, comparison, changes)
    key = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{done.pipeline.name}-card".lower())
    tracking.log_text(root, done.mlflow_run_id, page(card, _beside), "card.md")
    with faults.only_shown("the card"):
        create_markdown_artifact(page(card, _data_url), key=key, description=sentence(done.verdict, done.version))
    return [directory for directory in (theirs, comparison) if isinstance(directory, Path)]


def _card(
    root: StateRoot, done: Retrained, theirs: Path | str | None, comparison: Path | None, changes: Rows | None
) -> Card:
    name, number = done.pipeline.model_name, done.verdict.champion_version
    pictures = [("How the blocks decided", comparison / "gains.png")] if comparison else []
    return Card(
        model_name=name,
        verdict=done.verdict,
        gate=done.pipeline.gate,
        challenger=_side(root, name, done.version, done.samples),
        champion=_side(root, name, number, theirs) if number else None,
        changes=changes,
        scores=done.scores,
        result=done.result,
        pictures=[*pictures, ("How it learned", done.plots / "losses.png")],
        links=_links(root, done),
    )


def _side(root: StateRoot, name: str, version: str, samples: Path | str | None) -> Side:
    """A version's column. `samples` is where its samples are, or why there are none."""
    written, problem = (read_samples(samples), "") if isinstance(samples, Path) else ([], samples or "")
    try:
        facts = _facts(registry.lineage_of(root, name, version))
    except registry.RegistryError:
        facts = {}
    return Side(version, _version_link(root, name, version), facts, written, problem)


def _facts(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of a lineage the card compares. A version that was imported knows little of it."""
    formats = {
        "tokenizer": "{tokenizer}",
        "parameters": "{parameters:,}",
        "training": "{steps:,} steps, best at step {best_step:,}",
        "corpus": "{corpus[documents]:,} documents, {corpus[bytes][train]:,} bytes to train on",
    }
    facts = {}
    for fact, form in formats.items():
        try:
            facts[fact] = form.format_map(lineage)
        except (KeyError, TypeError, ValueError):
            continue
    return facts


def _champion_samples(root: StateRoot, done: Retrained) -> Path | str | None:
    """Where the champion's samples are, or why there are none; None where there is no champion."""
    name, number = done.pipeline.model_name, done.verdict.champion_version
    if not number:
        return None
    try:
        bundle = registry.bundle_path(root, name, number)
        weights = registry.lineage_of(root, name, number)["weights_sha256"]
        return sample_rival(done.run, done.snapshot, bundle, weights, done.pipeline.sample)
    except GPTCoreError as error:
        return str(error)


def _comparison(done: Retrained) -> Path | None:
    """The picture of the comparison, where there was one."""
    verdict = done.verdict
    if verdict.comparison is None or not verdict.gains:
        return None
    return plot_rival(done.run, verdict.gains, verdict.comparison, done.pipeline.gate.margin)


def _links(root: StateRoot, done: Retrained) -> Rows:
    api = os.environ.get("PREFECT_API_URL")
    run_page = tracking.address(root, done.mlflow_run_id)
    flow_page = f"{api.removesuffix('/api')}/runs/flow-run/{done.flow_run_id}" if api else None
    return [
        ("version", _version_link(root, done.pipeline.model_name, done.version)),
        ("MLflow run", _link(done.mlflow_run_id, run_page)),
        ("Prefect run", _link(done.flow_run_id, flow_page)),
        ("run directory", f"`{done.run.path}`"),
        ("lineage", f"`gptflow show models:/{done.pipeline.model_name}/{done.version}`"),
    ]


def _version_link(root: StateRoot, name: str, version: str) -> str:
    return _link(f"models:/{name}/{version}", registry.address(root, name, version))


def _link(words: str, address: str | None) -> str:
    """A link while there is a server to answer it, else the words alone."""
    return f"[{text(words)}]({address})" if address else f"`{words}`"


def _data_url(path: Path) -> str:
    """The picture itself: Prefect's UI shows no files."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _beside(path: Path) -> str:
    """Where the picture lies beside card.md, as `tracking.log_results` stores directories."""
    return f"{path.parent.name.rpartition('-')[0]}/{path.name}"

"""Gathers what the decision card of a retraining shows, and stores the card in the Prefect run and the MLflow run.

People who decide about a model look at this one page. Every version with a verdict gets it, also a version that was
never compared. cards/decision.py decides what the card says. This module looks up the champion, lets it continue the
same prompts, and finds the addresses of both servers. Nothing here can change a verdict: if the champion is damaged or
gone, its column stays empty and the card gives the reason.
"""

import base64
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact

from flows.cards.decision import Card, Rows, Side, escape, explain_verdict, render_card
from flows.cards.verdict import Verdict
from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.loading import load_verified
from flows.retrain.trainer_process import artifact_key
from flows.state.root import StateRoot
from flows.tracking import errors, runs
from gptcore.corpus.reading import count_documents
from gptcore.corpus.snapshot import Snapshot
from gptcore.errors import GPTCoreError
from gptcore.evaluation.run_report import Scores, plot_against_champion, read_samples, sample_champion
from gptcore.training.run_directory import Result, RunDirectory


@dataclass(frozen=True)
class JudgedRetraining:
    """A finished retraining whose version has its verdict."""

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


def publish_card(root: StateRoot, done: JudgedRetraining, changes: Rows | None = None) -> list[Path]:
    """Store the card as an artifact of the calling Prefect flow run, and as card.md of the MLflow run.

    `changes` are names and values of what changed in the corpus since the previous training; None for the first one.
    Returns the directories that were made for the card. Their files belong to the MLflow run too.
    """
    champion_samples = _sample_champion(root, done)
    comparison = _plot_comparison(done)
    card = _build_card(root, done, champion_samples, comparison, changes)
    runs.log_text(root, done.mlflow_run_id, render_card(card, _link_stored_picture), "card.md")
    with errors.warn_if_prefect_fails("the card"):
        create_markdown_artifact(
            render_card(card, _embed_picture),
            key=artifact_key(done.pipeline.name, "card"),
            description=explain_verdict(done.verdict, done.version),
        )
    return [directory for directory in (champion_samples, comparison) if isinstance(directory, Path)]


def _build_card(
    root: StateRoot,
    done: JudgedRetraining,
    champion_samples: Path | str | None,
    comparison: Path | None,
    changes: Rows | None,
) -> Card:
    name, champion = done.pipeline.model_name, done.verdict.champion_version
    pictures = [("How the blocks decided", comparison / "gains.png")] if comparison else []
    return Card(
        model_name=name,
        verdict=done.verdict,
        gate=done.pipeline.gate,
        challenger=_build_side(root, name, done.version, done.samples),
        champion=_build_side(root, name, champion, champion_samples) if champion else None,
        changes=changes,
        scores=done.scores,
        result=done.result,
        pictures=[*pictures, ("How it learned", done.plots / "losses.png")],
        links=_list_links(root, done),
    )


def _build_side(root: StateRoot, name: str, version: str, samples: Path | str | None) -> Side:
    """Build a version's column. `samples` is the directory of its samples, or the reason why they are missing."""
    column, problem = (read_samples(samples), "") if isinstance(samples, Path) else ([], samples or "")
    try:
        facts = _format_facts(versions.read_lineage(root, versions.resolve(root, f"models:/{name}/{version}")))
    except (versions.RegistryError, versions.UnknownVersion):
        facts = {}
    link = _link_version(root, name, version)
    return Side(version=version, link=link, facts=facts, samples=column, problem=problem)


def _format_facts(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Format the facts of a lineage that the card compares. The lineage of an imported version has few of them."""
    forms: dict[str, Callable[[], str]] = {
        "tokenizer": lambda: str(lineage["tokenizer"]),
        "parameters": lambda: f"{lineage['parameters']:,}",
        "training": lambda: f"{lineage['steps']:,} steps, best at step {lineage['best_step']:,}",
        "corpus": lambda: (
            f"{count_documents(lineage['corpus']['documents'])}, {lineage['corpus']['bytes']['train']:,} bytes to "
            "train on"
        ),
    }
    facts = {}
    for fact, write in forms.items():
        try:
            facts[fact] = write()
        except (KeyError, TypeError, ValueError):
            continue
    return facts


def _sample_champion(root: StateRoot, done: JudgedRetraining) -> Path | str | None:
    """Let the champion continue the run's prompts.

    Returns the directory of its samples, or the reason why they are missing, or None if there is no champion.
    """
    name, number = done.pipeline.model_name, done.verdict.champion_version
    if not number:
        return None
    try:
        champion = versions.resolve(root, f"models:/{name}/{number}")
        weights = versions.read_lineage(root, champion)["weights_sha256"]
        make_model = partial(load_verified, root, champion)
        return sample_champion(done.run, done.snapshot, make_model, weights, done.pipeline.sample)
    except GPTCoreError as error:
        return str(error)


def _plot_comparison(done: JudgedRetraining) -> Path | None:
    """Draw the comparison of the two models, if there was one, and return the directory of the picture."""
    verdict = done.verdict
    if verdict.comparison is None or not verdict.gains:
        return None
    return plot_against_champion(done.run, verdict.gains, verdict.comparison, done.pipeline.gate.margin)


def _list_links(root: StateRoot, done: JudgedRetraining) -> Rows:
    api = os.environ.get("PREFECT_API_URL")
    run_page = runs.find_url(root, done.mlflow_run_id)
    flow_page = f"{api.removesuffix('/api')}/runs/flow-run/{done.flow_run_id}" if api else None
    return [
        ("version", _link_version(root, done.pipeline.model_name, done.version)),
        ("MLflow run", _link(done.mlflow_run_id, run_page)),
        ("Prefect run", _link(done.flow_run_id, flow_page)),
        ("run directory", f"`{done.run.path}`"),
        ("lineage", f"`gptflow show models:/{done.pipeline.model_name}/{done.version}`"),
    ]


def _link_version(root: StateRoot, name: str, version: str) -> str:
    return _link(f"models:/{name}/{version}", versions.find_url(root, name, version))


def _link(words: str, address: str | None) -> str:
    """Return a link if a server is up that answers it, else the words alone."""
    return f"[{escape(words)}]({address})" if address else f"`{words}`"


def _embed_picture(path: Path) -> str:
    """Return the picture itself as a data URL, because Prefect's UI shows no files."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _link_stored_picture(path: Path) -> str:
    """Return the picture's path relative to card.md, as `runs.log_results` stores directories in MLflow."""
    return f"{path.parent.name.rpartition('-')[0]}/{path.name}"

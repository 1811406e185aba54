"""Registering a trained model as a version of the registry.

`register` first searches for a version with the same run key and attempt, so a retry never creates a second one. See
versions.py for look-ups, and gate.py for whether the version becomes champion.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import gptcore
from flows.cards import model_card
from flows.cards.model_card import Champion, TrainedModelFacts
from flows.registry import artifacts
from flows.registry.tags import VersionTags
from flows.registry.versions import BUNDLE, BUNDLE_SHA256, find_by_run_key, find_champion
from flows.state import postgres_lock
from flows.state.root import StateRoot, to_artifact_uri
from gptcore import manifest
from gptcore.bundle import write_bundle
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import RunDirectory

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),  # without a name, so that the model accepts a plain list of prompts
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 50),
            ParamSpec("temperature", "double", 0.8),
            ParamSpec("top_k", "long", 50),
            ParamSpec("top_p", "double", 1.0),
            ParamSpec("min_p", "double", 0.0),
            ParamSpec("repetition_penalty", "double", 1.0),
            ParamSpec("stop", "string", [], shape=(-1,)),
            ParamSpec("seed", "long", 0),
        ]
    ),
)
REQUIREMENTS = ("mlflow", "torch", "safetensors", "tiktoken", "numpy")


@dataclass(frozen=True)
class Candidate:
    """A trained model to register, and the key that its version is found by."""

    model_name: str
    run_key: str
    attempt: int
    mlflow_run_id: str
    lineage: dict[str, Any]
    facts: TrainedModelFacts | None = None
    """Scores and samples for the model card."""


def register(root: StateRoot, run: RunDirectory, tokens: Tokens, candidate: Candidate) -> str:
    """Log the run's best weights as a model and register it. Return the version, which may exist already.

    Raises CheckpointError, and registers nothing, if the weights were altered since the training ended.
    """
    if (existing := find_by_run_key(root, candidate.model_name, candidate.run_key, candidate.attempt)) is not None:
        return str(existing.version)
    champion = find_champion(root, candidate.model_name)
    lineage = {**candidate.lineage, "parent_version": None if champion is None else str(champion.version)}
    champion_facts = None
    if champion is not None:
        score = VersionTags.from_tags(champion.tags).holdout_bits_per_byte
        champion_facts = Champion(str(champion.version), None if score is None else f"{score:.4f}")
    tags = VersionTags.from_lineage({**lineage, "run_key": candidate.run_key, "attempt": candidate.attempt})

    def fill(bundle: Path) -> str:
        manifest.verify(run.final)  # the registered weights are the ones that were scored
        origin = {**lineage, "mlflow_run_id": candidate.mlflow_run_id}
        cfg = run.read_config().cfg()
        card = model_card.render_card(candidate.model_name, cfg, origin, candidate.facts, champion_facts)
        return write_bundle(bundle, cfg, run.weights, tokens.load_tokenizer(), origin, card)

    return add_version(root, candidate.model_name, candidate.mlflow_run_id, tags, run.path, fill)


def add_version(
    root: StateRoot,
    model_name: str,
    mlflow_run_id: str,
    tags: VersionTags,
    workplace: Path,
    fill: Callable[[Path], str],
) -> str:
    """Log the bundle that `fill` writes as a model of the MLflow run, and register it. Return the version.

    `fill` receives an empty directory for the bundle, inside `workplace`, and returns the sha256 of the bundle's
    manifest. If a killed attempt has already logged the model, that model is registered. Raises LockLost if a lock
    between machines was lost meanwhile.
    """
    mlflow.set_tracking_uri(root.tracking_uri)
    client = MlflowClient(root.tracking_uri)
    uri = _reuse_logged_model(client, root, mlflow_run_id) or _log_model(mlflow_run_id, workplace, fill)
    client.update_run(mlflow_run_id, status="RUNNING")  # logging ended the run, but its results are not logged yet
    model_id = uri.removeprefix("models:/")
    sha256 = client.get_logged_model(model_id).tags.get(BUNDLE_SHA256)  # missing if an earlier release logged it
    postgres_lock.ensure_held()
    with contextlib.suppress(MlflowException):  # the registered model exists already
        client.create_registered_model(model_name)
    created = client.create_model_version(
        model_name,
        uri,
        run_id=mlflow_run_id,
        tags=(tags.model_copy(update={"bundle_sha256": sha256}) if sha256 else tags).to_tags(),
        model_id=model_id,  # an MLflow server accepts no version without it
    )
    return str(created.version)


def _reuse_logged_model(client: MlflowClient, root: StateRoot, mlflow_run_id: str) -> str | None:
    """Return the URI of the model that a killed attempt has logged, None without one. Delete incomplete models."""
    experiment = client.get_run(mlflow_run_id).info.experiment_id
    own = f"source_run_id = '{mlflow_run_id}'"
    uri = None
    for model in client.search_logged_models([experiment], filter_string=own):
        if str(model.status) == "READY":
            uri = f"models:/{model.model_id}"
        else:
            artifacts.free(root, model.artifact_location)
            client.delete_logged_model(model.model_id)
    return uri


def _log_model(mlflow_run_id: str, workplace: Path, fill: Callable[[Path], str]) -> str:
    """Log the bundle that `fill` writes, and its lineage.json, to the MLflow run. Return the model's URI."""
    with manifest.stage(workplace) as temporary:
        bundle = temporary / BUNDLE
        bundle.mkdir()
        sha256 = fill(bundle)
        with mlflow.start_run(run_id=mlflow_run_id):
            mlflow.log_artifact(str(bundle / "lineage.json"))
            return mlflow.pyfunc.log_model(
                name="gpt",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={BUNDLE: to_artifact_uri(bundle)},
                tags={BUNDLE_SHA256: sha256},
                code_paths=[str(Path(str(gptcore.__file__)).parent)],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS],
            ).model_uri

"""A release: a trained model becomes a version of the registry.

A version is found by its run key and attempt before it is created, so a retry never doubles it. Look-ups stand in
registry.py; whether the version becomes champion is decided in gate.py.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
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
from flows.releases import artifacts, model_card
from flows.releases.model_card import Champion, Evidence
from flows.releases.registry import BUNDLE, champion_of, find
from flows.sharing import advisory
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import write_bundle
from gptcore.data import Tokens
from gptcore.learning.rundir import RunDirectory

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),  # without a name, so that a plain list of prompts will do
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
    """What is to be registered, and how it is found again."""

    model_name: str
    run_key: str
    attempt: int
    mlflow_run_id: str
    lineage: dict[str, Any]
    evidence: Evidence | None = None
    """For the model card."""


def register(root: StateRoot, run: RunDirectory, tokens: Tokens, candidate: Candidate) -> str:
    """Logs the run's best weights as a model, and registers it. Returns the version, which may have existed.

    Raises CheckpointError, and registers nothing, if the weights were altered since the training ended.
    """
    if (found := find(root, candidate.model_name, candidate.run_key, candidate.attempt)) is not None:
        return str(found.version)
    champion = champion_of(root, candidate.model_name)
    lineage = {**candidate.lineage, "parent_version": None if champion is None else str(champion.version)}
    rival = None
    if champion is not None:
        score = champion.tags.get("holdout_bits_per_byte")
        rival = Champion(str(champion.version), f"{float(score):.4f}" if score else None)
    tags = {**searchable(lineage), "run_key": candidate.run_key, "attempt": str(candidate.attempt)}

    def fill(bundle: Path) -> None:
        manifest.verify(run.final)  # what was judged is what is released
        origin = {**lineage, "mlflow_run_id": candidate.mlflow_run_id}
        cfg = run.config().cfg()
        card = model_card.page(candidate.model_name, cfg, origin, candidate.evidence, rival)
        write_bundle(bundle, cfg, run.weights, tokens.load_tokenizer(), origin, card)

    return add_version(root, candidate.model_name, candidate.mlflow_run_id, tags, run.path, fill)


def add_version(
    root: StateRoot,
    model_name: str,
    mlflow_run_id: str,
    tags: Mapping[str, str],
    workplace: Path,
    fill: Callable[[Path], None],
) -> str:
    """Logs the bundle that `fill` writes as a model of the MLflow run, and registers it. Returns the version.

    A model that a killed attempt has logged already is registered as it is. Raises LockLost where a lock between
    machines was lost meanwhile.
    """
    mlflow.set_tracking_uri(root.tracking_uri)
    client = MlflowClient(root.tracking_uri)
    uri = _logged_model(client, root, mlflow_run_id) or _log_model(mlflow_run_id, workplace, fill)
    client.update_run(mlflow_run_id, status="RUNNING")  # logging ended it, and the evidence is still to come
    advisory.ensure_held()
    with contextlib.suppress(MlflowException):  # it exists already
        client.create_registered_model(model_name)
    created = client.create_model_version(
        model_name,
        uri,
        run_id=mlflow_run_id,
        tags=dict(tags),
        model_id=uri.removeprefix("models:/"),  # a server takes no model without it
    )
    return str(created.version)


def searchable(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of the lineage is short enough to be searched for."""
    keys = (
        "pipeline",
        "imported_from",
        "settings_key",
        "started_from",
        "weights_sha256",
        "parameters",
        "holdout_bits_per_byte",
        "corpus_sha256",
        "documents_sha256",
        "tokens_sha256",
        "tokenizer",
        "tokenizer_sha256",
        "seed",
        "code_commit",
        "code_dirty",
        "gptcore_sha256",
        "python",
        "parent_version",
        "prefect_flow_run_id",
    )
    short = {key: str(lineage[key]) for key in keys if lineage.get(key) is not None}
    whole = {key: json.dumps(lineage[key]) for key in ("split", "packages", "hardware") if lineage.get(key)}
    return {**short, **whole}


def _logged_model(client: MlflowClient, root: StateRoot, mlflow_run_id: str) -> str | None:
    """The URI of the model that a killed attempt at registering has logged already; frees what it logged in part."""
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


def _log_model(mlflow_run_id: str, workplace: Path, fill: Callable[[Path], None]) -> str:
    with manifest.staging(workplace) as temporary:
        bundle = temporary / BUNDLE
        bundle.mkdir()
        fill(bundle)
        with mlflow.start_run(run_id=mlflow_run_id):
            mlflow.log_artifact(str(bundle / "lineage.json"))
            return mlflow.pyfunc.log_model(
                name="gpt",
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={BUNDLE: str(bundle)},
                code_paths=[str(Path(str(gptcore.__file__)).parent)],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS],
            ).model_uri

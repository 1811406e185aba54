"""A release: a trained model becomes a version of the registry, and the gate decides whether it is the champion.

A version is found by its run key and attempt before it is created, so a retry never doubles it. Look-ups stand in
registry.py; here is what changes it.
"""

import contextlib
import tempfile
from collections.abc import Mapping
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
from flows.registry import BUNDLE, CHAMPION, RegistryError, bundle_path, champion_of, find
from flows.state import StateRoot
from gptcore.bundle import load, write_bundle
from gptcore.corpus import Snapshot, blocks
from gptcore.data import Tokens
from gptcore.dossier import Scores, reported_side
from gptcore.errors import CheckpointError, TokenizerError
from gptcore.evaluate import evaluate_blocks
from gptcore.rundir import RunDirectory

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),  # without a name, so that a plain list of prompts will do
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 50),
            ParamSpec("temperature", "double", 0.8),
            ParamSpec("top_k", "long", 50),
            ParamSpec("top_p", "double", 1.0),
            ParamSpec("seed", "long", 0),
        ]
    ),
)
REQUIREMENTS = ("mlflow", "torch", "safetensors", "tiktoken", "numpy")


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about a challenger, and why."""

    promoted: bool
    reason: str
    """A sentence with the numbers."""
    bits_per_byte: float
    champion_bits_per_byte: float | None
    """The champion's on the same text; None where there was none."""
    champion_version: str | None


@dataclass(frozen=True)
class Candidate:
    """What is to be registered, and how it is found again."""

    model_name: str
    run_key: str
    attempt: int
    mlflow_run_id: str
    lineage: dict[str, Any]


def register(root: StateRoot, run: RunDirectory, tokens: Tokens, candidate: Candidate) -> str:
    """Logs the run's best weights as a model, and registers it. Returns the version, which may have existed."""
    if (found := find(root, candidate.model_name, candidate.run_key, candidate.attempt)) is not None:
        return str(found.version)
    mlflow.set_tracking_uri(root.tracking_uri)
    tags = {**_tags(candidate.lineage), "run_key": candidate.run_key, "attempt": str(candidate.attempt)}
    uri = _logged_model(root, candidate) or _log_model(run, tokens, candidate)
    client = MlflowClient(root.tracking_uri)
    with contextlib.suppress(MlflowException):  # it exists already
        client.create_registered_model(candidate.model_name)
    created = client.create_model_version(candidate.model_name, uri, run_id=candidate.mlflow_run_id, tags=tags)
    return str(created.version)


def gate(root: StateRoot, model_name: str, version: str, snapshot: Snapshot, scores: Scores) -> Verdict:
    """Decides about a version and, if it is the better one, makes it champion. Decided once, it stays decided.

    Champion and challenger are scored here, on the same text. The first version must be finite and beat the unigram
    model. Raises RegistryError if the champion cannot be loaded: then nothing is promoted.
    """
    client = MlflowClient(root.tracking_uri)
    champion = champion_of(root, model_name)
    rival = champion if champion is not None and str(champion.version) != version else None
    challenger_score = _score(root, model_name, version, snapshot)
    champion_score = _score(root, model_name, str(rival.version), snapshot) if rival else None
    verdict = decide(challenger_score, champion_score, scores, str(rival.version) if rival else None)
    tags = {
        "verdict": "promoted" if verdict.promoted else "rejected",
        "reason": verdict.reason,
        "gate_bits_per_byte": f"{challenger_score:.6f}",
        "gate_champion_bits_per_byte": "" if champion_score is None else f"{champion_score:.6f}",
    }
    if verdict.promoted:
        client.set_registered_model_alias(model_name, CHAMPION, version)
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)
    return verdict


def decide(challenger: float, champion: float | None, scores: Scores, champion_version: str | None) -> Verdict:
    """The verdict on scores in bits per byte. Not finite, equal or worse never wins."""
    simple = scores.baselines.unigram_bits_per_byte
    rival, name = (simple, "the unigram model") if champion is None else (champion, f"version {champion_version}")
    better = challenger < rival
    sign = "<" if better else ">=" if challenger >= rival else "is not comparable with"
    reason = f"{challenger:.4f} bits per byte {sign} {rival:.4f} of {name} on the same {scores.reported.blocks} blocks"
    return Verdict(better, reason, challenger, champion, champion_version)


def _tags(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What of the lineage is short enough to be searched for."""
    keys = (
        "weights_sha256",
        "holdout_bits_per_byte",
        "corpus_sha256",
        "tokenizer",
        "seed",
        "code_commit",
        "parent_version",
        "prefect_flow_run_id",
    )
    return {key: str(lineage[key]) for key in keys if lineage.get(key) is not None}


def _logged_model(root: StateRoot, candidate: Candidate) -> str | None:
    """The URI of the model that a killed attempt at registering has logged already."""
    outputs = MlflowClient(root.tracking_uri).get_run(candidate.mlflow_run_id).outputs
    for output in outputs.model_outputs if outputs else ():
        model = mlflow.get_logged_model(output.model_id)
        if str(model.status) == "READY":
            return f"models:/{output.model_id}"
    return None


def _log_model(run: RunDirectory, tokens: Tokens, candidate: Candidate) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / BUNDLE
        bundle.mkdir()
        write_bundle(bundle, run.config().cfg(), run.weights, tokens.load_tokenizer(), candidate.lineage)
        with mlflow.start_run(run_id=candidate.mlflow_run_id):
            return mlflow.pyfunc.log_model(
                name="gpt",
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={BUNDLE: str(bundle)},
                code_paths=[str(Path(str(gptcore.__file__)).parent)],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in REQUIREMENTS],
            ).model_uri


def _score(root: StateRoot, name: str, version: str, snapshot: Snapshot) -> float:
    """Bits per byte of a registered version on the reported side, with its own tokenizer."""
    side = reported_side(snapshot)
    try:
        loaded = load(bundle_path(root, name, version))
    except (CheckpointError, TokenizerError) as error:
        raise RegistryError(f"models:/{name}/{version} cannot be scored, so nothing is promoted: {error}") from None
    return evaluate_blocks(loaded.model, loaded.tokenizer, blocks(snapshot.path, side), "cpu", side).bits_per_byte

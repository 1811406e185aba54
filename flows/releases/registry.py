"""The model registry, looked up: versions, the champion alias, lineage.

With release.py, gate.py and champion.py, which change it, and tracking.py the only place that talks to MLflow.
Everything read from a version is safetensors or JSON.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.pipelines import Pipeline
from flows.state import StateRoot
from gptcore.errors import GPTCoreError

CHAMPION = "champion"
BUNDLE = "bundle"
SOURCES_OVERRIDDEN = "sources overridden"
"""The tag gate_kind of an experiment: a version that learned from other sources than its pipeline's."""


class RegistryError(GPTCoreError):
    """A version's files are missing or damaged."""


class UnknownVersion(GPTCoreError):
    """A URI names no version of the registry."""

    exit_code = 2


def find(root: StateRoot, model_name: str, run_key: str, attempt: int | None = None) -> ModelVersion | None:
    """The newest version of this run key, and of this attempt if it is given."""
    chosen = f"name = '{model_name}' and tags.run_key = '{run_key}'"
    if attempt is not None:
        chosen += f" and tags.attempt = '{attempt}'"
    found = MlflowClient(root.tracking_uri).search_model_versions(chosen)
    return max(found, key=lambda version: int(version.version), default=None)


def champion_of(root: StateRoot, model_name: str) -> ModelVersion | None:
    """The version that the champion alias names, if there is one."""
    try:
        return MlflowClient(root.tracking_uri).get_model_version_by_alias(model_name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def resolve(root: StateRoot, uri: str) -> ModelVersion:
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION names. Raises UnknownVersion."""
    form = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))", uri)
    if form is None:
        raise UnknownVersion(f"{uri!r} is not a model URI: write models:/NAME@champion or models:/NAME/VERSION")
    name, alias, number = form.groups()
    client = MlflowClient(root.tracking_uri)
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException:
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none yet"
        raise UnknownVersion(
            f"{uri} does not exist in {root.tracking_address}. Registered models: {known}; `gptflow models` lists "
            "versions."
        ) from None


def bundle_path(root: StateRoot, name: str, version: str, file: str = "") -> Path:
    """The version's bundle as a local directory, or `file` of it. Raises RegistryError if its files are gone."""
    mlflow.set_tracking_uri(root.tracking_uri)
    try:
        inside = "/".join(filter(None, ("artifacts", BUNDLE, file)))
        return Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}/{inside}"))
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of models:/{name}/{version} cannot be read: {error}. Restore the artifacts from a backup, or "
            "promote another version."
        ) from None


def uri_of(found: ModelVersion) -> str:
    """models:/NAME/VERSION."""
    return f"models:/{found.name}/{found.version}"


def newest_finished(root: StateRoot, pipeline: Pipeline) -> ModelVersion | None:
    """The pipeline's newest version with a verdict, whatever it was; experiments on other sources do not count."""
    found = MlflowClient(root.tracking_uri).search_model_versions(f"name = '{pipeline.model_name}'")
    own = (
        version
        for version in found
        if "verdict" in version.tags
        and version.tags.get("pipeline") == pipeline.name
        and version.tags.get("gate_kind") != SOURCES_OVERRIDDEN
    )
    return max(own, key=lambda version: int(version.version), default=None)


def describe(root: StateRoot, found: ModelVersion) -> dict[str, Any]:
    """A version's whole lineage as one object."""
    name, number = found.name, str(found.version)
    return {
        **summary(root, found),
        **lineage_of(root, name, number),
        "mlflow_run_id": found.run_id,
        "uri": f"models:/{name}/{number}",
    }


def address(root: StateRoot, name: str, version: str) -> str | None:
    """The version's page in MLflow's UI, if there is a server that shows it."""
    ui = root.mlflow_ui()
    return f"{ui}/#/models/{name}/versions/{version}" if ui else None


def lineage_of(root: StateRoot, name: str, version: str) -> dict[str, Any]:
    """What the version's lineage.json says. Raises RegistryError if it is gone or damaged."""
    path = bundle_path(root, name, version, "lineage.json")
    try:
        lineage: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"models:/{name}/{version} has no readable lineage, {path}: {error}. Restore its artifacts from a backup."
        ) from None
    return lineage


def summary(root: StateRoot, found: ModelVersion) -> dict[str, Any]:
    """A version in the words of `describe`, as far as its tags say them."""
    aliases = MlflowClient(root.tracking_uri).get_registered_model(found.name).aliases
    tags = found.tags
    return {
        "model": found.name,
        "version": int(found.version),
        "aliases": sorted(alias for alias, version in aliases.items() if str(version) == str(found.version)),
        "weights_sha256": tags.get("weights_sha256"),
        "holdout_bits_per_byte": _float(tags.get("holdout_bits_per_byte")),
        "corpus_sha256": tags.get("corpus_sha256"),
        "tokenizer": tags.get("tokenizer"),
        "seed": int(tags["seed"]) if "seed" in tags else None,
        "code_commit": tags.get("code_commit"),
        "parent_version": tags.get("parent_version") or None,
        "prefect_flow_run_id": tags.get("prefect_flow_run_id") or None,
        "mlflow_run_id": found.run_id,
        "verdict": tags.get("verdict"),
        "reason": tags.get("reason"),
        "withdrawn": tags.get("withdrawn"),
        "gate_bits_per_byte": _float(tags.get("gate_bits_per_byte")),
        "gate_champion_bits_per_byte": _float(tags.get("gate_champion_bits_per_byte")),
        "gate_champion_version": tags.get("gate_champion_version") or None,
        "gate_kind": tags.get("gate_kind"),
        "gate_low": _float(tags.get("gate_low")),
        "gate_high": _float(tags.get("gate_high")),
        "gate_blocks": _int(tags.get("gate_blocks")),
        "gate_bytes": _int(tags.get("gate_bytes")),
        "gate_excluded_bytes": _int(tags.get("gate_excluded_bytes")),
        "gate_unknown": tags.get("gate_unknown") or None,
        "created_ms": found.creation_timestamp,
    }


def versions(root: StateRoot, model_name: str | None = None) -> list[ModelVersion]:
    """All versions, of one model or of all, by model and number. Raises UnknownVersion for an unknown model."""
    client = MlflowClient(root.tracking_uri)
    # A quote would end the filter's, and no name of ours can have one.
    is_possible = "'" not in (model_name or "")
    found = client.search_model_versions(f"name = '{model_name}'" if model_name else None) if is_possible else []
    if model_name and not found:
        known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none yet"
        raise UnknownVersion(f"there is no registered model {model_name!r}. Registered models: {known}.")
    return sorted(found, key=lambda version: (version.name, int(version.version)))


def _float(text: str | None) -> float | None:
    """None also for what is not finite: JSON has no word for it."""
    return value if text and math.isfinite(value := float(text)) else None


def _int(text: str | None) -> int | None:
    return int(text) if text else None

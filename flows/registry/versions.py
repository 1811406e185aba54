"""Look-ups in the model registry: versions, the champion, bundles and lineage.

Nothing here writes: register.py, gate.py and champion.py change the registry. All files of a version are safetensors
or JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from flows.cards.verdict import SOURCES_OVERRIDDEN
from flows.config.pipelines import Pipeline
from flows.registry.tags import GATE_TAGS, VersionTags
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.corpus.snapshot import DOCUMENTS
from gptcore.errors import CheckpointError, GPTCoreError
from gptcore.records import parse_record, read_bytes

CHAMPION = "champion"
BUNDLE = "bundle"
BUNDLE_SHA256 = "bundle_sha256"
"""The tag of a version, and of its logged model, with the sha256 of the bundle's manifest."""
_VERSION = re.compile(r"(?:models:/)?([^/@:]+)(?:@([^/@:]+)|/([0-9]+))?")
_NEWEST = 20
"""Versions that a search for the newest finished one reads at a time."""
_SUMMARY = {
    *("weights_sha256", BUNDLE_SHA256, "holdout_bits_per_byte", "corpus_sha256", "tokenizer", "seed", "code_commit"),
    *("parent_version", "prefect_flow_run_id", "verdict", "reason", "withdrawn", *GATE_TAGS),
}
"""The tags that a summary of a version shows."""


class RegistryError(GPTCoreError):
    """A version's files are missing or damaged, or the registry does not answer."""


class UnknownVersion(GPTCoreError):
    """The registry has no such model or version."""

    exit_code = 2


def find_by_run_key(root: StateRoot, model_name: str, run_key: str, attempt: int | None = None) -> ModelVersion | None:
    """Return the newest version with this run key, and with this attempt if one is given. None without one."""
    query = f"name = '{model_name}' and tags.run_key = '{run_key}'"
    if attempt is not None:
        query += f" and tags.attempt = '{attempt}'"
    matches = MlflowClient(root.tracking_uri).search_model_versions(query)
    return max(matches, key=lambda version: int(version.version), default=None)


def find_by_settings(root: StateRoot, model_name: str, settings_key: str, tokens_sha256: str) -> Iterator[ModelVersion]:
    """Yield the versions that were trained with these settings on these tokens, the newest first."""
    wanted = {"settings_key": settings_key, "tokens_sha256": tokens_sha256}
    query = " and ".join([f"name = '{model_name}'", *(f"tags.{key} = '{value}'" for key, value in wanted.items())])
    search = MlflowClient(root.tracking_uri).search_model_versions
    yield from iterate_results(search, filter_string=query, order_by=["version_number DESC"])


def find_champion(root: StateRoot, model_name: str) -> ModelVersion | None:
    """Return the version that the alias `champion` names. None if there is no champion."""
    try:
        return MlflowClient(root.tracking_uri).get_model_version_by_alias(model_name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def resolve(root: StateRoot, uri: str) -> ModelVersion:
    """Return the version that NAME/VERSION, NAME@ALIAS or NAME (its champion) names. Raises UnknownVersion.

    MLflow's `models:/` in front may be left out.
    """
    if (match := _VERSION.fullmatch(uri)) is None:
        is_run = " It is a training in MLflow, whose version has a number." if uri.startswith("runs:") else ""
        raise UnknownVersion(
            f"{uri!r} does not name a version.{is_run} Write NAME/VERSION, NAME@ALIAS or NAME, which is its champion. "
            "`gptflow models` lists versions."
        )
    name, alias, number = match.groups()
    client = MlflowClient(root.tracking_uri)
    try:
        if number:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias or CHAMPION)
    except MlflowException:
        raise UnknownVersion(_explain_unknown(root, uri, name, alias, number)) from None


def _explain_unknown(root: StateRoot, uri: str, name: str, alias: str | None, number: str | None) -> str:
    """Return why there is no such version, and which there are."""
    try:
        newest = list_versions(root, name)[-1].version
    except UnknownVersion:
        known = ", ".join(list_models(root)) or "none yet"
        return (
            f"{uri} does not exist in {root.tracking_address}. Registered models: {known}; `gptflow models` lists "
            "versions."
        )
    why = "" if number else f": {name} has no version with the alias {alias or CHAMPION}"
    return f"{uri} does not exist{why}. The newest version is {name}/{newest}; `gptflow models {name}` lists all."


def fetch_bundle(root: StateRoot, name: str, version: str, file: str = "") -> Path:
    """Return the local path of the version's bundle, or of its file `file`, after a download if it is remote.

    Raises RegistryError if the files are missing.
    """
    mlflow.set_tracking_uri(root.tracking_uri)
    try:
        inside = "/".join(filter(None, ("artifacts", BUNDLE, file)))
        return Path(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}/{inside}"))
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of models:/{name}/{version} cannot be read: {error}. Restore the artifacts from a backup."
        ) from None


def fetch_file(root: StateRoot, version: ModelVersion, file: str) -> Path:
    """Return the local path of a file of the version's bundle, after comparing it with what was registered.

    Raises RegistryError if the file is missing or was altered. Without the tag BUNDLE_SHA256, nothing is compared.
    """
    name, number = version.name, str(version.version)
    path = fetch_bundle(root, name, number, file)
    if (sha256 := VersionTags.from_tags(version.tags).bundle_sha256) is not None:
        listing = fetch_bundle(root, name, number, manifest.MANIFEST).parent
        try:
            check_manifest(listing, sha256)
            manifest.verify_file(listing, file, path)
        except CheckpointError as error:
            raise RegistryError(f"{uri_of(version)} is damaged: {error} Restore its artifacts from a backup.") from None
    return path


def check_manifest(bundle: Path, expected: str) -> None:
    """Raise CheckpointError if the manifest in `bundle` is not the one that was registered. Hashes no other file."""
    path = bundle / manifest.MANIFEST
    if (sha256 := manifest.read_sha256(bundle)) != expected:
        raise CheckpointError(f"{path} has sha256 {sha256}, registered was {expected}: it was altered.")


def uri_of(version: ModelVersion) -> str:
    """Return the URI models:/NAME/VERSION."""
    return f"models:/{version.name}/{version.version}"


def find_newest_finished(root: StateRoot, pipeline: Pipeline) -> ModelVersion | None:
    """Return the pipeline's newest version with any verdict, None without one. Ignore experiments on other sources."""
    search = MlflowClient(root.tracking_uri).search_model_versions
    # Reading a version and its tags takes a millisecond. The newest ones come first, so one page is enough as a rule.
    newest_first = {"order_by": ["version_number DESC"], "max_results": _NEWEST}
    for version in iterate_results(search, filter_string=f"name = '{pipeline.model_name}'", **newest_first):
        tags = VersionTags.from_tags(version.tags)
        is_own = tags.verdict is not None and tags.pipeline == pipeline.name
        if is_own and tags.gate_kind != SOURCES_OVERRIDDEN:
            return version
    return None


def find_split(root: StateRoot, pipeline: Pipeline) -> dict[str, Any]:
    """Return the settings of the split that the pipeline keeps, as its snapshot recorded them. Empty at first.

    They are those of the champion, so that the gate finds as much text as possible that neither version has learned. If
    the pipeline has no champion of its own, they are those of its newest finished training.
    """
    if (kept := _find_split_version(root, pipeline)) is None:
        return {}
    recorded: dict[str, Any] = VersionTags.from_tags(kept.tags).split or read_lineage(root, kept)["split"]
    return recorded


def find_split_snapshot(root: StateRoot, pipeline: Pipeline) -> Path | None:
    """Return the snapshot whose split the pipeline keeps. None at first, or if its list of documents is lost."""
    kept = _find_split_version(root, pipeline)
    sha256 = None if kept is None else VersionTags.from_tags(kept.tags).corpus_sha256
    if sha256 is None:
        return None
    path = root.fetch_corpus(sha256)
    try:
        manifest.verify_file(path, DOCUMENTS, path / DOCUMENTS)
    except CheckpointError:
        return None
    return path


def _find_split_version(root: StateRoot, pipeline: Pipeline) -> ModelVersion | None:
    champion = find_champion(root, pipeline.model_name)
    is_own = champion is not None and VersionTags.from_tags(champion.tags).pipeline == pipeline.name
    return champion if is_own else find_newest_finished(root, pipeline)


def describe(root: StateRoot, version: ModelVersion) -> dict[str, Any]:
    """Return a version's tags and whole lineage as one JSON object."""
    return {
        **summarize(root, version),
        **read_lineage(root, version),
        "mlflow_run_id": version.run_id,
        "uri": uri_of(version),
    }


def find_url(root: StateRoot, name: str, version: str) -> str | None:
    """Return the URL of the version's page in MLflow's UI. None if no server shows it."""
    ui = root.find_mlflow_ui()
    return f"{ui}/#/models/{name}/versions/{version}" if ui else None


def read_lineage(root: StateRoot, version: ModelVersion) -> dict[str, Any]:
    """Return the contents of the version's lineage.json. Raises RegistryError if the file is missing or altered."""
    path = fetch_file(root, version, "lineage.json")
    try:
        lineage = parse_record(read_bytes(path), dict[str, Any])
    except (OSError, GPTCoreError) as error:
        raise RegistryError(
            f"{uri_of(version)} has no readable lineage, {path}: {error}. Restore its artifacts from a backup."
        ) from None
    if lineage is None:
        raise RegistryError(f"{path} is damaged. Restore the artifacts of {uri_of(version)} from a backup.")
    return lineage


def summarize(root: StateRoot, version: ModelVersion) -> dict[str, Any]:
    """Return what a version's tags and aliases say, with the keys of `describe`."""
    aliases = [
        alias
        for model in list_registered(root, version.name)
        for alias, number in model.aliases.items()
        if str(number) == str(version.version)
    ]
    return _summarize(version, aliases)


def summarize_all(root: StateRoot, model_name: str | None = None) -> list[dict[str, Any]]:
    """Summarize all versions of one model or of all models, by model and number. Raises UnknownVersion.

    The number of queries does not grow with the number of versions.
    """
    listed = list_versions(root, model_name)
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in list_registered(root, model_name):
        for alias, number in model.aliases.items():
            aliases.setdefault((model.name, str(number)), []).append(alias)
    return [_summarize(version, aliases.get((version.name, str(version.version)), ())) for version in listed]


def _summarize(version: ModelVersion, aliases: Sequence[str]) -> dict[str, Any]:
    tags = VersionTags.from_tags(version.tags)
    return {
        "model": version.name,
        "version": int(version.version),
        "aliases": sorted(aliases),
        "mlflow_run_id": version.run_id,
        **json.loads(tags.model_dump_json(include=_SUMMARY)),  # a number that is not finite becomes None
        "created_ms": version.creation_timestamp,
    }


def list_models(root: StateRoot) -> list[str]:
    """Return the names of all registered models, sorted."""
    return [model.name for model in list_registered(root)]


def list_registered(root: StateRoot, model_name: str | None = None) -> list[RegisteredModel]:
    """Return one registered model or all of them, by name, with their tags and aliases. Empty if there is none.

    `MlflowClient.get_registered_model` would also read every version of the model, to pick the latest ones.
    """
    search = MlflowClient(root.tracking_uri).search_registered_models
    matches = iterate_results(search, filter_string=_filter_name(model_name)) if _is_possible(model_name) else ()
    return sorted(matches, key=lambda model: model.name)


def list_versions(root: StateRoot, model_name: str | None = None) -> list[ModelVersion]:
    """Return all versions of one model or of all models, by model and number. Raises UnknownVersion."""
    search = MlflowClient(root.tracking_uri).search_model_versions
    matches = iterate_results(search, filter_string=_filter_name(model_name)) if _is_possible(model_name) else ()
    listed = sorted(matches, key=lambda version: (version.name, int(version.version)))
    if model_name and not listed:
        known = ", ".join(list_models(root)) or "none yet"
        raise UnknownVersion(f"there is no registered model {model_name!r}. Registered models: {known}.")
    return listed


def iterate_results(search: Callable[..., Any], **settings: Any) -> Iterator[Any]:
    """Yield the results of all pages of a search of MLflow's client."""
    page = search(**settings)
    yield from page
    while page.token:
        page = search(**settings, page_token=page.token)
        yield from page


def _is_possible(model_name: str | None) -> bool:
    """Whether a model can have the name. A quote, which no registered model's name has, would end the filter's text."""
    return "'" not in (model_name or "")


def _filter_name(model_name: str | None) -> str | None:
    return f"name = '{model_name}'" if model_name else None

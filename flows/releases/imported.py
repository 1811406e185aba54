"""A model that was made elsewhere becomes a version of the registry.

Its lineage says where it comes from, with the hash of every file. Nothing is known of the text that it learned from,
and the gate says so wherever it is compared. It becomes champion where there is none: a person asked for it, and there
is nothing to compare it with. Otherwise the champion stays, until a person promotes the version.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from safetensors.torch import save_file

from flows import tracking
from flows.releases import model_card
from flows.releases.champion import promote
from flows.releases.lineage import code, packages
from flows.releases.registry import champion_of
from flows.releases.release import add_version, searchable
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import num_parameters, write_bundle
from gptcore.exchange.checkpoints import Checkpoint

VERDICT = "imported"


@dataclass(frozen=True)
class Imported:
    """A version, and what became of it."""

    model: str
    version: str
    champion: str
    """The champion's version now."""
    is_new: bool
    """Whether it was not there before."""
    lineage: dict[str, Any]

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION."""
        return f"models:/{self.model}/{self.version}"


def register(root: StateRoot, model_name: str, checkpoint: Checkpoint, by: str) -> Imported:
    """Registers a checkpoint, unless the model has a version with its weights and tokenizer already.

    `by` names who asked for it. Raises RegistryError if the registry does not answer.
    """
    tracking.open_database(root)
    manifest.sweep(root.imports)
    with (
        root.hold(root.path / "locks" / f"{quote(model_name, safe='')}.import", overlap="wait"),
        manifest.staging(root.imports) as staged,
    ):
        weights = staged / "weights.safetensors"
        save_file(checkpoint.weights, weights)
        lineage = _lineage(checkpoint, weights)
        found = _found(root, model_name, lineage["import_key"])
        version = found or _added(root, model_name, checkpoint, weights, lineage)
    if (champion := champion_of(root, model_name)) is None:
        reason = f"imported from {checkpoint.source}; there was no champion to compare it with"
        promote(root, model_name, version, reason, by)
        champion = champion_of(root, model_name)
    assert champion is not None, "this version, or one that came in between"
    return Imported(model_name, version, str(champion.version), found is None, lineage)


def _found(root: StateRoot, model_name: str, import_key: str) -> str | None:
    own = f"name = '{model_name}' and tags.import_key = '{import_key}'"
    found = MlflowClient(root.tracking_uri).search_model_versions(own)
    return str(found[0].version) if found else None


def _added(root: StateRoot, model_name: str, checkpoint: Checkpoint, weights: Path, lineage: dict[str, Any]) -> str:
    tags = {**searchable(lineage), "import_key": lineage["import_key"]}
    run_id = tracking.open_import(root, f"{model_name} {lineage['import_key']}", searchable(lineage))

    def fill(bundle: Path) -> None:
        origin = {**lineage, "mlflow_run_id": run_id}
        card = model_card.page(model_name, checkpoint.cfg, origin)
        write_bundle(bundle, checkpoint.cfg, weights, checkpoint.tokenizer, origin, card)

    told = {"verdict": VERDICT, "reason": f"imported from {checkpoint.source}"}
    version = add_version(root, model_name, run_id, {**tags, **told}, root.imports, fill)
    tracking.close_run(root, run_id, "FINISHED", told)
    return version


def _lineage(checkpoint: Checkpoint, weights: Path) -> dict[str, Any]:
    """What lineage.json says; None where only a training could know it."""
    digest, tokenizer = manifest.sha256_of_file(weights), checkpoint.tokenizer
    return {
        "imported_from": checkpoint.source,
        "files": checkpoint.files,
        "import_key": manifest.sha256_of([digest, tokenizer.sha256, checkpoint.cfg]),
        "weights_sha256": digest,
        "parameters": num_parameters(weights),
        "dropped_ids": checkpoint.dropped_ids,
        "corpus_sha256": None,
        "holdout_bits_per_byte": None,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "config": {"model": checkpoint.cfg},
        "seed": None,
        "ancestors": [],
        **code(),
        "packages": packages(),
        "python": platform.python_version(),
    }

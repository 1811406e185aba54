"""Importing a model that was trained elsewhere as a version of the registry.

The version's lineage records where the model comes from, with the hash of every file. The text that the model learned
from is unknown, and the gate mentions that in every comparison. If the registered model has no champion, the import
becomes champion: a person asked for it, and no other version exists to compare it with. Otherwise the champion stays
until a person promotes the import.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from safetensors.torch import save_file

from flows.cards import model_card
from flows.registry.champion import promote
from flows.registry.lineage import software
from flows.registry.register import add_version
from flows.registry.tags import VersionTags
from flows.registry.versions import find_champion
from flows.state.root import StateRoot
from flows.tracking import runs
from gptcore import manifest
from gptcore.bundle import count_parameters, write_bundle
from gptcore.huggingface.import_ import Checkpoint

VERDICT = "imported"


@dataclass(frozen=True)
class Imported:
    """The version of an imported model, and the champion after the import."""

    model: str
    version: str
    champion: str
    """The champion's version after the import."""
    is_new: bool
    """Whether this import created the version."""
    lineage: dict[str, Any]

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION."""
        return f"models:/{self.model}/{self.version}"


def register(root: StateRoot, model_name: str, checkpoint: Checkpoint, by: str) -> Imported:
    """Register a checkpoint, unless the model already has a version with the same weights and tokenizer.

    `by` names the person who imports it. Raises RegistryError if the registry does not answer.
    """
    runs.connect_and_migrate(root)
    manifest.sweep(root.imports)
    with (
        root.hold(root.path / "locks" / f"{quote(model_name, safe='')}.import", overlap="wait"),
        manifest.stage(root.imports) as staged,
    ):
        weights = staged / "weights.safetensors"
        save_file(checkpoint.weights, weights)
        lineage = _build_lineage(checkpoint, weights)
        existing = _find_import(root, model_name, lineage["import_key"])
        version = existing or _add_import(root, model_name, checkpoint, weights, lineage)
    if (champion := find_champion(root, model_name)) is None:
        reason = f"imported from {checkpoint.source}; there was no champion to compare it with"
        promote(root, model_name, version, reason, by)
        champion = find_champion(root, model_name)
    assert champion is not None, "this version, or one that was promoted meanwhile"
    return Imported(
        model=model_name,
        version=version,
        champion=str(champion.version),
        is_new=existing is None,
        lineage=lineage,
    )


def _find_import(root: StateRoot, model_name: str, import_key: str) -> str | None:
    """Return the version that was imported with this key, None if there is none."""
    own = f"name = '{model_name}' and tags.import_key = '{import_key}'"
    imports = MlflowClient(root.tracking_uri).search_model_versions(own)
    return str(imports[0].version) if imports else None


def _add_import(
    root: StateRoot, model_name: str, checkpoint: Checkpoint, weights: Path, lineage: dict[str, Any]
) -> str:
    """Register the checkpoint with an MLflow run of its own. Return the version."""
    tags = VersionTags.from_lineage(lineage)
    run_id = runs.open_import(root, f"{model_name} {lineage['import_key']}", tags.to_tags())

    def fill(bundle: Path) -> str:
        origin = {**lineage, "mlflow_run_id": run_id}
        card = model_card.render_card(model_name, checkpoint.cfg, origin)
        return write_bundle(bundle, checkpoint.cfg, weights, checkpoint.tokenizer, origin, card)

    outcome = {"verdict": VERDICT, "reason": f"imported from {checkpoint.source}"}
    version = add_version(root, model_name, run_id, tags.model_copy(update=outcome), root.imports, fill)
    runs.close_run(root, run_id, "FINISHED", outcome)
    return version


def _build_lineage(checkpoint: Checkpoint, weights: Path) -> dict[str, Any]:
    """Return the contents of lineage.json. Values that only a training could know are None."""
    digest, tokenizer = manifest.sha256_of_file(weights), checkpoint.tokenizer
    return {
        "imported_from": checkpoint.source,
        "files": checkpoint.files,
        "import_key": manifest.sha256_of([digest, tokenizer.sha256, checkpoint.cfg]),
        "weights_sha256": digest,
        "parameters": count_parameters(weights),
        "dropped_ids": checkpoint.dropped_ids,
        "corpus_sha256": None,
        "holdout_bits_per_byte": None,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "config": {"model": checkpoint.cfg},
        "seed": None,
        "ancestors": [],
        **software(),
    }

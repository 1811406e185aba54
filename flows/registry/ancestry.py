"""Ancestry: the version whose weights a training started from, and the ancestors of that version.

A warm-started model has learned from the texts of all its ancestors. So the search for clean blocks looks into all
these texts, and retention keeps the ancestors. lineage.py records everything else that a model was made from.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.loading import load
from flows.registry.tags import VersionTags
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS, LoadedModel
from gptcore.components import RECIPES
from gptcore.errors import CheckpointError, ConfigError
from gptcore.tokens.tokenizer import VOCABULARY, Tokenizer

SCRATCH = "scratch"
Ancestor = Mapping[str, str | None]


@dataclass(frozen=True)
class WarmStart:
    """The version that a training starts from."""

    uri: str
    """models:/NAME/VERSION."""
    bundle: Path
    weights_sha256: str
    ancestors: tuple[Ancestor, ...]
    """The version and its own ancestors, newest first: `uri`, `weights_sha256` and `corpus_sha256` of each."""

    @property
    def weights(self) -> Path:
        """The version's weights, as safetensors."""
        return self.bundle / WEIGHTS

    def load_tokenizer(self) -> Tokenizer:
        """Load the version's tokenizer, which the training keeps."""
        return Tokenizer.load(self.bundle / "tokenizer")


def resolve_start(root: StateRoot, pipeline: Pipeline) -> WarmStart | None:
    """Return the version that `train.start_from` means now.

    None for scratch. Also None for "champion" if the model has no champion yet. Raises UnknownVersion, RegistryError if
    the version is damaged, and ConfigError if its tokenizer or shape differs from what the pipeline asks for.
    """
    start_from = pipeline.train.start_from
    if start_from == SCRATCH:
        return None
    if start_from == versions.CHAMPION:
        version = versions.find_champion(root, pipeline.model_name)
    else:
        version = versions.resolve(root, start_from)
    if version is None:
        return None
    _check_fits(pipeline, versions.uri_of(version), load(root, version))
    return describe_start(root, version)


def load_tokenizer(root: StateRoot, version: ModelVersion) -> Tokenizer:
    """Load the tokenizer of a registered version. Raises RegistryError if its file is missing or was altered."""
    return Tokenizer.load(versions.fetch_file(root, version, f"tokenizer/{VOCABULARY}").parent)


def describe_start(root: StateRoot, version: ModelVersion) -> WarmStart:
    """Return a registered version as the start of a training. Raises RegistryError if its files are missing."""
    bundle = versions.fetch_bundle(root, version.name, str(version.version))
    digest = VersionTags.from_tags(version.tags).weights_sha256 or manifest.sha256_of_file(bundle / WEIGHTS)
    return WarmStart(versions.uri_of(version), bundle, digest, tuple(read_ancestry(root, version)))


def read_ancestry(root: StateRoot, version: ModelVersion) -> list[Ancestor]:
    """Return the version and its ancestors, newest first. Raises RegistryError if its lineage cannot be read."""
    tags = VersionTags.from_tags(version.tags)
    own = {
        "uri": versions.uri_of(version),
        "weights_sha256": tags.weights_sha256,
        "corpus_sha256": tags.corpus_sha256,
    }
    return [own, *versions.read_lineage(root, version).get("ancestors", ())]


def check_training_texts(
    root: StateRoot, ancestry: list[Ancestor], verified: Collection[Path] = ()
) -> Iterator[tuple[Path, str]]:
    """Yield the snapshot that each version of `ancestry` learned from, and the reason why it cannot be read.

    The reason is empty if the snapshot can be read. The files of the snapshots `verified` are not hashed again.
    """
    for ancestor in ancestry:
        sha256 = ancestor["corpus_sha256"] or ""
        path = root.fetch_corpus(sha256)
        try:
            if not sha256:
                raise CheckpointError(f"{ancestor['uri']} names no corpus")
            if not manifest.is_committed(path):
                raise CheckpointError(f"the snapshot {path} of {ancestor['uri']} is gone")
            about = manifest.read_about(path) if path in verified else manifest.verify(path)
            if about["sha256"] != sha256:
                raise CheckpointError(f"{path} does not hold the corpus {sha256}")
        except CheckpointError as error:
            yield path, str(error)
        else:
            yield path, ""


def _check_fits(pipeline: Pipeline, uri: str, loaded: LoadedModel) -> None:
    """Raise ConfigError if a model has another tokenizer or shape than the pipeline asks for."""
    fix = "Ask for the same, or set train.start_from to scratch."
    if loaded.tokenizer.name != pipeline.corpus.tokenizer:
        raise ConfigError(
            f"train.start_from: {uri} has the tokenizer {loaded.tokenizer.name}, corpus.tokenizer is "
            f"{pipeline.corpus.tokenizer}; a warm start keeps its tokenizer. {fix}"
        )
    requested = pipeline.model.build_cfg(loaded.tokenizer.n_vocab)
    for key in dict.fromkeys((*requested, *loaded.cfg)):
        own, theirs = (cfg.get(key, RECIPES["gpt2"].get(key)) for cfg in (requested, loaded.cfg))
        if own != theirs and key not in ("drop_rate", "init"):
            if (recipe := _find_recipe(loaded.cfg)) not in (None, pipeline.model.recipe):
                fix = f"Set model.recipe: {recipe}, or train.start_from: scratch."
            raise ConfigError(f"train.start_from: {uri} has model.{key} {theirs}, here it is {own}. {fix}")


def _find_recipe(cfg: Mapping[str, Any]) -> str | None:
    """Return the recipe that has all components of a model, or None if they are of no recipe."""
    of_model = {key: cfg.get(key, option) for key, option in RECIPES["gpt2"].items() if key != "init"}
    return next((name for name, options in RECIPES.items() if of_model.items() <= options.items()), None)

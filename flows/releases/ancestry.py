"""What a model was made from, beside its text: the version whose weights it started from, and that one's ancestors.

A warm-started model has learned from the texts of all its ancestors, so all of them count where clean blocks are looked
for, and retention keeps them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from flows.pipelines import Pipeline
from flows.releases import registry
from flows.releases.loading import load
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS, Loaded
from gptcore.errors import CheckpointError, ConfigError
from gptcore.recipes import RECIPES
from gptcore.tokenizer import Tokenizer

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
    """It and those before it, newest first: `uri`, `weights_sha256` and `corpus_sha256` of each."""

    @property
    def weights(self) -> Path:
        """Its weights, as safetensors."""
        return self.bundle / WEIGHTS

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which the training keeps."""
        return Tokenizer.load(self.bundle / "tokenizer")


def start_of(root: StateRoot, pipeline: Pipeline) -> WarmStart | None:
    """What `train.start_from` means now; None for scratch, or for the champion where there is none yet.

    Raises UnknownVersion, RegistryError if the version is damaged, and ConfigError if it has another tokenizer or shape
    than the pipeline asks for.
    """
    asked = pipeline.train.start_from
    if asked == SCRATCH:
        return None
    if asked == registry.CHAMPION:
        found = registry.champion_of(root, pipeline.model_name)
    else:
        found = registry.resolve(root, asked)
    if found is None:
        return None
    _check_fits(pipeline, registry.uri_of(found), load(root, found))
    return start(root, found)


def start(root: StateRoot, found: ModelVersion) -> WarmStart:
    """A registered version as a start. Raises RegistryError if its files are gone."""
    bundle = registry.bundle_path(root, found.name, str(found.version))
    digest = found.tags.get("weights_sha256") or manifest.sha256_of_file(bundle / WEIGHTS)
    return WarmStart(registry.uri_of(found), bundle, digest, tuple(line_of(root, found)))


def line_of(root: StateRoot, found: ModelVersion) -> list[Ancestor]:
    """The version and its ancestors, newest first. Raises RegistryError if its lineage cannot be read."""
    own = {"uri": registry.uri_of(found), **{key: found.tags.get(key) for key in ("weights_sha256", "corpus_sha256")}}
    return [own, *registry.lineage_of(root, found.name, str(found.version)).get("ancestors", ())]


def texts_of(root: StateRoot, line: list[Ancestor]) -> Iterator[tuple[Path, str]]:
    """Each snapshot that a line learned from, and why it cannot be looked into; empty where it can."""
    for ancestor in line:
        sha256 = ancestor["corpus_sha256"] or ""
        path = root.corpus(sha256)
        try:
            if not sha256:
                raise CheckpointError(f"{ancestor['uri']} names no corpus")
            if not manifest.is_committed(path):
                raise CheckpointError(f"the snapshot {path} of {ancestor['uri']} is gone")
            if manifest.verify(path)["sha256"] != sha256:
                raise CheckpointError(f"{path} does not hold the corpus {sha256}")
        except CheckpointError as error:
            yield path, str(error)
        else:
            yield path, ""


def _check_fits(pipeline: Pipeline, uri: str, loaded: Loaded) -> None:
    cure = "Ask for the same, or set train.start_from to scratch."
    if loaded.tokenizer.name != pipeline.corpus.tokenizer:
        raise ConfigError(
            f"train.start_from: {uri} has the tokenizer {loaded.tokenizer.name}, corpus.tokenizer is "
            f"{pipeline.corpus.tokenizer}; a warm start keeps its tokenizer. {cure}"
        )
    asked = pipeline.model.for_vocabulary(loaded.tokenizer.n_vocab)
    for key in dict.fromkeys((*asked, *loaded.cfg)):
        here, there = (cfg.get(key, RECIPES["gpt2"].get(key)) for cfg in (asked, loaded.cfg))
        if here != there and key not in ("drop_rate", "init"):
            raise ConfigError(f"train.start_from: {uri} has model.{key} {there}, here it is {here}. {cure}")

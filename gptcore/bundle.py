"""The bundle: a directory with everything that is needed to use a model anywhere.

    model.safetensors   the weights
    config.json         the book's dict, from which GPTModel is built
    tokenizer/          the vocabulary (gptcore.tokens.tokenizer)
    lineage.json        where the model comes from, if a pipeline released it
    manifest.json       size and sha256 of each of these files (gptcore.manifest)
    README.md           the model card, if there is one. It is not in the manifest: people fill in its licence

`load` reads only safetensors and JSON, so no file of a bundle can run code. It refuses a bundle if a file differs from
the manifest. Earlier releases wrote no manifest; such a bundle is loaded unchecked. Registering a bundle is up to
flows/registry.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gptcore import manifest
from gptcore.devices import choose_device
from gptcore.errors import CheckpointError, GPTCoreError
from gptcore.model.gpt import GPTModel
from gptcore.records import read_bytes
from gptcore.tokens.tokenizer import Tokenizer

WEIGHTS, CARD = "model.safetensors", "README.md"
_EMBEDDINGS = ("tok_emb.weight", "pos_emb.weight")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and its tokenizer."""

    model: GPTModel
    tokenizer: Tokenizer
    cfg: dict[str, Any]
    """The book's dict, from which the model was built (see GPTModel)."""

    @property
    def device(self) -> torch.device:
        """The device that the model is on, and that its ids must be on."""
        return self.model.tok_emb.weight.device


def write_bundle(
    directory: Path,
    cfg: Mapping[str, Any],
    weights: Path,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    card: str | None = None,
) -> str:
    """Write the bundle into `directory`, which must exist. Return the sha256 of its manifest.

    `cfg` is the book's dict, `weights` a safetensors file of a GPTModel(cfg), `lineage` an object for JSON, and `card`
    markdown.
    """
    shutil.copyfile(weights, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(dict(cfg), indent=1) + "\n")
    (directory / "lineage.json").write_text(json.dumps(dict(lineage), indent=1) + "\n")
    tokenizer.save(directory / "tokenizer")
    sha256 = manifest.seal(directory, {"kind": "bundle"})
    if card is not None:
        (directory / CARD).write_text(card, encoding="utf-8")
    return sha256


def load(directory: str | Path, device: str = "cpu") -> LoadedModel:
    """Load a bundle: the model in eval mode on `device`, its tokenizer and its cfg. `auto` is the GPU if there is one.

    Raises CheckpointError if a file is missing, damaged, or altered since the bundle was written, TokenizerError if the
    vocabulary of a bundle without a manifest is damaged, and DeviceMissing. Example:

        loaded = load("bundle")
        ids = torch.tensor([loaded.tokenizer.encode("The")])
        logits = loaded.model(ids)  # (1, tokens, vocab_size)
    """
    directory, chosen = Path(directory), choose_device(device)
    try:
        if manifest.is_committed(directory):
            manifest.verify(directory)
        cfg = json.loads(read_bytes(directory / "config.json"))
        _check_shape(cfg, directory / WEIGHTS)
        model = GPTModel(cfg)
        model.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, ValueError, RuntimeError, GPTCoreError, SafetensorError) as error:
        raise CheckpointError(f"the bundle {directory} cannot be loaded: {error}") from None
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise CheckpointError(
            f"the bundle {directory} cannot be loaded: its tokenizer has {tokenizer.n_vocab} ids, its model "
            f"has {cfg['vocab_size']}."
        )
    return LoadedModel(model=model.to(chosen).eval(), tokenizer=tokenizer, cfg=cfg)


def _check_shape(cfg: Any, weights: Path) -> None:
    """Raise ValueError if the weights file does not hold the shapes in `cfg`.

    Without this check, a wrong config.json could ask for a model of any size before the weights are read.
    """
    if not isinstance(cfg, dict):
        raise ValueError(f"config.json holds {type(cfg).__name__}, not an object")
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in _EMBEDDINGS if name in names}
        sizes = {
            "vocab_size": _size_along(0, shapes.get("tok_emb.weight", [])),
            "emb_dim": _size_along(1, shapes.get("tok_emb.weight", [])),
            "n_layers": sum(name.startswith("trf_blocks.") and name.endswith(".W_query.weight") for name in names),
        }
        if cfg.get("positions", "learned") == "learned":  # other positions have no weights
            sizes["context_length"] = _size_along(0, shapes.get("pos_emb.weight", []))
    for key, size in sizes.items():
        if key in cfg and cfg[key] != size:
            raise ValueError(f"{key} is {cfg[key]!r:.40} in config.json and {size} in {WEIGHTS}")


def _size_along(dimension: int, shape: Sequence[int]) -> int:
    return int(shape[dimension]) if len(shape) == 2 else 0


def count_parameters(weights: Path) -> int:
    """Count the numbers in a safetensors file. Reads the file's header only."""
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

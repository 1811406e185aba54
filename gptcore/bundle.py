"""The bundle: a directory that holds a whole model, and from which it is used anywhere.

    model.safetensors   the weights
    config.json         the seed's dict of seven keys
    tokenizer/          the vocabulary (gptcore.tokenizer)
    lineage.json        where the model comes from, if it was released by a pipeline
    README.md           the model card, for people, where there is one

Only safetensors and JSON are read: no file of a bundle can run code.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gptcore.errors import CheckpointError, ConfigError
from gptcore.model import GPTModel
from gptcore.tokenizer import Tokenizer

WEIGHTS, CARD = "model.safetensors", "README.md"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its tokenizer."""

    model: GPTModel
    tokenizer: Tokenizer
    cfg: dict[str, Any]
    """What the model is built from: the seed's dict."""


def write_bundle(
    directory: Path,
    cfg: Mapping[str, Any],
    weights: Path,
    tokenizer: Tokenizer,
    lineage: Mapping[str, Any],
    card: str | None = None,
) -> None:
    """Fills `directory`, which must exist. `weights` is a safetensors file of a GPTModel(cfg), `card` markdown."""
    shutil.copyfile(weights, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(dict(cfg), indent=1) + "\n")
    (directory / "lineage.json").write_text(json.dumps(dict(lineage), indent=1) + "\n")
    tokenizer.save(directory / "tokenizer")
    if card is not None:
        (directory / CARD).write_text(card, encoding="utf-8")


def load(directory: str | Path, device: str = "cpu") -> Loaded:
    """Loads a bundle. Raises CheckpointError if a file is missing or damaged, TokenizerError for the vocabulary."""
    directory = Path(directory)
    try:
        cfg = json.loads((directory / "config.json").read_text())
        _check_shape(cfg, directory / WEIGHTS)
        model = GPTModel(cfg)
        model.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, ValueError, RuntimeError, ConfigError, SafetensorError) as error:
        raise CheckpointError(f"the bundle {directory} cannot be loaded: {error}") from None
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise CheckpointError(
            f"the bundle {directory} cannot be loaded: its tokenizer has {tokenizer.n_vocab} ids, its model "
            f"{cfg['vocab_size']}."
        )
    return Loaded(model=model.to(torch.device(device)).eval(), tokenizer=tokenizer, cfg=cfg)


def _check_shape(cfg: Any, weights: Path) -> None:
    """Raises ValueError if the file does not hold what `cfg` describes: a model is not made larger than its weights."""
    if not isinstance(cfg, dict):
        raise ValueError(f"config.json holds {type(cfg).__name__}, not an object")
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        found = {
            "vocab_size": _rows(file, names, "tok_emb.weight", 0),
            "emb_dim": _rows(file, names, "tok_emb.weight", 1),
            "n_layers": sum(name.startswith("trf_blocks.") and name.endswith(".W_query.weight") for name in names),
        }
        if cfg.get("positions", "learned") == "learned":  # other positions have no weights
            found["context_length"] = _rows(file, names, "pos_emb.weight", 0)
    for key, number in found.items():
        if key in cfg and cfg[key] != number:
            raise ValueError(f"{key} is {cfg[key]!r:.40} in config.json and {number} in {WEIGHTS}")


def _rows(file: Any, names: set[str], name: str, dimension: int) -> int:
    shape = file.get_slice(name).get_shape() if name in names else []
    return int(shape[dimension]) if len(shape) == 2 else 0


def num_parameters(weights: Path) -> int:
    """How many numbers a safetensors file holds. Reads its header only."""
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

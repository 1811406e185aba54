"""GPT-2 checkpoints made elsewhere, read: Hugging Face directories and hub names, single files, the book's `.pth`.

Of a `.pth` or `.bin` nothing but tensors is read (`weights_only`); the rest is safetensors and JSON. So no checkpoint
can run code. Whatever disagrees with something else is an error, never a guess: what one file does not say, another one
does, or the caller.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptcore import manifest
from gptcore.errors import ExchangeError, SourceUnavailable
from gptcore.exchange import huggingface, layout, vocabulary
from gptcore.exchange.huggingface import CONFIG
from gptcore.exchange.layout import Weights
from gptcore.tokenizer import Tokenizer

_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_FROM_HUB = (CONFIG, "*.safetensors", f"model.safetensors{_INDEX}", *vocabulary.FILES)
_PICKLED = (".pth", ".pt", ".bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HEAD_WIDTH = 64
"""Of every GPT-2 (Radford et al. 2019)."""


@dataclass(frozen=True)
class Checkpoint:
    """A model made elsewhere, as one of ours."""

    cfg: dict[str, Any]
    """What GPTModel is built from."""
    weights: dict[str, Tensor]
    """fp32, under our names."""
    tokenizer: Tokenizer
    source: str
    """The absolute path, or the hub's name and commit."""
    files: dict[str, str]
    """sha256 of each file that was read."""
    dropped_ids: int
    """Rows at the end of the embedding that belong to no token: padding, which is left out."""


def read(source: str, n_heads: int | None = None) -> Checkpoint:
    """Reads a directory or a file or, where there is neither, a model of the Hugging Face hub.

    `n_heads` is needed where no config.json says it and the heads are not 64 wide, as GPT-2's are. Raises ExchangeError
    if it is no GPT-2 that a GPTModel can be, or files are damaged or disagree; SourceUnavailable if the hub does not
    answer.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _read(path.absolute(), str(path.absolute()), n_heads)
    is_local = path.suffix in (*_PICKLED, ".safetensors") or (path.parent.is_dir() and len(path.parts) > 1)
    if is_local or not _HUB_NAME.fullmatch(source):
        raise ExchangeError(f"{source} does not exist. Name a directory, a file, or a model of the Hugging Face hub.")
    snapshot = _downloaded(source)
    return _read(snapshot, f"{source}@{snapshot.name}", n_heads)


def _read(path: Path, source: str, n_heads: int | None) -> Checkpoint:
    files = _weight_files(path) if path.is_dir() else [path]
    every_tensor = layout.tidied(_tensors(files))
    home = _home(path, every_tensor)
    cfg = _cfg(path, home, every_tensor, n_heads)
    tensors = _with_its_head(every_tensor, cfg, path)
    layout.check(tensors, cfg, str(path))
    tokenizer = vocabulary.read(home, cfg["vocab_size"])
    dropped = _padding(cfg, tokenizer, path)
    weights = tensors if layout.is_ours(tensors) else layout.from_huggingface(tensors)
    described_by = [home / name for name in (CONFIG, *vocabulary.FILES) if (home / name).is_file()] if home else []
    return Checkpoint(
        cfg={**cfg, "vocab_size": tokenizer.n_vocab},
        weights={name: _without(dropped, name, tensor).float().contiguous() for name, tensor in weights.items()},
        tokenizer=tokenizer,
        source=source,
        files={file.name: manifest.sha256_of_file(file) for file in [*files, *described_by]},
        dropped_ids=dropped,
    )


def _home(path: Path, tensors: Weights) -> Path | None:
    """The directory whose config.json and tokenizer describe the tensors; None where they stand alone."""
    if path.is_dir():
        return path
    return None if layout.is_ours(tensors) or not (path.parent / CONFIG).is_file() else path.parent


def _weight_files(directory: Path) -> list[Path]:
    found = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise ExchangeError(f"{directory} holds no weights: there is none of {', '.join(_WEIGHTS)}.")
    if not found.name.endswith(_INDEX):
        return [found]
    shards = vocabulary.object_in(found).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name != ".." for name in names):
        raise ExchangeError(f"{found} is damaged: its weight_map must name files beside it, found {shards!r:.80}.")
    return [directory / name for name in sorted(names)]


def _tensors(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = _unpickled(file) if file.suffix in _PICKLED else load_file(file)
        except FileNotFoundError:
            raise ExchangeError(f"{file} is missing, though the index beside it names it. Copy it there.") from None
        except SafetensorError as error:
            raise ExchangeError(f"{file} is damaged, or no safetensors: {error}. Copy it again.") from None
        if twice := tensors.keys() & found.keys():
            raise ExchangeError(f"{file} holds {twice.pop()} once more: another file beside it has it already.")
        tensors |= found
    return tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors that `torch.save` wrote: a state dict, or the book's dict of one and an optimiser's."""
    try:
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file, almost any
        raise ExchangeError(
            f"{file} is damaged, or holds more than tensors, which is not loaded: it could run code. Save the weights "
            f"alone, torch.save(model.state_dict(), PATH). PyTorch says: {str(error).partition(chr(10))[0]:.200}"
        ) from None
    body = body.get("model_state_dict", body) if isinstance(body, Mapping) else body
    if not isinstance(body, Mapping) or not all(isinstance(each, Tensor) for each in body.values()):
        raise ExchangeError(f"{file} holds no state dict but {type(body).__name__}: save model.state_dict().")
    return dict(body)


def _cfg(path: Path, home: Path | None, tensors: Weights, n_heads: int | None) -> dict[str, Any]:
    shape = layout.shape_of(tensors, str(path))
    if home is None:
        return _cfg_of_shape(path, tensors, shape, n_heads)
    if not (home / CONFIG).is_file():
        raise ExchangeError(f"{home} has no {CONFIG}, which says how many heads the model has. Copy it there.")
    cfg = huggingface.cfg_of(vocabulary.object_in(home / CONFIG), home / CONFIG)
    told = {**shape, **({"n_heads": n_heads} if n_heads else {})}
    for key, number in told.items():
        if cfg[key] != number:
            who = "--n-heads says" if key == "n_heads" else "the weights have"
            raise ExchangeError(f"{home / CONFIG}: {key} is {cfg[key]!r:.40}, and {who} {number}.")
    return cfg


def _cfg_of_shape(path: Path, tensors: Weights, shape: Mapping[str, int], n_heads: int | None) -> dict[str, Any]:
    """The cfg of tensors without a config.json: what they say by their names and shapes."""
    width = shape["emb_dim"]
    if n_heads is None and width % _HEAD_WIDTH:
        raise ExchangeError(
            f"{path} does not say how many heads the model has, and its width {width} is no multiple of GPT-2's "
            f"{_HEAD_WIDTH}. Give their number: --n-heads."
        )
    has_bias = not layout.is_ours(tensors) or any(name.endswith("att.W_query.bias") for name in tensors)
    cfg = {**shape, "n_heads": n_heads or width // _HEAD_WIDTH, "drop_rate": 0.0, "qkv_bias": has_bias}
    embedding, head = (tensors.get(name) for name in layout.ends(tensors))
    is_tied = head is None or (embedding is not None and torch.equal(head, embedding))
    return {**cfg, "tied": True} if is_tied else cfg


def _with_its_head(tensors: Weights, cfg: Mapping[str, Any], path: Path) -> Weights:
    """Without a head that is the embedding once more."""
    embedding, head = layout.ends(tensors)
    if not cfg.get("tied") or head not in tensors:
        return tensors
    if not torch.equal(tensors[head], tensors[embedding]):
        raise ExchangeError(
            f"{path}: {head} is not {embedding}, though tie_word_embeddings says so (it does unless it is false)."
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _padding(cfg: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> int:
    """How many rows more than the tokenizer's ids the embedding has."""
    if (rows := cfg["vocab_size"] - tokenizer.n_vocab) < 0:
        raise ExchangeError(f"{path}: the tokenizer has {tokenizer.n_vocab} ids, the model {cfg['vocab_size']}.")
    return rows


def _without(rows: int, name: str, tensor: Tensor) -> Tensor:
    return tensor[:-rows] if rows and name in ("tok_emb.weight", "out_head.weight") else tensor


def _downloaded(name: str) -> Path:
    """The hub's files of a model, safetensors and JSON only, in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ExchangeError(
            f"{name} is no path here, and models of the Hugging Face hub need a package more: pip install "
            "huggingface_hub. Or name a directory."
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FROM_HUB)))
    except (OSError, ValueError) as error:
        raise SourceUnavailable(
            f"{name} is no path here, and cannot be had from the Hugging Face hub: {type(error).__name__}: "
            f"{str(error).splitlines()[0]:.200}. Without a network, name a directory that holds its files."
        ) from None

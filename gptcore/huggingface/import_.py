"""Read checkpoints made elsewhere: Hugging Face directories and hub names, single files, the book's `.pth`.

They are GPT-2 models, or exports of ours that other programs may have trained further.

From a `.pth` or `.bin`, PyTorch loads only tensors (`weights_only`); the other files are safetensors and JSON. So a
checkpoint cannot run code. If two sources of a fact disagree, that is an error. A fact that one file does not contain
comes from another file or from the caller, never from a guess.

See gpt2.py and qwen3.py for the weights and config.json, and tokenizer_json.py for the tokenizer.
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
from gptcore.huggingface import export, tokenizer_json, weight_names
from gptcore.huggingface.export import ARCHITECTURES, CONFIG
from gptcore.huggingface.gpt2 import GPT2, normalize
from gptcore.huggingface.weight_names import Architecture, Weights
from gptcore.tokens.tokenizer import Tokenizer

_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_FROM_HUB = (CONFIG, "*.safetensors", f"model.safetensors{_INDEX}", *tokenizer_json.FILES)
_PICKLED = (".pth", ".pt", ".bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HEAD_WIDTH = 64
"""The width of a head in every GPT-2 (Radford et al. 2019)."""


@dataclass(frozen=True)
class Checkpoint:
    """A model made elsewhere, with the names of this project."""

    cfg: dict[str, Any]
    """The dict that builds the GPTModel."""
    weights: dict[str, Tensor]
    """fp32, under the book's names."""
    tokenizer: Tokenizer
    source: str
    """The absolute path, or the name and the commit on the hub."""
    files: dict[str, str]
    """The sha256 of each file that was read, by file name."""
    dropped_ids: int
    """Number of rows at the end of the embedding without a token: padding, which is left out."""


def read_checkpoint(source: str, n_heads: int | None = None) -> Checkpoint:
    """Read a directory or a file, or, if `source` is not a path here, a model of the Hugging Face hub.

    `n_heads` is needed if there is no config.json and the heads are not 64 wide, as GPT-2's are.

    Raises ExchangeError if a GPTModel cannot compute the same as the checkpoint, or if files are damaged or disagree.
    Raises SourceUnavailable if the hub does not answer.

        read_checkpoint("gpt2").tokenizer.name  # "gpt2"
    """
    path = Path(source).expanduser()
    if path.exists():
        return _read(path.absolute(), str(path.absolute()), n_heads)
    is_local = path.suffix in (*_PICKLED, ".safetensors") or (path.parent.is_dir() and len(path.parts) > 1)
    if is_local or not _HUB_NAME.fullmatch(source):
        raise ExchangeError(f"{source} does not exist. Name a directory, a file, or a model of the Hugging Face hub.")
    snapshot = _download(source)
    return _read(snapshot, f"{source}@{snapshot.name}", n_heads)


def _read(path: Path, source: str, n_heads: int | None) -> Checkpoint:
    """Read the checkpoint at a local path. `source` becomes `Checkpoint.source`."""
    files = _find_weight_files(path) if path.is_dir() else [path]
    loaded = _load_tensors(files)
    architecture = _recognise(loaded)
    every_tensor = normalize(loaded) if architecture in (None, GPT2) else loaded
    home = _find_home(path, architecture)
    cfg = _determine_cfg(path, home, every_tensor, architecture, n_heads)
    tensors = _drop_tied_head(every_tensor, cfg, architecture, path)
    weight_names.check(tensors, cfg, architecture, str(path))
    tokenizer = tokenizer_json.read(home, cfg["vocab_size"])
    dropped = _count_padding(cfg, tokenizer, path)
    weights = tensors if architecture is None else architecture.from_huggingface(tensors, str(path))
    descriptions = [home / name for name in (CONFIG, *tokenizer_json.FILES) if (home / name).is_file()] if home else []
    return Checkpoint(
        cfg={**cfg, "vocab_size": tokenizer.n_vocab},
        weights={name: _drop_padding(dropped, name, tensor).float().contiguous() for name, tensor in weights.items()},
        tokenizer=tokenizer,
        source=source,
        files={file.name: manifest.sha256_of_file(file) for file in [*files, *descriptions]},
        dropped_ids=dropped,
    )


def _recognise(tensors: Weights) -> Architecture | None:
    """Return the architecture whose names the tensors have, or None for the book's names."""
    if weight_names.has_book_names(tensors):
        return None
    return next((one for one in ARCHITECTURES if one.embedding in tensors), GPT2)  # a bare GPT2Model has no prefix


def _find_home(path: Path, architecture: Architecture | None) -> Path | None:
    """Return the directory whose config.json and tokenizer describe the tensors, or None if there is none."""
    if path.is_dir():
        return path
    return path.parent if architecture and (path.parent / CONFIG).is_file() else None


def _find_weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights: a single file, or the shards that an index names."""
    weights = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if weights is None:
        raise ExchangeError(f"{directory} holds no weights: it has none of the files {', '.join(_WEIGHTS)}.")
    if not weights.name.endswith(_INDEX):
        return [weights]
    shards = tokenizer_json.read_object(weights).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name != ".." for name in names):
        raise ExchangeError(f"{weights} is damaged: its weight_map must name files beside it, found {shards!r:.80}.")
    return [directory / name for name in sorted(names)]


def _load_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Load the tensors of all files. Raises ExchangeError if a file is damaged, or two files hold the same tensor."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded = _load_pickled(file) if file.suffix in _PICKLED else load_file(file)
        except FileNotFoundError:
            raise ExchangeError(f"{file} is missing, though the index beside it names it. Copy it there.") from None
        except SafetensorError as error:
            raise ExchangeError(f"{file} is damaged, or not a safetensors file: {error}. Copy it again.") from None
        if twice := tensors.keys() & loaded.keys():
            raise ExchangeError(f"{file} holds the tensor {twice.pop()}, which another file beside it holds too.")
        tensors |= loaded
    return tensors


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """Load what `torch.save` wrote: a state dict, or the book's dict of the state dicts of model and optimizer."""
    try:
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        raise ExchangeError(
            f"{file} is damaged, or holds more than tensors, which is not loaded: it could run code. Save the weights "
            f"alone, torch.save(model.state_dict(), PATH). PyTorch says: {str(error).partition(chr(10))[0]:.200}"
        ) from None
    body = body.get("model_state_dict", body) if isinstance(body, Mapping) else body
    if not isinstance(body, Mapping) or not all(isinstance(value, Tensor) for value in body.values()):
        raise ExchangeError(f"{file} holds {type(body).__name__}, not a state dict. Save model.state_dict().")
    return dict(body)


def _determine_cfg(
    path: Path, home: Path | None, tensors: Weights, architecture: Architecture | None, n_heads: int | None
) -> dict[str, Any]:
    """Return the cfg of the checkpoint. Raises ExchangeError if config.json, weights and `n_heads` disagree."""
    shape = weight_names.infer_shape(tensors, architecture, str(path))
    if home is None and architecture in (None, GPT2):
        return _infer_cfg(path, tensors, shape, architecture, n_heads)
    directory = home or path.parent
    if not (directory / CONFIG).is_file():
        raise ExchangeError(f"{directory} has no {CONFIG}, which says how many heads the model has. Copy it there.")
    content = tokenizer_json.read_object(directory / CONFIG)
    cfg = export.parse_config(content, directory / CONFIG, architecture or GPT2)
    expected = {**shape, **({"n_heads": n_heads} if n_heads else {})}
    for key, number in expected.items():
        if cfg[key] != number:
            origin = "--n-heads says" if key == "n_heads" else "the weights have"
            raise ExchangeError(f"{directory / CONFIG}: {key} is {cfg[key]!r:.40}, and {origin} {number}.")
    return cfg


def _infer_cfg(
    path: Path, tensors: Weights, shape: Mapping[str, int], architecture: Architecture | None, n_heads: int | None
) -> dict[str, Any]:
    """Return the cfg of tensors without a config.json, from their names and shapes."""
    width = shape["emb_dim"]
    if n_heads is None and width % _HEAD_WIDTH:
        raise ExchangeError(
            f"{path} does not say how many heads the model has, and its width {width} is not a multiple of GPT-2's "
            f"{_HEAD_WIDTH}. Set the number of heads with --n-heads."
        )
    has_bias = architecture is GPT2 or any(name.endswith("att.W_query.bias") for name in tensors)
    cfg = {**shape, "n_heads": n_heads or width // _HEAD_WIDTH, "drop_rate": 0.0, "qkv_bias": has_bias}
    embedding, head = map(tensors.get, weight_names.embedding_and_head(architecture))  # (vocab_size, emb_dim) each
    is_tied = head is None or (embedding is not None and torch.equal(head, embedding))
    return {**cfg, "tied": True} if is_tied else cfg


def _drop_tied_head(tensors: Weights, cfg: Mapping[str, Any], architecture: Architecture | None, path: Path) -> Weights:
    """Return the tensors without a head that only repeats the embedding."""
    embedding, head = weight_names.embedding_and_head(architecture)
    if not cfg.get("tied") or head not in tensors:
        return tensors
    if not torch.equal(tensors[head], tensors[embedding]):
        raise ExchangeError(f"{path}: {head} differs from {embedding}, although tie_word_embeddings is true.")
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _count_padding(cfg: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> int:
    """Return how many rows the embedding has beyond the tokenizer's ids."""
    if (rows := cfg["vocab_size"] - tokenizer.n_vocab) < 0:
        raise ExchangeError(f"{path}: the tokenizer has {tokenizer.n_vocab} ids, the model {cfg['vocab_size']}.")
    return rows


def _drop_padding(rows: int, name: str, tensor: Tensor) -> Tensor:
    """Return an embedding or head without its last `rows` rows, and any other tensor as it is."""
    return tensor[:-rows] if rows and name in ("tok_emb.weight", "out_head.weight") else tensor


def _download(name: str) -> Path:
    """Download the safetensors and JSON files of a model into the hub's own cache. Return their directory."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ExchangeError(
            f"{name} is not a path here, and the package for models of the Hugging Face hub is not installed: "
            "pip install huggingface_hub, or name a directory."
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FROM_HUB)))
    except (OSError, ValueError) as error:
        raise SourceUnavailable(
            f"{name} is not a path here, and cannot be downloaded from the Hugging Face hub: {type(error).__name__}: "
            f"{str(error).splitlines()[0]:.200}. Without a network, name a directory that holds its files."
        ) from None

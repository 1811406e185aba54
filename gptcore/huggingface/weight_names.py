"""Convert weights between the book's names, which this project uses, and the names of Hugging Face's GPT-2.

Hugging Face stores the weights of the blocks transposed (`Conv1D`). It joins queries, keys and values in one matrix,
and gives every linear layer of a block a bias. So export writes a bias that the model here does not have as zeros.

See export.py and import_.py for the files.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gptcore.errors import ConfigError, ExchangeError
from gptcore.model.gpt import GPTModel

Weights = Mapping[str, Tensor]

_OUTER = {"tok_emb.weight": "wte.weight", "pos_emb.weight": "wpe.weight"}
_FINAL = {"final_norm.scale": "ln_f.weight", "final_norm.shift": "ln_f.bias"}
_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LINEARS = {"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
_PROJECTIONS = ("att.W_query", "att.W_key", "att.W_value")
_HEAD, _HUGGINGFACE_HEAD = "out_head.weight", "lm_head.weight"
_PREFIX = "transformer."
_MASKS = (".attn.bias", ".attn.masked_bias", ".att.mask")
"""The ends of the names of buffers that older releases, and the book, store beside the weights."""


def to_huggingface(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of a GPT2LMHeadModel, from the weights of a GPTModel of the recipe gpt2."""
    tensors = {_PREFIX + theirs: weights[ours] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(count_layers(weights)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_PREFIX}h.{layer}."
        for norm, name in _NORMS.items():
            tensors[f"{theirs}{name}.weight"] = weights[f"{ours}{norm}.scale"]
            tensors[f"{theirs}{name}.bias"] = weights[f"{ours}{norm}.shift"]
        for linear, name in _LINEARS.items():
            tensors |= _to_conv1d(weights, [ours + linear], theirs + name)
        tensors |= _to_conv1d(weights, [ours + projection for projection in _PROJECTIONS], f"{theirs}attn.c_attn")
    if _HEAD in weights:
        tensors[_HUGGINGFACE_HEAD] = weights[_HEAD]
    return tensors


def from_huggingface(tensors: Weights) -> dict[str, Tensor]:
    """Return the weights of a GPTModel, from the tensors of a GPT2LMHeadModel.

    This is the inverse of `to_huggingface`, except that all biases are kept.
    """
    weights = {ours: tensors[_PREFIX + theirs] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(count_layers(tensors)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_PREFIX}h.{layer}."
        for norm, name in _NORMS.items():
            weights[f"{ours}{norm}.scale"] = tensors[f"{theirs}{name}.weight"]
            weights[f"{ours}{norm}.shift"] = tensors[f"{theirs}{name}.bias"]
        for linear, name in _LINEARS.items():
            weights |= _to_linears(tensors, theirs + name, [ours + linear])
        weights |= _to_linears(tensors, f"{theirs}attn.c_attn", [ours + projection for projection in _PROJECTIONS])
    if _HUGGINGFACE_HEAD in tensors:
        weights[_HEAD] = tensors[_HUGGINGFACE_HEAD]
    return weights


def has_book_names(names: Mapping[str, Any]) -> bool:
    """Whether these are the book's names, and not Hugging Face's."""
    return "tok_emb.weight" in names


def embedding_and_head(names: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the embedding and the head."""
    if has_book_names(names):
        return "tok_emb.weight", _HEAD
    return _PREFIX + _OUTER["tok_emb.weight"], _HUGGINGFACE_HEAD


def normalize(tensors: Weights) -> dict[str, Tensor]:
    """Return the tensors without masks, under the names of the whole model. A bare GPT2Model omits their prefix."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MASKS)}
    if has_book_names(kept):
        return kept
    whole = (_PREFIX, _HUGGINGFACE_HEAD)
    return {name if name.startswith(whole) else _PREFIX + name: tensor for name, tensor in kept.items()}


def infer_shape(tensors: Weights, origin: str) -> dict[str, int]:
    """Return vocab_size, context_length, emb_dim and n_layers of tensors that `normalize` returned.

    `origin` names the checkpoint in messages. Raises ExchangeError if there are no embeddings of tokens and positions.
    """
    names = tuple(_OUTER) if has_book_names(tensors) else tuple(_PREFIX + theirs for theirs in _OUTER.values())
    for name in names:
        if name not in tensors or tensors[name].ndim != 2:
            state = "absent" if name not in tensors else f"of shape {tuple(tensors[name].shape)}"
            raise ExchangeError(
                f"{origin} is not a GPT-2: {name} is {state} (expected a matrix). Its {len(tensors)} tensors begin "
                f"with {', '.join(sorted(tensors)[:3]) or 'none'}."
            )
    tokens, positions = (tensors[name].shape for name in names)  # (vocab_size, emb_dim), (context_length, emb_dim)
    shape = {"vocab_size": tokens[0], "context_length": positions[0], "emb_dim": tokens[1]}
    return {**shape, "n_layers": count_layers(tensors)}


def count_layers(tensors: Weights) -> int:
    """Return the number of transformer blocks that the names mention."""
    prefix = "trf_blocks." if has_book_names(tensors) else f"{_PREFIX}h."
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)


def check(tensors: Weights, cfg: Mapping[str, Any], origin: str) -> None:
    """Raise ExchangeError if names or shapes differ from a model of `cfg`, or a weight is not a finite float.

    `origin` names the checkpoint in the message, which lists what differs.
    """
    try:
        with torch.device("meta"):
            model = GPTModel(cfg).state_dict()
    except ConfigError as error:
        raise ExchangeError(f"{origin}: {error}") from None
    expected = model if has_book_names(tensors) else to_huggingface(model)
    problems = list(_find_differences(tensors, expected))
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExchangeError(f"{origin} is not a GPT-2 of this shape: {'; '.join(problems[:3])}{more}.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            kind = "numbers that are not finite" if tensor.is_floating_point() else f"{tensor.dtype} numbers"
            raise ExchangeError(f"{origin}: {name} holds {kind}. Weights must be finite and of a floating-point type.")


def _find_differences(tensors: Weights, expected: Weights) -> Iterator[str]:
    """Yield a description of each tensor that is missing, unexpected or of another shape."""
    for name in sorted({*tensors, *expected}):
        shape = tuple(tensors[name].shape) if name in tensors else None
        expected_shape = tuple(expected[name].shape) if name in expected else None
        if expected_shape is None:
            yield f"the tensor {name} is unexpected"
        elif shape is None:
            yield f"the tensor {name} is missing"
        elif shape != expected_shape:
            yield f"{name} has the shape {shape}, and should have {expected_shape}"


def _to_conv1d(weights: Weights, ours: list[str], theirs: str) -> dict[str, Tensor]:
    """Join linear layers side by side into one `Conv1D` of Hugging Face. Missing biases become zeros."""
    matrices = [weights[f"{name}.weight"] for name in ours]  # (out_features, in_features) each
    matrix = torch.cat(matrices).T.contiguous()  # (in_features, layers * out_features)
    zeros = matrix.new_zeros(matrix.shape[1] // len(ours))  # (out_features,)
    biases = [weights.get(f"{name}.bias", zeros) for name in ours]  # (out_features,) each
    return {f"{theirs}.weight": matrix, f"{theirs}.bias": torch.cat(biases)}


def _to_linears(tensors: Weights, theirs: str, ours: list[str]) -> dict[str, Tensor]:
    """Cut a `Conv1D` of Hugging Face into linear layers: the inverse of `_to_conv1d`."""
    matrices = tensors[f"{theirs}.weight"].T.chunk(len(ours))  # (out_features, in_features) each
    biases = tensors[f"{theirs}.bias"].chunk(len(ours))  # (out_features,) each
    linears = {}
    for name, matrix, bias in zip(ours, matrices, biases):
        linears[f"{name}.weight"] = matrix.contiguous()
        linears[f"{name}.bias"] = bias.contiguous()
    return linears

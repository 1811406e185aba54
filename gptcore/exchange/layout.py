"""The same weights under other names: ours, which are the book's, and those of Hugging Face's GPT-2.

There, weights of the blocks stand transposed (`Conv1D`), queries, keys and values in one matrix, and every linear layer
of a block has a bias. So a bias that ours lacks is written as zeros.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gptcore.errors import ConfigError, ExchangeError
from gptcore.model import GPTModel

Weights = Mapping[str, Tensor]

_OUTER = {"tok_emb.weight": "wte.weight", "pos_emb.weight": "wpe.weight"}
_FINAL = {"final_norm.scale": "ln_f.weight", "final_norm.shift": "ln_f.bias"}
_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LINEARS = {"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
_PROJECTIONS = ("att.W_query", "att.W_key", "att.W_value")
_HEAD, _THEIR_HEAD = "out_head.weight", "lm_head.weight"
_PREFIX = "transformer."
_MASKS = (".attn.bias", ".attn.masked_bias", ".att.mask")
"""Buffers that older releases, and the book, store beside the weights."""


def to_huggingface(weights: Weights) -> dict[str, Tensor]:
    """The tensors of a GPT2LMHeadModel with the weights of a GPTModel of the recipe gpt2."""
    tensors = {_PREFIX + theirs: weights[ours] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(count_layers(weights)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_PREFIX}h.{layer}."
        for norm, name in _NORMS.items():
            tensors[f"{theirs}{name}.weight"] = weights[f"{ours}{norm}.scale"]
            tensors[f"{theirs}{name}.bias"] = weights[f"{ours}{norm}.shift"]
        for linear, name in _LINEARS.items():
            tensors |= _conv1d(weights, [ours + linear], theirs + name)
        tensors |= _conv1d(weights, [ours + projection for projection in _PROJECTIONS], f"{theirs}attn.c_attn")
    if _HEAD in weights:
        tensors[_THEIR_HEAD] = weights[_HEAD]
    return tensors


def from_huggingface(tensors: Weights) -> dict[str, Tensor]:
    """The weights of a GPTModel with those of a GPT2LMHeadModel: the inverse of `to_huggingface`, biases all there."""
    weights = {ours: tensors[_PREFIX + theirs] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(count_layers(tensors)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_PREFIX}h.{layer}."
        for norm, name in _NORMS.items():
            weights[f"{ours}{norm}.scale"] = tensors[f"{theirs}{name}.weight"]
            weights[f"{ours}{norm}.shift"] = tensors[f"{theirs}{name}.bias"]
        for linear, name in _LINEARS.items():
            weights |= _linears(tensors, theirs + name, [ours + linear])
        weights |= _linears(tensors, f"{theirs}attn.c_attn", [ours + projection for projection in _PROJECTIONS])
    if _THEIR_HEAD in tensors:
        weights[_HEAD] = tensors[_THEIR_HEAD]
    return weights


def is_ours(names: Mapping[str, Any]) -> bool:
    """Whether these are the book's names."""
    return "tok_emb.weight" in names


def ends(names: Mapping[str, Any]) -> tuple[str, str]:
    """The names of embedding and head."""
    return ("tok_emb.weight", _HEAD) if is_ours(names) else (_PREFIX + _OUTER["tok_emb.weight"], _THEIR_HEAD)


def tidied(tensors: Weights) -> dict[str, Tensor]:
    """Without masks, under the names of the whole model: files of a bare GPT2Model lack the prefix."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MASKS)}
    if is_ours(kept):
        return kept
    return {
        name if name.startswith((_PREFIX, _THEIR_HEAD)) else _PREFIX + name: tensor for name, tensor in kept.items()
    }


def shape_of(tensors: Weights, where: str) -> dict[str, int]:
    """vocab_size, context_length, emb_dim and n_layers of tidied tensors. Raises ExchangeError if there are none."""
    names = tuple(_OUTER) if is_ours(tensors) else tuple(_PREFIX + theirs for theirs in _OUTER.values())
    for name in names:
        if name not in tensors or tensors[name].ndim != 2:
            found = "absent" if name not in tensors else f"of shape {tuple(tensors[name].shape)}"
            raise ExchangeError(
                f"{where} holds no GPT-2: {name} is {found}, and should be a matrix. Its {len(tensors)} tensors begin "
                f"with {', '.join(sorted(tensors)[:3]) or 'none'}."
            )
    tokens, positions = (tensors[name].shape for name in names)
    shape = {"vocab_size": tokens[0], "context_length": positions[0], "emb_dim": tokens[1]}
    return {**shape, "n_layers": count_layers(tensors)}


def count_layers(tensors: Weights) -> int:
    """Blocks that these names speak of."""
    beginning = "trf_blocks." if is_ours(tensors) else f"{_PREFIX}h."
    numbers = {name.removeprefix(beginning).partition(".")[0] for name in tensors if name.startswith(beginning)}
    return len(numbers)


def check(tensors: Weights, cfg: Mapping[str, Any], where: str) -> None:
    """Raises ExchangeError unless names and shapes are those of a model of `cfg`, naming what differs."""
    try:
        with torch.device("meta"):
            model = GPTModel(cfg).state_dict()
    except ConfigError as error:
        raise ExchangeError(f"{where}: {error}") from None
    expected = model if is_ours(tensors) else to_huggingface(model)
    problems = list(_differences(tensors, expected))
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExchangeError(f"{where} is no GPT-2 of this shape: {'; '.join(problems[:3])}{more}.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            kind = "numbers that are not finite" if tensor.is_floating_point() else f"{tensor.dtype} numbers"
            raise ExchangeError(f"{where}: {name} holds {kind}. Weights are finite and of a floating-point type.")


def _differences(tensors: Weights, expected: Weights) -> Iterator[str]:
    for name in sorted({*tensors, *expected}):
        there = tuple(tensors[name].shape) if name in tensors else None
        wanted = tuple(expected[name].shape) if name in expected else None
        if wanted is None:
            yield f"the tensor {name} is unexpected"
        elif there is None:
            yield f"the tensor {name} is missing"
        elif there != wanted:
            yield f"{name} has the shape {there}, and should have {wanted}"


def _conv1d(weights: Weights, ours: list[str], theirs: str) -> dict[str, Tensor]:
    """Linear layers side by side, as one of theirs."""
    matrix = torch.cat([weights[f"{name}.weight"] for name in ours]).T.contiguous()
    biases = [weights.get(f"{name}.bias", matrix.new_zeros(matrix.shape[1] // len(ours))) for name in ours]
    return {f"{theirs}.weight": matrix, f"{theirs}.bias": torch.cat(biases)}


def _linears(tensors: Weights, theirs: str, ours: list[str]) -> dict[str, Tensor]:
    """One of their layers, cut into linear layers."""
    matrices = tensors[f"{theirs}.weight"].T.chunk(len(ours))
    biases = tensors[f"{theirs}.bias"].chunk(len(ours))
    return {
        f"{name}.{kind}": part.contiguous()
        for name, *parts in zip(ours, matrices, biases)
        for kind, part in zip(("weight", "bias"), parts)
    }

"""The recipe `gpt2` as Hugging Face's GPT-2: the names of its weights, and its config.json in both directions.

Hugging Face stores the weights of the blocks transposed (`Conv1D`). It joins queries, keys and values in one matrix,
and gives every linear layer of a block a bias. So export writes a bias that the model here does not have as zeros.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptcore.components import RECIPES
from gptcore.huggingface.weight_names import (
    Architecture,
    Weights,
    check_values,
    count_layers,
    has_book_names,
    read_counts,
)
from gptcore.model.gpt import read_components

EPSILON = 1e-5
"""The epsilon of the layer norms, here and in GPT-2."""
_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""The keys of the book's dict that are counts, with their names in config.json."""
_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
"""GPT-2's values of the keys that config.json may leave out."""
_PREFIX = "transformer."
_LAYERS = f"{_PREFIX}h."
_OUTER = {"tok_emb.weight": "wte.weight", "pos_emb.weight": "wpe.weight"}
_FINAL = {"final_norm.scale": "ln_f.weight", "final_norm.shift": "ln_f.bias"}
_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LINEARS = {"att.out_proj": "attn.c_proj", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}
_PROJECTIONS = ("att.W_query", "att.W_key", "att.W_value")
_HEAD, _HUGGINGFACE_HEAD = "out_head.weight", "lm_head.weight"


_MASKS = (".attn.bias", ".attn.masked_bias", ".att.mask")
"""The ends of the names of buffers that older releases, and the book, store beside the weights."""


def to_huggingface(weights: Weights, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a GPT2LMHeadModel, from the weights of a GPTModel(cfg) of the recipe gpt2."""
    tensors = {_PREFIX + theirs: weights[ours] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(cfg["n_layers"]):
        ours, theirs = f"trf_blocks.{layer}.", f"{_LAYERS}{layer}."
        for norm, name in _NORMS.items():
            tensors[f"{theirs}{name}.weight"] = weights[f"{ours}{norm}.scale"]
            tensors[f"{theirs}{name}.bias"] = weights[f"{ours}{norm}.shift"]
        for linear, name in _LINEARS.items():
            tensors |= _to_conv1d(weights, [ours + linear], theirs + name)
        tensors |= _to_conv1d(weights, [ours + projection for projection in _PROJECTIONS], f"{theirs}attn.c_attn")
    if _HEAD in weights:
        tensors[_HUGGINGFACE_HEAD] = weights[_HEAD]
    return tensors


def from_huggingface(tensors: Weights, _origin: str) -> dict[str, Tensor]:
    """Return the weights of a GPTModel, from the tensors of a GPT2LMHeadModel.

    This is the inverse of `to_huggingface`, except that all biases are kept.
    """
    weights = {ours: tensors[_PREFIX + theirs] for ours, theirs in {**_OUTER, **_FINAL}.items()}
    for layer in range(count_layers(tensors, _LAYERS)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_LAYERS}{layer}."
        for norm, name in _NORMS.items():
            weights[f"{ours}{norm}.scale"] = tensors[f"{theirs}{name}.weight"]
            weights[f"{ours}{norm}.shift"] = tensors[f"{theirs}{name}.bias"]
        for linear, name in _LINEARS.items():
            weights |= _to_linears(tensors, theirs + name, [ours + linear])
        weights |= _to_linears(tensors, f"{theirs}attn.c_attn", [ours + projection for projection in _PROJECTIONS])
    if _HUGGINGFACE_HEAD in tensors:
        weights[_HEAD] = tensors[_HUGGINGFACE_HEAD]
    return weights


def normalize(tensors: Weights) -> dict[str, Tensor]:
    """Return the tensors without masks, under the names of the whole model. A bare GPT2Model omits their prefix."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MASKS)}
    if has_book_names(kept):
        return kept
    whole = (_PREFIX, _HUGGINGFACE_HEAD)
    return {name if name.startswith(whole) else _PREFIX + name: tensor for name, tensor in kept.items()}


def make_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json, without the ids of the end-of-text token."""
    return {
        **{theirs: cfg[ours] for ours, theirs in _KEYS.items()},
        "n_ctx": cfg["context_length"],  # other programs read this older name of n_positions
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": read_components(cfg)["tied"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg["drop_rate"]),
    }


def parse_config(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the book's dict for the content of a config.json. Raises ExchangeError if a GPTModel computes another."""
    required = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    given = {key: config.get(key, values[0]) for key, values in required.items()}
    counts = read_counts({**_DEFAULTS, **config}, _KEYS, origin)
    check_values(given, required, origin)
    check_values({"n_inner": config.get("n_inner")}, {"n_inner": (None, 4 * counts["emb_dim"])}, origin)
    cfg = {**counts, "drop_rate": config.get("resid_pdrop", 0.1), "qkv_bias": True}
    return {**cfg, "tied": True} if config.get("tie_word_embeddings", True) else cfg


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


GPT2 = Architecture(
    name="GPT-2",
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    # GPT-2 expresses the other components with any value: missing biases become zeros, a tied head is a key in
    # config.json, and `init` does not change what a trained model computes.
    components={key: RECIPES["gpt2"][key] for key in ("positions", "norm", "activation", "qk_norm", "emb_norm")},
    embedding=f"{_PREFIX}wte.weight",
    positions=f"{_PREFIX}wpe.weight",
    head=_HUGGINGFACE_HEAD,
    layers=_LAYERS,
    to_huggingface=to_huggingface,
    from_huggingface=from_huggingface,
    make_config=make_config,
    parse_config=parse_config,
)

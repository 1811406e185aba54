"""The book's `load_weights_into_gpt` (chapter 5): GPT-2's weights as OpenAI published them, in a GPTModel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gptcore.errors import ConfigError
from gptcore.model.gpt import GPTModel

_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LINEARS = {"att.out_proj": ("attn", "c_proj"), "ff.layers.0": ("mlp", "c_fc"), "ff.layers.2": ("mlp", "c_proj")}
_PROJECTIONS = ("att.W_query", "att.W_key", "att.W_value")


def load_weights_into_gpt(gpt: GPTModel, params: Mapping[str, Any]) -> None:
    """Load the arrays of `params` into `gpt`. As in the book, the head gets the values of the embedding.

    `params` has the form of the book's `load_gpt2_params_from_tf_ckpt`: `wte` and `wpe`, the norm's `g` and `b`, and
    `blocks`, a list. `gpt` must have biases in its queries, keys and values. Raises ConfigError, with the parameter and
    both shapes, if an array does not fit.
    """
    arrays = {"tok_emb.weight": params["wte"], "pos_emb.weight": params["wpe"], "out_head.weight": params["wte"]}
    arrays |= {"final_norm.scale": params["g"], "final_norm.shift": params["b"]}
    for number, block in enumerate(params["blocks"]):
        ours = f"trf_blocks.{number}."
        fused = block["attn"]["c_attn"]
        for key, name in (("w", "weight"), ("b", "bias")):
            thirds = np.split(fused[key], 3, axis=-1)  # (emb_dim, emb_dim) or (emb_dim,) each
            arrays |= {f"{ours}{linear}.{name}": third.T for linear, third in zip(_PROJECTIONS, thirds)}
            for linear, (part, layer) in _LINEARS.items():
                arrays[f"{ours}{linear}.{name}"] = block[part][layer][key].T
        for norm, name in _NORMS.items():
            arrays |= {f"{ours}{norm}.scale": block[name]["g"], f"{ours}{norm}.shift": block[name]["b"]}
    parameters = dict(gpt.named_parameters(remove_duplicate=False))
    for name in sorted({*arrays, *parameters}):
        expected = tuple(parameters[name].shape) if name in parameters else None
        found = np.shape(arrays[name]) if name in arrays else None
        if expected != found:
            raise ConfigError(
                f"{name} is {found or 'absent'} in params and {expected or 'absent'} in the model. Build the model "
                "with the cfg of these weights, and with qkv_bias True."
            )
    with torch.no_grad():
        for name, array in arrays.items():
            parameters[name].copy_(torch.as_tensor(array))

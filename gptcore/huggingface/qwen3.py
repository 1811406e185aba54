"""The recipe `modern` as Hugging Face's Qwen3: the names of its weights, and its config.json in both directions.

A Qwen3 computes the same as a model here if some of its parts have certain values:

    mlp.gate_proj = mlp.up_proj    with ReLU, their product is the square of ReLU: relu(z) z = relu(z)^2
    gains of q_norm and k_norm     the constant scale of normed queries and keys
    all other gains                1, because the RMS norms here learn nothing
    embed_tokens                   rows that are normed beforehand, if the model here norms its embeddings
    biases of o_proj               0, if queries, keys and values have biases

While a fine-tuning leaves the gains alone, gate and up stay equal too: their gradients are the same, bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptcore.components import RECIPES
from gptcore.errors import ExchangeError
from gptcore.huggingface.weight_names import Architecture, Weights, check_values, count_layers, read_counts
from gptcore.model.attention import QK_SCALE, ROTARY_BASE
from gptcore.model.gpt import RMSNorm, read_components

EPSILON = torch.finfo(torch.float32).eps
"""The epsilon of the RMS norms here, PyTorch's default."""
_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
}
"""The keys of the book's dict that are counts, with their names in config.json."""
_EMBEDDING, _HEAD, _LAYERS = "model.embed_tokens.weight", "lm_head.weight", "model.layers."
_PROJECTIONS = {"att.W_query": "self_attn.q_proj", "att.W_key": "self_attn.k_proj", "att.W_value": "self_attn.v_proj"}
_LINEARS = {"att.out_proj": "self_attn.o_proj", "ff.layers.0": "mlp.gate_proj", "ff.layers.2": "mlp.down_proj"}
_GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QK_GAINS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_COMPONENTS = {key: RECIPES["modern"][key] for key in ("positions", "norm", "activation", "qk_norm", "bias")}
_FREEZE = 'train only parameters without "norm" in their names, and save them in float32'


def to_huggingface(weights: Weights, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a Qwen3ForCausalLM, from the weights of a GPTModel(cfg) with `QWEN3.components`."""
    embedding = weights["tok_emb.weight"]  # (vocab_size, emb_dim)
    width = cfg["emb_dim"]
    tensors = {
        _EMBEDDING: RMSNorm()(embedding) if read_components(cfg)["emb_norm"] else embedding,
        "model.norm.weight": embedding.new_ones(width),
    }
    if not _is_tied(cfg):
        tensors[_HEAD] = weights.get("out_head.weight", embedding)
    for layer in range(cfg["n_layers"]):
        ours, theirs = f"trf_blocks.{layer}.", f"{_LAYERS}{layer}."
        for linear, name in {**_PROJECTIONS, **_LINEARS}.items():
            tensors[f"{theirs}{name}.weight"] = weights[f"{ours}{linear}.weight"]
        tensors[f"{theirs}mlp.up_proj.weight"] = weights[f"{ours}ff.layers.0.weight"].clone()
        tensors |= {theirs + name: embedding.new_ones(width) for name in _GAINS}
        tensors |= {theirs + name: embedding.new_full((width // cfg["n_heads"],), QK_SCALE) for name in _QK_GAINS}
        if cfg["qkv_bias"]:
            tensors |= {
                f"{theirs}{name}.bias": weights[f"{ours}{linear}.bias"] for linear, name in _PROJECTIONS.items()
            }
            tensors[f"{theirs}self_attn.o_proj.bias"] = embedding.new_zeros(width)
    return tensors


def from_huggingface(tensors: Weights, origin: str) -> dict[str, Tensor]:
    """Return the weights of a GPTModel, from the tensors of a Qwen3ForCausalLM.

    This is the inverse of `to_huggingface`, except that normed embeddings stay as they are. `origin` names the
    checkpoint in messages. Raises ExchangeError, with the tensor, if a GPTModel cannot compute the same.
    """
    _check_constant(tensors, "model.norm.weight", 1.0, origin)
    weights = {"tok_emb.weight": tensors[_EMBEDDING]}
    if _HEAD in tensors:
        weights["out_head.weight"] = tensors[_HEAD]
    for layer in range(count_layers(tensors, _LAYERS)):
        ours, theirs = f"trf_blocks.{layer}.", f"{_LAYERS}{layer}."
        for linear, name in {**_PROJECTIONS, **_LINEARS}.items():
            weights[f"{ours}{linear}.weight"] = tensors[f"{theirs}{name}.weight"]
        for linear, name in _PROJECTIONS.items():
            if (bias := tensors.get(f"{theirs}{name}.bias")) is not None:
                weights[f"{ours}{linear}.bias"] = bias
        _check_equal(tensors, f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight", origin)
        for name in _GAINS:
            _check_constant(tensors, theirs + name, 1.0, origin)
        for name in _QK_GAINS:
            _check_constant(tensors, theirs + name, QK_SCALE, origin)
        if f"{theirs}self_attn.o_proj.bias" in tensors:
            _check_constant(tensors, f"{theirs}self_attn.o_proj.bias", 0.0, origin)
    return weights


def make_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json, without the ids of the end-of-text token."""
    return {
        **{theirs: cfg[ours] for ours, theirs in _KEYS.items()},
        "num_key_value_heads": cfg["n_heads"],
        "head_dim": cfg["emb_dim"] // cfg["n_heads"],
        "intermediate_size": 4 * cfg["emb_dim"],
        "hidden_act": "relu",
        "rms_norm_eps": EPSILON,
        "rope_theta": ROTARY_BASE,  # releases of transformers before 5 read this, later ones rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "attention_bias": cfg["qkv_bias"],
        "attention_dropout": cfg["drop_rate"],
        "use_sliding_window": False,
        "tie_word_embeddings": _is_tied(cfg),
    }


def parse_config(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the book's dict for the content of a config.json. Raises ExchangeError if a GPTModel computes another."""
    counts = read_counts(config, _KEYS, origin)
    rope = {"rope_theta": config.get("rope_theta", ROTARY_BASE), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    given = {
        "hidden_act": config.get("hidden_act", "silu"),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "num_key_value_heads": config.get("num_key_value_heads", 32),
        "head_dim": config.get("head_dim", 128),
        "intermediate_size": config.get("intermediate_size", 22016),
        "use_sliding_window": config.get("use_sliding_window", False),
        "rope_theta": rope["rope_theta"],
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    required = {
        "hidden_act": ("relu",),
        "rms_norm_eps": (EPSILON,),
        "num_key_value_heads": (counts["n_heads"],),
        "head_dim": (counts["emb_dim"] // counts["n_heads"],),
        "intermediate_size": (4 * counts["emb_dim"],),
        "use_sliding_window": (False,),
        "rope_theta": (ROTARY_BASE,),
        "rope_type": ("default",),
    }
    check_values(given, required, origin)
    cfg = {
        **counts,
        "drop_rate": config.get("attention_dropout", 0.0),
        "qkv_bias": config.get("attention_bias", False),
        **_COMPONENTS,
    }
    return {**cfg, "tied": True} if config.get("tie_word_embeddings", False) else cfg


def _is_tied(cfg: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one matrix in a Qwen3. Normed embeddings differ from a tied head."""
    components = read_components(cfg)
    return components["tied"] and not components["emb_norm"]


def _check_constant(tensors: Weights, name: str, value: float, origin: str) -> None:
    """Raise ExchangeError unless every number of the tensor is `value`."""
    tensor = tensors[name]
    different = (tensor.float() != torch.tensor(value)).nonzero()
    if len(different):
        found = tensor[tuple(different[0])].item()
        raise ExchangeError(
            f"{origin}: {name} holds {found:g}, and a model here always has {value:g}. In a fine-tuning, {_FREEZE}."
        )


def _check_equal(tensors: Weights, first: str, second: str, origin: str) -> None:
    """Raise ExchangeError unless the two tensors are equal."""
    if not torch.equal(tensors[first], tensors[second]):
        raise ExchangeError(
            f"{origin}: {second} differs from {first}, and a model here has one matrix for both. In a fine-tuning, "
            f"{_FREEZE}."
        )


QWEN3 = Architecture(
    name="Qwen3",
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    # A Qwen3 expresses the other components with any value: embeddings may be normed beforehand.
    components=_COMPONENTS,
    embedding=_EMBEDDING,
    positions=None,
    head=_HEAD,
    layers=_LAYERS,
    to_huggingface=to_huggingface,
    from_huggingface=from_huggingface,
    make_config=make_config,
    parse_config=parse_config,
)

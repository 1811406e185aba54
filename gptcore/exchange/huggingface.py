"""A model as a directory that Hugging Face's `transformers` loads.

    config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json  README.md

`AutoModelForCausalLM` gives the logits that the model gives here and `AutoTokenizer` the ids, up to a lone surrogate,
which no tokenizer there takes. `transformers` itself is not needed. The way back stands in checkpoints.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gptcore import manifest
from gptcore.bundle import CARD
from gptcore.errors import ConfigError, ExchangeError
from gptcore.exchange import layout, vocabulary
from gptcore.exchange.layout import Weights
from gptcore.model import chosen
from gptcore.recipes import RECIPES
from gptcore.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EPSILON = 1e-5
"""Of the layer norms, here and in GPT-2."""
_COUNTS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
"""What a config.json may leave out."""
# No part of what is computed, or expressible: a missing bias as zeros, one matrix for embedding and head as such.
_FREE_PARTS = {"init", "tied", "bias"}


def export(
    cfg: Mapping[str, Any], weights: Weights, tokenizer: Tokenizer, directory: Path, card: str | None = None
) -> None:
    """Writes a GPTModel(cfg) with these weights, and its tokenizer, into `directory`, which must be new or empty.

    `card` is the model card, markdown that becomes README.md.

    It is whole or not there. Raises ExchangeError, and writes nothing, for a part that GPT-2 does not have, for weights
    of another shape and for a tokenizer that would not give the same ids; DiskFull.
    """
    _check_parts(cfg)
    layout.check(weights, cfg, "the state dict")
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise ExchangeError(f"the tokenizer has {tokenizer.n_vocab} ids, the model {cfg['vocab_size']}.")
    words = vocabulary.expressed(tokenizer)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExchangeError(f"{directory} is not empty: nothing is written over. Name another directory.")
    with manifest.staging(directory.absolute().parent) as staged:
        tensors = {name: tensor.float().contiguous() for name, tensor in layout.to_huggingface(weights).items()}
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        for name, body in ((CONFIG, {**_config(cfg), **ends}), ("generation_config.json", ends)):
            (staged / name).write_text(json.dumps(body, indent=1) + "\n")
        vocabulary.write(words, staged, cfg["context_length"])
        if card is not None:
            (staged / CARD).write_text(card, encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            manifest.flush(path)
        staged.chmod(0o755)
        staged.rename(directory)
        manifest.flush(directory.absolute().parent)


def cfg_of(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The seed's dict of a config.json, and `tied` where head and embedding are one.

    Raises ExchangeError if a GPTModel cannot compute what it describes, naming the key and both values.
    """
    wanted = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, values in wanted.items():
        found = config.get(key, None if key == "model_type" else values[0])
        if found not in values:
            raise ExchangeError(
                f"{where}: {key} is {found!r:.80}, and a model here has {' or '.join(map(repr, values))}. Only GPT-2 "
                "models are imported."
            )
    counts = {ours: config.get(theirs, _DEFAULTS[theirs]) for ours, theirs in _COUNTS.items()}
    for key, number in counts.items():
        if type(number) is not int or number < 1:
            raise ExchangeError(f"{where}: {_COUNTS[key]} is {number!r:.80}; it must be a whole number, at least 1.")
    if (inner := config.get("n_inner")) not in (None, 4 * counts["emb_dim"]):
        raise ExchangeError(f"{where}: n_inner is {inner!r:.80}, and a model here has 4 times n_embd.")
    cfg = {**counts, "drop_rate": config.get("resid_pdrop", 0.1), "qkv_bias": True}
    return {**cfg, "tied": True} if config.get("tie_word_embeddings", True) else cfg


def _config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: cfg[ours] for ours, theirs in _COUNTS.items()},
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": chosen(cfg)["tied"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg["drop_rate"]),
    }


def _check_parts(cfg: Mapping[str, Any]) -> None:
    try:
        parts = chosen(cfg)
    except ConfigError as error:
        raise ExchangeError(str(error)) from None
    for key, value in parts.items():
        if key not in _FREE_PARTS and value != (theirs := RECIPES["gpt2"][key]):
            raise ExchangeError(
                f"the model has model.{key} {value!r}, which Hugging Face's GPT-2 cannot express: there it is always "
                f"{theirs!r}. Only models of the recipe gpt2 are exported."
            )

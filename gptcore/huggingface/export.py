"""Write a model as a directory that Hugging Face's `transformers` loads, and read the config.json of such a directory.

    config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json  README.md

`AutoModelForCausalLM` gives the same logits as the model here, and `AutoTokenizer` gives the same ids. The only
exception is text with a lone surrogate, which Hugging Face's tokenizers reject. Export does not need `transformers`.

See import_.py for the way back, weight_names.py for the weights and tokenizer_json.py for the tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gptcore import manifest
from gptcore.bundle import CARD
from gptcore.components import RECIPES
from gptcore.errors import ConfigError, ExchangeError
from gptcore.huggingface import tokenizer_json, weight_names
from gptcore.huggingface.weight_names import Weights
from gptcore.model.gpt import read_components
from gptcore.tokens.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EPSILON = 1e-5
"""The epsilon of the layer norms, here and in GPT-2."""
_HUGGINGFACE_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""The keys of the book's dict that are counts, with their names in config.json."""
_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
"""GPT-2's values of the keys that config.json may leave out."""
# Components that GPT-2 can express with any value: missing biases become zeros, a tied head is a key in config.json,
# and `init` does not change what a trained model computes.
_FREE_COMPONENTS = {"init", "tied", "bias"}


def export(
    cfg: Mapping[str, Any], weights: Weights, tokenizer: Tokenizer, directory: Path, card: str | None = None
) -> None:
    """Write a GPTModel(cfg) with these weights, and its tokenizer, into `directory`, which must be new or empty.

    `card` is the model card, in markdown, which becomes README.md. The directory appears complete or not at all.

    Raises ExchangeError, and writes nothing, if GPT-2 does not have a component of the model, if the weights have other
    shapes, if Hugging Face's tokenizer would give other ids, or if the directory is not empty. Raises DiskFull.
    """
    _check_components(cfg)
    weight_names.check(weights, cfg, "the state dict")
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise ExchangeError(f"the tokenizer has {tokenizer.n_vocab} ids, the model {cfg['vocab_size']}.")
    tokenizer_body = tokenizer_json.convert_to_json(tokenizer)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExchangeError(f"{directory} is not empty, and export does not overwrite files. Name another directory.")
    with manifest.stage(directory.absolute().parent) as staged:
        tensors = {name: tensor.float().contiguous() for name, tensor in weight_names.to_huggingface(weights).items()}
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        end_ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        for name, body in ((CONFIG, {**_make_config(cfg), **end_ids}), ("generation_config.json", end_ids)):
            (staged / name).write_text(json.dumps(body, indent=1) + "\n")
        tokenizer_json.write(tokenizer_body, staged, cfg["context_length"])
        if card is not None:
            (staged / CARD).write_text(card, encoding="utf-8")
        for path in (*staged.iterdir(), staged):
            manifest.flush(path)
        staged.chmod(0o755)
        staged.rename(directory)
        manifest.flush(directory.absolute().parent)


def parse_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the book's dict for the content of a config.json, plus `tied` if head and embedding are one matrix.

    `path` names the file in messages. Raises ExchangeError with the key and both values if a GPTModel cannot compute
    what the file describes.
    """
    required = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, values in required.items():
        value = config.get(key, None if key == "model_type" else values[0])
        if value not in values:
            raise ExchangeError(
                f"{path}: {key} is {value!r:.80}, and a model here has {' or '.join(map(repr, values))}. Only GPT-2 "
                "models are imported."
            )
    counts = {ours: config.get(theirs, _DEFAULTS[theirs]) for ours, theirs in _HUGGINGFACE_KEYS.items()}
    for key, number in counts.items():
        if type(number) is not int or number < 1:
            setting = f"{_HUGGINGFACE_KEYS[key]} is {number!r:.80}"
            raise ExchangeError(f"{path}: {setting} (expected a whole number of at least 1).")
    if (inner := config.get("n_inner")) not in (None, 4 * counts["emb_dim"]):
        raise ExchangeError(f"{path}: n_inner is {inner!r:.80}, and a model here has 4 times n_embd.")
    cfg = {**counts, "drop_rate": config.get("resid_pdrop", 0.1), "qkv_bias": True}
    return {**cfg, "tied": True} if config.get("tie_word_embeddings", True) else cfg


def _make_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json, without the ids of the end-of-text token."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: cfg[ours] for ours, theirs in _HUGGINGFACE_KEYS.items()},
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": EPSILON,
        "tie_word_embeddings": read_components(cfg)["tied"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg["drop_rate"]),
    }


def _check_components(cfg: Mapping[str, Any]) -> None:
    """Raise ExchangeError if the model has a component that GPT-2 does not have, naming both values."""
    try:
        components = read_components(cfg)
    except ConfigError as error:
        raise ExchangeError(str(error)) from None
    for key, value in components.items():
        if key not in _FREE_COMPONENTS and value != (theirs := RECIPES["gpt2"][key]):
            raise ExchangeError(
                f"the model has model.{key} {value!r}, which Hugging Face's GPT-2 cannot express: there it is always "
                f"{theirs!r}. Only models of the recipe gpt2 are exported."
            )

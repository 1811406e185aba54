"""Write a model as a directory that Hugging Face's `transformers` loads, and read the config.json of such a directory.

    config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json  README.md

A model of the recipe `gpt2` becomes a GPT-2, and one of the recipe `modern` a Qwen3. Both are stock classes, so nobody
has to trust code of ours. `AutoModelForCausalLM` gives the same logits as the model here, and `AutoTokenizer` gives the
same ids (see tokenizer_json.py for the exceptions). Export does not need `transformers`.

See import_.py for the way back, gpt2.py and qwen3.py for the weights, and tokenizer_json.py for the tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gptcore import manifest
from gptcore.bundle import CARD
from gptcore.errors import ConfigError, ExchangeError
from gptcore.huggingface import tokenizer_json, weight_names
from gptcore.huggingface.gpt2 import GPT2
from gptcore.huggingface.qwen3 import QWEN3
from gptcore.huggingface.weight_names import Architecture, Weights
from gptcore.model.gpt import read_components
from gptcore.tokens.tokenizer import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURES = (GPT2, QWEN3)


def export(
    cfg: Mapping[str, Any], weights: Weights, tokenizer: Tokenizer, directory: Path, card: str | None = None
) -> None:
    """Write a GPTModel(cfg) with these weights, and its tokenizer, into `directory`, which must be new or empty.

    `card` is the model card, in markdown, which becomes README.md. The directory appears complete or not at all.

    Raises ExchangeError, and writes nothing, if Hugging Face does not have a component of the model, if the weights
    have other shapes, if Hugging Face's tokenizer would give other ids, or if the directory is not empty. Raises
    DiskFull.
    """
    architecture = choose_architecture(cfg)
    weight_names.check(weights, cfg, None, "the state dict")
    if tokenizer.n_vocab > cfg["vocab_size"]:
        raise ExchangeError(f"the tokenizer has {tokenizer.n_vocab} ids, the model {cfg['vocab_size']}.")
    tokenizer_body = tokenizer_json.convert_to_json(tokenizer)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExchangeError(f"{directory} is not empty, and export does not overwrite files. Name another directory.")
    with manifest.stage(directory.absolute().parent) as staged:
        converted = architecture.to_huggingface(weights, cfg)
        tensors = {name: tensor.float().contiguous() for name, tensor in converted.items()}
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        end_ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        config = {"architectures": [architecture.model_class], "model_type": architecture.model_type}
        for name, body in (
            (CONFIG, {**config, **architecture.make_config(cfg), **end_ids}),
            ("generation_config.json", end_ids),
        ):
            (staged / name).write_text(json.dumps(body, indent=1) + "\n")
        tokenizer_json.write(tokenizer_body, staged, cfg["context_length"])
        if card is not None:
            (staged / CARD).write_text(card, encoding="utf-8")
        _set_modes(staged)
        for path in (*staged.iterdir(), staged):
            manifest.flush(path)
        staged.rename(directory)
        manifest.flush(directory.absolute().parent)


def choose_architecture(cfg: Mapping[str, Any]) -> Architecture:
    """Return the architecture with the model's positions. Raises ExchangeError if it lacks another component."""
    try:
        components = read_components(cfg)
    except ConfigError as error:
        raise ExchangeError(str(error)) from None
    architecture = next(one for one in ARCHITECTURES if one.components["positions"] == components["positions"])
    for key, theirs in architecture.components.items():
        if components[key] != theirs:
            raise ExchangeError(
                f"the model has model.{key} {components[key]!r}, which Hugging Face's {architecture.name} cannot "
                f"express: with {components['positions']} positions it is always {theirs!r}. Only models with the "
                "components of the recipe gpt2 or modern are exported."
            )
    return architecture


def parse_config(config: Mapping[str, Any], path: Path, architecture: Architecture) -> dict[str, Any]:
    """Return the book's dict for the content of a config.json, plus `tied` if head and embedding are one matrix.

    `path` names the file in messages, and `architecture` is that of the weights beside it. Raises ExchangeError with
    the key and both values if a GPTModel cannot compute what the file describes.
    """
    if (found := config.get("model_type")) not in (known := [one.model_type for one in ARCHITECTURES]):
        raise ExchangeError(
            f"{path}: model_type is {found!r:.80}, and a model here has {' or '.join(map(repr, known))}. Only GPT-2 "
            "models, and Qwen3 models that `gptflow export` wrote, are imported."
        )
    if found != architecture.model_type:
        raise ExchangeError(f"{path}: model_type is {found!r}, and the weights are those of a {architecture.name}.")
    return architecture.parse_config(config, str(path))


def _set_modes(directory: Path) -> None:
    """Give all files, and the directory, the modes of files that a program writes here."""
    mode = (directory / CONFIG).stat().st_mode & 0o777  # of a file written with the process's umask
    for path in directory.iterdir():
        path.chmod(mode)  # safetensors makes files that only their owner may read
    directory.chmod(mode | (mode & 0o444) >> 2)

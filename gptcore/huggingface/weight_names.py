"""What the architectures of Hugging Face have in common, and checks of weights under their names or the book's.

This project uses the book's names. gpt2.py and qwen3.py convert weights to and from the names of two model classes of
`transformers`. See export.py and import_.py for the files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.errors import ConfigError, ExchangeError
from gptcore.model.gpt import GPTModel

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]
BOOK_EMBEDDING, BOOK_POSITIONS, BOOK_HEAD, BOOK_LAYERS = (
    "tok_emb.weight",
    "pos_emb.weight",
    "out_head.weight",
    "trf_blocks.",
)


@dataclass(frozen=True)
class Architecture:
    """A model class of `transformers` that computes the same as a GPTModel with certain components."""

    name: str
    """Its name for people."""
    model_type: str
    """The value of this key in config.json."""
    model_class: str
    components: Mapping[str, Any]
    """The components that a GPTModel must have. It may have the others with any value."""
    embedding: str
    """The name of the embedding of the tokens."""
    positions: str | None
    """The name of the embedding of the positions, if there is one."""
    head: str
    layers: str
    """What the names of the blocks' tensors begin with, before the number of the block."""
    to_huggingface: Callable[[Weights, Config], dict[str, Tensor]]
    """Converts the weights of a GPTModel(cfg)."""
    from_huggingface: Callable[[Weights, str], dict[str, Tensor]]
    """Converts tensors that `check` accepted. The string names the checkpoint in messages."""
    make_config: Callable[[Config], dict[str, Any]]
    """Returns the content of config.json for the book's dict."""
    parse_config: Callable[[Config, str], dict[str, Any]]
    """Returns the book's dict for the content of a config.json. The string names the file in messages."""


def has_book_names(names: Mapping[str, Any]) -> bool:
    """Whether these are the book's names, and not Hugging Face's."""
    return BOOK_EMBEDDING in names


def embedding_and_head(architecture: Architecture | None) -> tuple[str, str]:
    """Return the names of the embedding and the head. None means the book's names, here and below."""
    return (BOOK_EMBEDDING, BOOK_HEAD) if architecture is None else (architecture.embedding, architecture.head)


def infer_shape(tensors: Weights, architecture: Architecture | None, origin: str) -> dict[str, int]:
    """Return vocab_size, emb_dim, n_layers and, unless positions have no weights, context_length of the tensors.

    `origin` names the checkpoint in messages. Raises ExchangeError if an embedding is missing.
    """
    embedding, _ = embedding_and_head(architecture)
    positions = BOOK_POSITIONS if architecture is None else architecture.positions
    for name in filter(None, (embedding, positions)):
        if name not in tensors or tensors[name].ndim != 2:
            state = "absent" if name not in tensors else f"of shape {tuple(tensors[name].shape)}"
            raise ExchangeError(
                f"{origin} is not a {_name(architecture)}: {name} is {state} (expected a matrix). Its {len(tensors)} "
                f"tensors begin with {', '.join(sorted(tensors)[:3]) or 'none'}."
            )
    vocab_size, width = tensors[embedding].shape
    shape = {"vocab_size": vocab_size, "emb_dim": width}
    if positions is not None:
        shape["context_length"] = len(tensors[positions])
    return {**shape, "n_layers": count_layers(tensors, BOOK_LAYERS if architecture is None else architecture.layers)}


def count_layers(names: Mapping[str, Any], prefix: str) -> int:
    """Return the number of blocks that the names mention. `prefix` is what precedes the number of a block."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def read_counts(config: Config, keys: Mapping[str, str], origin: str) -> dict[str, int]:
    """Return the counts of a config.json under the book's keys. `keys` maps the book's keys to those of the file.

    `origin` names the file in messages. Raises ExchangeError for one that is missing or not a count.
    """
    for theirs in keys.values():
        number = config.get(theirs)
        if type(number) is not int or number < 1:
            raise ExchangeError(f"{origin}: {theirs} is {number!r:.80} (expected a whole number of at least 1).")
    return {ours: config[theirs] for ours, theirs in keys.items()}


def check_values(given: Config, required: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    """Raise ExchangeError if a value is not one of those that a model here can compute, with the key and both."""
    for key, values in required.items():
        if given[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise ExchangeError(f"{origin}: {key} is {given[key]!r:.80}, and a model here has {expected}.")


def check(tensors: Weights, cfg: Config, architecture: Architecture | None, origin: str) -> None:
    """Raise ExchangeError if names or shapes differ from a model of `cfg`, or a weight is not a finite float.

    `origin` names the checkpoint in the message, which lists what differs.
    """
    try:
        with torch.device("meta"):
            model = GPTModel(cfg).state_dict()
    except ConfigError as error:
        raise ExchangeError(f"{origin}: {error}") from None
    expected = model if architecture is None else architecture.to_huggingface(model, cfg)
    problems = list(_find_differences(tensors, expected))
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExchangeError(f"{origin} is not a {_name(architecture)} of this shape: {'; '.join(problems[:3])}{more}.")
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


def _name(architecture: Architecture | None) -> str:
    return "GPT-2" if architecture is None else architecture.name

"""A GPT and everything that learns from text.

The names below are the seed's API, `from gptcore import GPTModel, train_model_simple, ...`, and `load`, which opens a
bundle's directory. Each is loaded from its module when it is first asked for, so that `import gptcore.config` loads
neither torch nor anything else. Everything beyond the seed is imported from its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcore.attention import MultiHeadAttention
    from gptcore.bundle import load
    from gptcore.data import GPTDatasetV1, create_dataloader_v1
    from gptcore.evaluate import evaluate_model
    from gptcore.generate import (
        generate_and_print_sample,
        generate_text_simple,
        text_to_token_ids,
        token_ids_to_text,
    )
    from gptcore.loss import calc_loss_batch, calc_loss_loader
    from gptcore.model import GELU, FeedForward, GPTModel, LayerNorm, TransformerBlock
    from gptcore.plots import plot_losses
    from gptcore.train import train_model_simple

__all__ = [
    "GELU",
    "FeedForward",
    "GPTDatasetV1",
    "GPTModel",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "calc_loss_batch",
    "calc_loss_loader",
    "create_dataloader_v1",
    "evaluate_model",
    "generate_and_print_sample",
    "generate_text_simple",
    "load",
    "plot_losses",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]

_HOMES = {
    "bundle": ("load",),
    "data": ("GPTDatasetV1", "create_dataloader_v1"),
    "evaluate": ("evaluate_model",),
    "generate": ("generate_and_print_sample", "generate_text_simple", "text_to_token_ids", "token_ids_to_text"),
    "loss": ("calc_loss_batch", "calc_loss_loader"),
    "attention": ("MultiHeadAttention",),
    "model": ("GELU", "FeedForward", "GPTModel", "LayerNorm", "TransformerBlock"),
    "plots": ("plot_losses",),
    "train": ("train_model_simple",),
}
_HOME = {name: f"gptcore.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gptcore' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Train, evaluate and use a GPT.

The names below are the API of the book, Sebastian Raschka's "Build a Large Language Model (From Scratch)", as in
`from gptcore import GPTModel, train_model_simple`, and `load`, which loads a bundle. Python imports the module of a
name when the name is first used, so `import gptcore.config` does not import torch. Import everything else from its own
module.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcore.bundle import load
    from gptcore.evaluation.bits_per_byte import evaluate_model
    from gptcore.evaluation.plots import plot_losses
    from gptcore.generation.book import generate
    from gptcore.generation.generate import (
        generate_and_print_sample,
        generate_text_simple,
        text_to_token_ids,
        token_ids_to_text,
    )
    from gptcore.model.attention import MultiHeadAttention
    from gptcore.model.gpt import GELU, FeedForward, GPTModel, LayerNorm, TransformerBlock
    from gptcore.model.loss import calc_loss_batch, calc_loss_loader
    from gptcore.model.openai_weights import load_weights_into_gpt
    from gptcore.train import train_model_simple
    from gptcore.training.batches import GPTDatasetV1, create_dataloader_v1

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
    "generate",
    "generate_and_print_sample",
    "generate_text_simple",
    "load",
    "load_weights_into_gpt",
    "plot_losses",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]

_HOMES = {
    "bundle": ("load",),
    "training.batches": ("GPTDatasetV1", "create_dataloader_v1"),
    "evaluation.bits_per_byte": ("evaluate_model",),
    "generation.book": ("generate",),
    "generation.generate": (
        "generate_and_print_sample",
        "generate_text_simple",
        "text_to_token_ids",
        "token_ids_to_text",
    ),
    "model.loss": ("calc_loss_batch", "calc_loss_loader"),
    "model.openai_weights": ("load_weights_into_gpt",),
    "model.attention": ("MultiHeadAttention",),
    "model.gpt": ("GELU", "FeedForward", "GPTModel", "LayerNorm", "TransformerBlock"),
    "evaluation.plots": ("plot_losses",),
    "train": ("train_model_simple",),
}
_HOME = {name: f"gptcore.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gptcore' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


_MOVED = {
    "gptcore.generate": "gptcore.generation.generate",
    "gptcore.writing": "gptcore.generation",
    "gptcore.writing.sampling": "gptcore.generation.sampling",
}


class _CallableModule(ModuleType):
    """The module `gptcore.generate`, which is also the book's function: importing it takes the function's name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from gptcore.generation.book import generate

        return generate(*args, **kwargs)


class _MovedModules:
    """Finds a module by an earlier name. Versions that earlier releases registered import modules by these names.

    MLflow gives such a version the gptcore that was stored with it, unless this one has been imported before.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=name == "gptcore.writing") if name in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return _CallableModule(spec.name) if spec.name == "gptcore.generate" else None

    def exec_module(self, module: ModuleType) -> None:
        moved = vars(import_module(_MOVED[module.__name__]))
        vars(module).update({name: value for name, value in moved.items() if not name.startswith("__")})


sys.meta_path.append(_MovedModules())  # last: it is asked only for modules that do not exist

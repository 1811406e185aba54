"""Registered models as `gptflow import` makes them: complete versions with MLflow's files, without a training."""

from typing import Any

import torch

from flows.registry import import_
from flows.state.root import StateRoot
from gptcore.huggingface.import_ import Checkpoint
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "context_length": 64, "n_layers": 1, "qkv_bias": True, "tied": True}


def bring_versions(root: StateRoot, name: str, count: int, **changes: Any) -> None:
    """Register `count` random models that read bytes. The first one is champion.

    Models with layer norms, the default, never end a text.
    """
    cfg = {**CFG, **changes}
    for seed in range(count):
        torch.manual_seed(seed)
        model = GPTModel(cfg)
        weights = (endless(model) if cfg.get("norm", "layer") == "layer" else model).state_dict()
        import_.register(root, name, Checkpoint(cfg, weights, get_tokenizer("bytes"), f"seed {seed}", {}, 0), "a test")


def endless(model: GPTModel) -> GPTModel:
    """Change the model so that it never draws its last id, the end of a text, and return it."""
    with torch.no_grad():
        model.final_norm.shift.fill_(1)
        model.out_head.weight[-1] = -10
    return model

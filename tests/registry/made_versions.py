"""Registered models as `gptflow import` makes them: complete versions with MLflow's files, without a training."""

import torch

from flows.registry import import_
from flows.state.root import StateRoot
from gptcore.huggingface.import_ import Checkpoint
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer

CFG = {
    "vocab_size": 257,
    "context_length": 64,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": True,
    "tied": True,
}


def bring_versions(root: StateRoot, name: str, count: int, emb_dim: int = 32, n_layers: int = 1) -> None:
    """Register `count` random models that read bytes and never end a text. The first one is champion."""
    cfg = {**CFG, "emb_dim": emb_dim, "n_layers": n_layers}
    for seed in range(count):
        torch.manual_seed(seed)
        weights = endless(GPTModel(cfg)).state_dict()
        import_.register(root, name, Checkpoint(cfg, weights, get_tokenizer("bytes"), f"seed {seed}", {}, 0), "a test")


def endless(model: GPTModel) -> GPTModel:
    """Change the model so that it never draws its last id, the end of a text, and return it."""
    with torch.no_grad():
        model.final_norm.shift.fill_(1)
        model.out_head.weight[-1] = -10
    return model

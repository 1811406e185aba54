"""Registered models as `gptflow import` makes them: whole versions, MLflow's part included, without a training."""

import torch

from flows.releases import imported
from flows.state import StateRoot
from gptcore.exchange.checkpoints import Checkpoint
from gptcore.model import GPTModel
from gptcore.tokenizer import get_tokenizer

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
    """Registers `count` random models that read bytes and never end a text; the first is champion."""
    cfg = {**CFG, "emb_dim": emb_dim, "n_layers": n_layers}
    for seed in range(count):
        torch.manual_seed(seed)
        weights = endless(GPTModel(cfg)).state_dict()
        imported.register(root, name, Checkpoint(cfg, weights, get_tokenizer("bytes"), f"seed {seed}", {}, 0), "a test")


def endless(model: GPTModel) -> GPTModel:
    """The model, whose last id, the end of a text, will not be drawn."""
    with torch.no_grad():
        model.final_norm.shift.fill_(1)
        model.out_head.weight[-1] = -10
    return model

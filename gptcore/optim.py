"""How weights are updated: parameter groups, the optimiser, and the learning rate over the course of a training.

The learning rate is a pure function of the update and of the share of the budget used up, so nothing of it needs to be
stored in a checkpoint.
"""

import math

import torch
from torch import nn

from gptcore.config import TrainConfig


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with betas 0.9 and 0.95 (Brown et al. 2020, appendix B).

    Weight decay acts on matrices, embeddings included, and not on biases and gains, which have one dimension.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(cfg: TrainConfig, step: int, progress: float) -> float:
    """The rate of update number `step` (from 0), when the share `progress` in [0, 1] of the budget is used up."""
    warm_up = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return cfg.learning_rate * warm_up * decay[cfg.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

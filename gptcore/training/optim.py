"""How weights are updated: parameter groups, the optimizer, and the learning rate over the course of a training.

The learning rate is a pure function of the update and of the fraction of the budget used, so a checkpoint does not
store it. If a change gives other weights, see resolve.find_training_version.
"""

import math
from inspect import unwrap

import torch
from torch import nn

from gptcore.config import TrainConfig
from gptcore.training.muon import BETAS, EagerOptimizer, Muon


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, as an EagerOptimizer."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer that `cfg.optimizer` names.

    - adamw: fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with betas 0.9 and 0.95 (Brown et al. 2020,
      appendix B).
    - muon: Muon for the matrices of the blocks, AdamW for the rest.

    Weight decay acts on matrices, including embeddings, but not on biases and gains, which have one dimension.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {name for name, p in parameters.items() if cfg.optimizer == "muon" and _is_inner_matrix(name, p)}
    rest = [p for name, p in parameters.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if cfg.optimizer == "adamw":
        return AdamW(groups, lr=cfg.learning_rate, betas=BETAS, fused=True)
    matrices = {"params": [parameters[name] for name in sorted(inner)], "weight_decay": cfg.weight_decay}
    return Muon([{**matrices, "orthogonal": True}, *groups], cfg.learning_rate)


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether the parameter is a matrix that maps hidden states to hidden states."""
    return "trf_blocks." in name and parameter.dim() == 2


def learning_rate(cfg: TrainConfig, step: int, progress: float) -> float:
    """Return the rate of update number `step` (from 0), at the fraction `progress` (0 to 1) of the budget.

    The rate rises over the first `warmup_steps` updates. The next update has the highest rate, from which it falls over
    the rest of the budget.

    Example: with 8 updates, warmup_steps 3 and a linear schedule, the updates get 1/4, 2/4, 3/4, 1, 4/5, 3/5, 2/5 and
    1/5 of the rate.
    """
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * ((step + 1) / (cfg.warmup_steps + 1))
    # The share of the budget that the warm-up took. For a budget in seconds, this assumes updates of equal length.
    warm_up = progress * cfg.warmup_steps / step
    fallen = (progress - warm_up) / (1.0 - warm_up)
    decay = {"constant": 1.0, "linear": 1.0 - fallen, "cosine": 0.5 * (1.0 + math.cos(math.pi * fallen))}
    return cfg.learning_rate * decay[cfg.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

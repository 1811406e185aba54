"""What changes while a model is trained, apart from torch's random states: all that a checkpoint must hold."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcore.config import TrainConfig
from gptcore.learning.ranks import ALONE, Ranks
from gptcore.learning.spread import Spread, whole
from gptcore.model import GPTModel
from gptcore.optim import make_optimizer


@dataclass(frozen=True)
class Best:
    """The weights with the lowest validation loss so far."""

    step: int
    val_loss: float
    weights: dict[str, Tensor]


@dataclass
class TrainState:
    """Model, optimizer and counters of one training."""

    model: GPTModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    spread: Spread
    step: int = 0
    """Updates completed."""
    tokens_seen: int = 0
    seconds: float = 0.0
    """Time spent in updates, over all attempts."""
    best: Best | None = None
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    losses: tuple[float, float] = (math.nan, math.nan)
    """Train and val loss of the newest evaluation."""

    @classmethod
    def initial(cls, cfg: dict[str, Any], train: TrainConfig, ranks: Ranks = ALONE) -> "TrainState":
        """Seeds torch, builds the model as the seed's code does, and spreads it over the ranks' devices."""
        torch.manual_seed(train.seed)
        device = ranks.device(train.device)
        model = GPTModel(cfg)
        model.train()
        if train.compile is True:
            for block in model.trf_blocks:
                block.compile()
        spread = Spread(model, ranks, device, train.shard)
        return cls(model=model, optimizer=make_optimizer(model, train), device=device, spread=spread)

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.spread.ranks

    def counters(self) -> dict[str, Any]:
        """The state's numbers, for a checkpoint's manifest."""
        best = self.best and {"step": self.best.step, "val_loss": self.best.val_loss}
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "stale_evaluations": self.stale_evaluations,
            "best": best,
        }

    def set_counters(self, counters: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        """The inverse of `counters`."""
        self.step = counters["step"]
        self.tokens_seen = counters["tokens_seen"]
        self.seconds = counters["seconds"]
        self.stale_evaluations = counters["stale_evaluations"]
        best = counters["best"]
        self.best = Best(best["step"], best["val_loss"], best_weights) if best and best_weights is not None else None

    def note_evaluation(self, train_loss: float, val_loss: float) -> None:
        """Keeps the weights if `val_loss` is the lowest so far. The first rank does so for all."""
        self.losses = (train_loss, val_loss)
        if self.best is None or val_loss < self.best.val_loss:
            there = whole(self.ranks, self.model.state_dict())
            weights = {name: value.detach().to("cpu", copy=True) for name, value in there.items()}
            self.best = Best(self.step, val_loss, weights)
            self.stale_evaluations = 0
        else:
            self.stale_evaluations += 1

"""The state that training changes, apart from torch's random states: everything that a checkpoint must hold."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptcore.config import TrainConfig
from gptcore.model.gpt import GPTModel
from gptcore.training.distributed import ALONE, Ranks
from gptcore.training.optim import make_optimizer
from gptcore.training.parallel import ParallelModel, gather_to_rank_0


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
    parallel: ParallelModel
    """`model` as it is distributed over the ranks."""
    step: int = 0
    """Updates completed."""
    tokens_seen: int = 0
    seconds: float = 0.0
    """Time spent in updates, over all starts of the trainer."""
    best: Best | None = None
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    executions: list[dict[str, Any]] = field(default_factory=list)
    """How the updates were computed (see `Result.executions`)."""

    @classmethod
    def initial(cls, cfg: dict[str, Any], train: TrainConfig, ranks: Ranks = ALONE) -> "TrainState":
        """Seed torch, build the model as the book's code does, and distribute it over the ranks' devices."""
        torch.manual_seed(train.seed)
        device = ranks.choose_device(train.device)
        model = GPTModel(cfg)
        model.train()
        if train.compile is True:
            for block in model.trf_blocks:
                block.compile()
        parallel = ParallelModel(model, ranks, device, train.shard)
        return cls(model=model, optimizer=make_optimizer(model, train), device=device, parallel=parallel)

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.parallel.ranks

    def counters(self) -> dict[str, Any]:
        """Return the state's numbers, for a checkpoint's manifest."""
        best = self.best and {"step": self.best.step, "val_loss": self.best.val_loss}
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "stale_evaluations": self.stale_evaluations,
            "executions": list(self.executions),
            "best": best,
        }

    def set_counters(self, counters: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        """Set the numbers that `counters` returned, and the best weights."""
        self.step = counters["step"]
        self.tokens_seen = counters["tokens_seen"]
        self.seconds = counters["seconds"]
        self.stale_evaluations = counters["stale_evaluations"]
        self.executions = list(counters.get("executions", ()))  # earlier releases did not record them
        best = counters["best"]
        self.best = Best(best["step"], best["val_loss"], best_weights) if best and best_weights is not None else None

    def record_execution(self, execution: dict[str, Any]) -> None:
        """Remember how the newest update was computed, if it was computed in another way than the one before."""
        if self.executions[-1:] != [execution]:
            self.executions.append(execution)

    def record_evaluation(self, val_loss: float) -> None:
        """Keep the weights if `val_loss` is the lowest so far. Only rank 0 holds them."""
        if self.best is None or val_loss < self.best.val_loss:
            complete = gather_to_rank_0(self.ranks, self.model.state_dict())
            weights = {name: value.detach().to("cpu", copy=True) for name, value in complete.items()}
            self.best = Best(self.step, val_loss, weights)
            self.stale_evaluations = 0
        else:
            self.stale_evaluations += 1

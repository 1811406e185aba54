"""How the next token is drawn from a model's logits. The filters come in the order of Hugging Face's `generate`."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import CheckpointError, ConfigError

_LEAST = torch.finfo(torch.float32).tiny
"""A smaller setting would be 0 in the arithmetic, and divide by it."""


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw; by default the model's own distribution. Raises ConfigError for one out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """So many of the likeliest tokens may be drawn (Fan et al. 2018, arXiv:1805.04833)."""
    top_p: float = 1.0
    """Then the fewest likeliest that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Then those with at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Before all that, logits of tokens that the text has already are divided by this where positive, multiplied where
    negative (Keskar et al. 2019, arXiv:1909.05858)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0 (the likeliest token) or a positive number."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1, or None for the whole vocabulary.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must lie between 0 and 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 does nothing).")

    def draw(self, logits: Tensor, seen: Collection[int], generator: torch.Generator) -> int:
        """One id from logits (vocabulary,) of what follows the ids `seen`; drawn on the CPU by `generator`.

        Raises CheckpointError for logits that are not numbers, as a damaged model has them.
        """
        logits = self._penalised(logits.cpu(), seen)
        if self.temperature == 0:
            return int(logits.numpy().argmax())  # a tenth of the time of torch's
        # The inverse of the cumulative distribution: a fifth of what torch.multinomial takes for GPT-2's ids.
        reached = self._filtered(logits).double().cumsum(0)
        if not math.isfinite(total := float(reached[-1])):
            raise CheckpointError("the model's logits are not numbers: its weights are damaged; load another version.")
        return int(torch.searchsorted(reached, (1 - torch.rand((), generator=generator, dtype=torch.float64)) * total))

    def probabilities(self, logits: Tensor, seen: Collection[int] = ()) -> Tensor:
        """(vocabulary,) with which each id is drawn from logits (vocabulary,)."""
        logits = self._penalised(logits.cpu(), seen)
        if self.temperature == 0:
            return torch.zeros(len(logits)).index_fill(0, logits.argmax(), 1.0)
        weights = self._filtered(logits)
        return weights / weights.sum()

    def _penalised(self, logits: Tensor, seen: Collection[int]) -> Tensor:
        if self.repetition_penalty == 1 or not seen:
            return logits
        ids = torch.tensor(sorted(set(seen)))
        found = logits[ids]
        changed = torch.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
        return logits.index_put((ids,), changed)

    def _filtered(self, logits: Tensor) -> Tensor:
        """(vocabulary,) weights that need not sum to 1; 0 where an id may not be drawn."""
        scaled = (logits.float() - logits.max()) / max(self.temperature, _LEAST)
        if self.top_k is not None and self.top_k < len(scaled):
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[-1], -math.inf)
        weights = torch.softmax(scaled, dim=0)
        least = self.min_p * float(weights.max())
        if self.top_p < 1:
            least = max(least, self._least_of_nucleus(weights))
        return weights.masked_fill(weights < least, 0.0) if least else weights

    def _least_of_nucleus(self, probabilities: Tensor) -> float:
        """The smallest probability that is needed to reach `top_p`. NumPy sorts 25 times as fast as torch."""
        rising = np.sort(probabilities.numpy())
        needless = np.cumsum(rising, dtype=np.float64) <= 1 - self.top_p
        return float(rising[min(int(needless.sum()), len(rising) - 1)])

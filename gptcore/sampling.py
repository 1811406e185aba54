"""How the next token is drawn from a model's logits. The filters come in the order of Hugging Face's `generate`."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.errors import CheckpointError, ConfigError

_LEAST = torch.finfo(torch.float32).tiny
"""A smaller setting would be 0 in the arithmetic, and divide by it."""
_FIRST = 1024
"""Tokens that are sorted first for `top_p`: sorting all of GPT-2's 50,257 takes as long as half a token of shape M."""


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
        logits = self._penalised(logits, seen)
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities, ids = self._filtered(logits)
        if not math.isfinite(float(probabilities.sum())):
            raise CheckpointError("the model's logits are not numbers: its weights are damaged; load another version.")
        drawn = int(torch.multinomial(probabilities, 1, generator=generator))
        return drawn if ids is None else int(ids[drawn])

    def probabilities(self, logits: Tensor, seen: Collection[int] = ()) -> Tensor:
        """(vocabulary,) with which each id is drawn from logits (vocabulary,)."""
        logits = self._penalised(logits, seen)
        if self.temperature == 0:
            return torch.zeros(len(logits)).index_fill(0, logits.argmax().cpu(), 1.0)
        kept, ids = self._filtered(logits)
        spread = kept if ids is None else torch.zeros(len(logits)).index_put((ids.cpu(),), kept)
        return spread / spread.sum()

    def _penalised(self, logits: Tensor, seen: Collection[int]) -> Tensor:
        if self.repetition_penalty == 1 or not seen:
            return logits
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        found = logits[ids]
        changed = torch.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
        return logits.index_put((ids,), changed)

    def _filtered(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What may be drawn: weights that need not sum to 1, and their ids, or None for all ids in order."""
        scaled = (logits.float() - logits.max()) / max(self.temperature, _LEAST)
        if self.top_k is None and self.top_p == 1:
            weights = torch.softmax(scaled.cpu(), dim=0)
            return self._cut_rare(weights), None
        if self.top_k is not None:
            scaled, ids = scaled.topk(min(self.top_k, len(scaled)))
            weights = torch.softmax(scaled.cpu(), dim=0)
        else:
            weights, ids = self._likeliest(torch.softmax(scaled, dim=0))
        if self.top_p < 1:
            weights = weights.masked_fill(weights.double().cumsum(0) - weights >= max(self.top_p, _LEAST), 0.0)
        return self._cut_rare(weights), ids

    def _likeliest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """As many of the likeliest as are needed to reach `top_p`, or more."""
        for count in (_FIRST, len(probabilities)):
            weights, ids = probabilities.topk(min(count, len(probabilities)))
            if weights.sum() >= self.top_p:
                break
        return weights.cpu(), ids

    def _cut_rare(self, weights: Tensor) -> Tensor:
        return weights.masked_fill(weights < self.min_p * weights.max(), 0.0) if self.min_p else weights

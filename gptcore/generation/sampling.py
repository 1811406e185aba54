"""The draw of the next token from a model's logits.

The filters run in the order of Hugging Face's `generate`: repetition penalty, temperature, top-k, then top-p and min-p.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import CheckpointError, ConfigError

MIN_PENALTY, MAX_PENALTY = 0.01, 100.0
"""The range of the repetition penalty. Beyond it, dividing or multiplying a logit could overflow."""
NOT_NUMBERS = "the model's logits are not numbers: its weights are damaged. Load another version."
_LEAST = torch.finfo(torch.float32).tiny
"""The lowest temperature to divide by: a smaller one would be 0 as a float32."""


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw, by default from the model's own distribution. Raises ConfigError for one out of range."""

    temperature: float = 1.0
    """Divisor of the logits. 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep only the `top_k` likeliest tokens (Fan et al. 2018, arXiv:1805.04833). None: keep all."""
    top_p: float = 1.0
    """Then keep the fewest likeliest tokens that together reach this probability (Holtzman et al. 2020,
    arXiv:1904.09751)."""
    min_p: float = 0.0
    """Then keep the tokens with at least this fraction of the likeliest token's probability (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Applied first: divides the positive logits of tokens that are in the text already, and multiplies their negative
    logits (Keskar et al. 2019, arXiv:1909.05858)."""

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
        if not MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}; it must lie between {MIN_PENALTY} and "
                f"{MAX_PENALTY:.0f} (1 does nothing)."
            )

    def draw(self, logits: Tensor, seen: Collection[int], generator: torch.Generator) -> int:
        """Draw one id from logits (vocabulary,) on the CPU, by `generator`. `seen` holds the ids of the text so far.

        Raises CheckpointError for logits that are not numbers, such as those of a damaged model.
        """
        if self.temperature == 0:
            # NumPy's argmax takes a tenth of the time of torch's.
            return int(self._penalise(logits, seen).numpy().argmax())
        # Inverting the cumulative distribution takes a fifth of the time of torch.multinomial for GPT-2's vocabulary.
        cumulative = self.weights(logits, seen).double().cumsum(0)  # (vocabulary,)
        if not math.isfinite(total := float(cumulative[-1])):
            raise CheckpointError(NOT_NUMBERS)
        target = (1 - torch.rand((), generator=generator, dtype=torch.float64)) * total  # ()
        return int(torch.searchsorted(cumulative, target))

    def draw_rows(
        self, logits: Tensor, seen: Sequence[Collection[int]], generators: Sequence[torch.Generator]
    ) -> list[int]:
        """Draw an id from each row of logits (rows, vocabulary), on their device: those that `draw` would draw.

        On a GPU, the CPU waits once for all rows, and no logits are copied. The id of a row is -1 if its logits are not
        numbers.
        """
        if self.repetition_penalty != 1:
            logits = torch.stack([self._penalise(*row) for row in zip(logits, seen)])  # (rows, vocabulary)
        if self.temperature == 0:
            return logits.argmax(dim=1).tolist()
        cumulative = self._filter(logits).double().cumsum(1)  # (rows, vocabulary)
        totals = cumulative[:, -1:]  # (rows, 1)
        uniform = torch.stack([torch.rand(1, generator=own, dtype=torch.float64) for own in generators])  # (rows, 1)
        ids = torch.searchsorted(cumulative, (1 - uniform).to(logits.device) * totals)  # (rows, 1)
        return torch.where(totals.isfinite(), ids, -1).flatten().tolist()

    def weights(self, logits: Tensor, seen: Collection[int]) -> Tensor:
        """Return (vocabulary,) weights to draw by, for a temperature above 0: 0 for ids that are filtered out.

        They are proportional to the probabilities and need not sum to 1.
        """
        return self._filter(self._penalise(logits, seen))

    def _filter(self, logits: Tensor) -> Tensor:
        """Apply all settings but the repetition penalty: logits (..., vocabulary) -> weights (..., vocabulary)."""
        scaled = (logits.float() - logits.amax(-1, keepdim=True)) / max(self.temperature, _LEAST)
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[..., -1:], -math.inf)
        weights = torch.softmax(scaled, dim=-1)  # (..., vocabulary)
        if not (self.min_p or self.top_p < 1):
            return weights
        least = self.min_p * weights.amax(-1, keepdim=True)  # (..., 1)
        if self.top_p < 1:
            least = least.maximum(self._least_of_nucleus(weights))
        return weights.masked_fill(weights < least, 0.0)

    def _penalise(self, logits: Tensor, seen: Collection[int]) -> Tensor:
        """Apply the repetition penalty: logits (vocabulary,) -> (vocabulary,)."""
        if self.repetition_penalty == 1 or not seen:
            return logits
        ids = torch.tensor(sorted(set(seen)), device=logits.device)  # (seen,)
        chosen = logits[ids]  # (seen,)
        penalised = torch.where(chosen < 0, chosen * self.repetition_penalty, chosen / self.repetition_penalty)
        return logits.index_put((ids,), penalised)  # (vocabulary,)

    def _least_of_nucleus(self, probabilities: Tensor) -> Tensor:
        """Return the smallest of the probabilities (..., vocabulary) that is needed to reach `top_p`: (..., 1)."""
        if probabilities.device.type == "cpu":  # where NumPy sorts 25 times as fast as torch
            ascending = torch.from_numpy(np.sort(probabilities.numpy()))  # (..., vocabulary)
        else:
            ascending = probabilities.sort(dim=-1).values  # (..., vocabulary)
        needless = ascending.cumsum(-1, dtype=torch.float64) <= 1 - self.top_p  # (..., vocabulary)
        index = needless.sum(-1, keepdim=True).clamp(max=ascending.shape[-1] - 1)  # (..., 1)
        return ascending.gather(-1, index)

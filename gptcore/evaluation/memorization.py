"""How much of its training text a model has memorized: the share of training passages that it completes word for word.

The measure is that of Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", ICLR: the model
reads 50 tokens of its training text, and greedy decoding has to continue with exactly the 50 tokens that follow there.
Repeated text is memorized far more often, so passages that are in the training text once and passages that are there
more often are measured separately. samples.py shows what the model copies if nobody asks it to.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptcore.evaluation.bits_per_byte import BATCH_TOKENS, predict_targets
from gptcore.model.gpt import GPTModel
from gptcore.training.preserve import preserve_training_state

PREFIX_TOKENS = 50
"""Tokens that the model reads, and tokens that it has to continue with, if its context has room for both."""
SAMPLES = 200
"""Most passages of each kind."""
_CANDIDATES = 2**20
_CHUNK_TOKENS = 2**20
_FIRST_TOKENS = 4
"""Almost all passages differ in one of their first tokens. The rest is only predicted for the others."""
_SEED = 20_230_501
_BASE = np.uint64(0x9E37_79B9_7F4A_7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_Z = 1.959964  # of the normal distribution, for a two-sided interval of 95 %

Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Completions:
    """How many of the sampled passages the model completes word for word. Shares are None if none was sampled."""

    sampled: int
    completed: int
    share: float | None
    low: float | None
    """Lower bound of the 95 % interval of the share, by Wilson 1927."""
    high: float | None
    """Upper bound of the same interval."""

    @classmethod
    def count(cls, sampled: int, completed: int) -> "Completions":
        """Compute the share and its interval. For example, 1 of 200 gives 0.005, from 0.0009 to 0.0278."""
        if not sampled:
            return cls(0, 0, None, None, None)
        share, weight = completed / sampled, _Z**2 / sampled
        middle = (share + weight / 2) / (1 + weight)
        radius = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
        return cls(sampled, completed, share, max(0.0, middle - radius), min(1.0, middle + radius))


@dataclass(frozen=True)
class Memorization:
    """What a model has memorized of its training text."""

    prefix_tokens: int
    """Tokens that the model read, and as many that it had to continue with: 50, or half of a shorter context."""
    once: Completions
    """Passages that are in the training text once."""
    repeated: Completions
    """Passages that are in the training text more than once."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Memorization":
        """Read what `dataclasses.asdict` returned."""
        return cls(data["prefix_tokens"], Completions(**data["once"]), Completions(**data["repeated"]))


def measure_memorization(
    model: GPTModel, train_tokens: np.ndarray, eot: int, device: torch.device | str
) -> Memorization:
    """Let the model complete passages of `train_tokens` (tokens,), which may be a memmap, and count the exact ones.

    A passage lies within one document, so it holds no end-of-text id `eot`. The same tokens give the same passages.
    """
    prefix = max(1, min(PREFIX_TOKENS, model.context_length // 2))
    once, repeated = pick_passages(train_tokens, eot, 2 * prefix)

    def count(starts: Starts) -> Completions:
        passages = np.array([train_tokens[start : start + 2 * prefix] for start in starts], np.int64)
        return Completions.count(len(starts), _count_completed(model, passages.reshape(-1, 2 * prefix), device))

    return Memorization(prefix, once=count(once), repeated=count(repeated))


def pick_passages(tokens: np.ndarray, eot: int, length: int) -> tuple[Starts, Starts]:
    """Return (passages,) each: where passages of `length` tokens begin that are in `tokens` once, and more often.

    Takes at most `SAMPLES` different ones of each. All runs of `length` tokens are hashed, and the passages with the
    smallest hashes are taken: a random sample in which every different passage is equally likely, however often it is
    there. Of a long text, only the 2^20 smallest hashes or so are kept and counted. All copies of a passage have the
    same hash, so the counts are exact, up to collisions of 64-bit hashes. One pass, and at most about 100 MB.
    """
    limit = np.uint64(min(2**64 - 1, _CANDIDATES * 2**64 // max(1, len(tokens))))
    kept = list(_hash_passages(tokens, eot, length, limit))
    if not kept:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    hashes, begins = (np.concatenate(arrays) for arrays in zip(*kept))  # (candidates,) each
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)  # (different,) each, by hash
    return begins[first[counts == 1][:SAMPLES]], begins[first[counts > 1][:SAMPLES]]


def _hash_passages(
    tokens: np.ndarray, eot: int, length: int, limit: np.uint64
) -> Iterator[tuple[npt.NDArray[np.uint64], Starts]]:
    """Yield the hashes up to `limit` of runs of `length` tokens without `eot`, and where they begin, (runs,) each.

    The hash is a polynomial modulo 2^64 over random numbers for the ids: a difference of prefix sums.
    """
    random = np.random.Generator(np.random.PCG64(_SEED))
    letters = random.integers(2**64, size=int(tokens.max(initial=0)) + 1, dtype=np.uint64)  # (ids,)
    size = min(len(tokens), _CHUNK_TOKENS + length)
    powers, inverses = (np.cumprod(np.full(size, base), dtype=np.uint64) for base in (_BASE, _INVERSE))  # (size,)
    for start in range(0, len(tokens) - length + 1, _CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS + length - 1])
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(letters[chunk] * powers[: len(chunk)])])
        hashes = (sums[length:] - sums[:-length]) * inverses[: len(sums) - length]  # (all runs,)
        low = np.flatnonzero(hashes <= limit)  # (low runs,)
        ends = np.concatenate([[-1], np.flatnonzero(chunk == eot)])  # (end-of-text ids + 1,)
        last = ends[np.searchsorted(ends, low + length) - 1]  # (low runs,) the last end-of-text id before a run's end
        inside = low[last < low]  # (runs,)
        yield hashes[inside], start + inside


def _count_completed(model: GPTModel, passages: npt.NDArray[np.int64], device: torch.device | str) -> int:
    """Count the passages (passages, 2 * prefix) whose second half greedy decoding adds to the first.

    It does so exactly if each token of the second half is the model's first guess after all tokens before it. So one
    reading of the passage answers the question, and nothing has to be generated.
    """
    prefix = passages.shape[1] // 2
    for continued in (min(_FIRST_TOKENS, prefix), prefix):
        rows = max(1, BATCH_TOKENS // (prefix + continued))
        batches = [passages[begin : begin + rows, : prefix + continued] for begin in range(0, len(passages), rows)]
        are_completed = [_are_completed(model, batch, prefix, device) for batch in batches]
        passages = passages[np.concatenate([np.empty(0, bool), *are_completed])]
    return len(passages)


def _are_completed(
    model: GPTModel, passages: npt.NDArray[np.int64], prefix: int, device: torch.device | str
) -> npt.NDArray[np.bool_]:
    """Return (passages,): whether each token after the prefix is the first guess. `passages` is (passages, tokens)."""
    ids = torch.from_numpy(passages).to(device)
    targets = ids[:, 1:].clone()  # (passages, tokens - 1)
    targets[:, : prefix - 1] = -1
    with preserve_training_state(model):
        _, ranks = predict_targets(model, ids[:, :-1], targets)  # (passages * continued,)
    return np.asarray((ranks.reshape(len(passages), -1) == 0).all(axis=1))

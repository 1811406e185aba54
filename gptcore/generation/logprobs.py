"""Log probabilities of tokens: of those that were drawn, and of a prompt's.

They are the model's own, before temperature, filters and penalties change them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcore.model.gpt import GPTModel, eval_mode

_ROWS = 128
"""Tokens of a prompt whose logits are in memory at once: 26 MB for GPT-2's vocabulary."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text, and how likely the model found it there."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability, or None for the first token of a text, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at its place with their log probabilities, the likeliest first."""


def score_tokens(logits: Tensor, tokens: Sequence[int], top: int) -> list[ScoredToken]:
    """Score each token by its row of logits (tokens, vocabulary), with the `top` likeliest ids of the row."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)  # (tokens, vocabulary)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()  # (tokens,)
    values, ids = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[1])))  # (tokens, top) each
    return [ScoredToken(*row) for row in zip(tokens, own, (tuple(zip(*pair)) for pair in zip(ids, values)))]


@torch.inference_mode()
def score_prompt(model: GPTModel, ids: Sequence[int], top: int) -> list[ScoredToken]:
    """Score every token of a prompt that fits the context by the tokens before it."""
    with eval_mode(model):
        hidden = model.compute_hidden(torch.tensor([ids], device=model.tok_emb.weight.device))[0]  # (tokens, emb_dim)
        scored = [ScoredToken(ids[0])]
        for start in range(0, len(ids) - 1, _ROWS):
            rows = hidden[start : min(start + _ROWS, len(ids) - 1)]  # (chunk, emb_dim)
            scored += score_tokens(model.out_head(rows), ids[start + 1 : start + 1 + len(rows)], top)
    return scored

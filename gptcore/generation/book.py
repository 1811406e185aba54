"""The book's `generate` (chapter 5). See generate.py for ours, which has more settings and yields each id at once."""

import torch
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.generation.generate import choose_likeliest, continue_ids


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """Continue ids (batch, tokens) -> (batch, tokens + at most max_new_tokens).

    Temperature 0 takes the likeliest token. Otherwise a token is drawn from the `top_k` likeliest ones (default: all)
    with torch's global random state, so the same `torch.manual_seed` gives the book's ids. The text ends before
    `eos_id`, in a batch as soon as all rows draw it. Raises as `generate_text_simple` does, and ConfigError for a
    `top_k` below 1.
    """
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be at least 1, or None for the whole vocabulary.")

    def draw(logits: Tensor) -> Tensor:
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature <= 0:
            return choose_likeliest(logits)
        return torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)  # (batch, 1)

    return continue_ids(model, idx, max_new_tokens, context_size, draw, eos_id)

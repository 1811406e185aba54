"""Causal self-attention: the only layer of a GPT in which a token gets information from other tokens.

The projections and their names are the book's (chapter 3). Between them runs PyTorch's fused kernel, so no mask is
stored. Attention with a KV cache is in generation/kv_cache.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.model.overrides import is_untouched

ROTARY_BASE = 10_000.0
QK_SCALE = 1.2
"""Scale of normed queries and keys. Without it, no token could get much more than an equal share of attention."""


class Rotary(nn.Module):
    """Positions as rotations: the angle between a query and a key changes with their distance, and only with that.

    From Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864. Feature i of
    a head's first half and feature i of its second half are the two coordinates of plane i.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int) -> None:
        """Compute the cosines and sines for `context_length` positions. Raises ConfigError if `head_dim` is odd."""
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"rotary positions need heads of even width, found {head_dim}; choose another n_heads.")
        rates = ROTARY_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,)
        angles = torch.outer(torch.arange(context_length), rates)  # (context_length, head_dim / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate `x` (batch, heads, tokens, head_dim) by `positions` (batch, tokens), which default to 0, 1, 2, ..."""
        if positions is None:
            return rotate(x, self.cos[: x.shape[2]], self.sin[: x.shape[2]])
        return rotate(x, *self.rotation_at(positions))

    def rotation_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (batch, 1, tokens, head_dim / 2), of `positions` (batch, tokens)."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every plane of `x` (batch, heads, tokens, head_dim) by its angle.

    The last dimension of `cos` and `sin` is head_dim / 2; the other dimensions broadcast.
    """
    left, right = x.chunk(2, dim=3)  # (batch, heads, tokens, head_dim / 2) each
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=3)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with several heads: every token attends to itself and to the tokens before it."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        *,
        out_bias: bool = True,
        rotary: bool = False,
        qk_norm: bool = False,
    ) -> None:
        """Create the projections. The parameters up to `qkv_bias` are the book's.

        `rotary` rotates queries and keys by their positions. `qk_norm` scales each head of a query or key to a fixed
        length. Raises ConfigError if `d_out` is not divisible by `num_heads`, or if `rotary` heads have an odd width.
        """
        super().__init__()
        if d_out % num_heads:
            raise ConfigError(f"d_out {d_out} is not divisible by num_heads {num_heads}; choose a multiple of it.")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.context_length = context_length
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out, bias=out_bias)
        self.dropout = nn.Dropout(dropout)
        self.rotary = Rotary(self.head_dim, context_length) if rotary else None
        self.qk_norm = qk_norm

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (batch, tokens, d_in) -> (batch, tokens, d_out).

        Raises ConfigError if there are more tokens than `context_length`.
        """
        check_length(x.shape[1], self.context_length)
        # Queries, keys and values are (batch, heads, tokens, head_dim) each.
        queries, keys, values = (self._split_heads(project(x)) for project in (self.W_query, self.W_key, self.W_value))
        if self.qk_norm:
            queries, keys = norm_heads(queries), norm_heads(keys)
        if self.rotary is not None:
            queries, keys = self.rotary(queries), self.rotary(keys)
        context = self._attend(queries, keys, values)  # (batch, heads, tokens, head_dim)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # (batch, tokens, d_out)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_out) -> (batch, heads, tokens, head_dim)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if is_untouched(self.dropout, nn.Dropout):
            dropout = self.dropout.p if self.dropout.training else 0.0
            return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        # The fused kernel never calls the dropout module, so a hooked or replaced one gets the attention weights here.
        scores = queries @ keys.transpose(2, 3) * self.head_dim**-0.5  # (batch, heads, tokens, tokens)
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        return self.dropout(torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)) @ values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}mask", None)  # the book stores its causal mask as a buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


def norm_heads(x: Tensor) -> Tensor:
    """Scale each head of `x` (..., head_dim) to a fixed length.

    From Henry et al. 2020, "Query-Key Normalization", arXiv:2010.04245.
    """
    return QK_SCALE * F.rms_norm(x, x.shape[-1:])


def check_length(tokens: int, longest: int) -> None:
    """Raise ConfigError if there are more `tokens` than `longest`, the context length."""
    if tokens > longest:
        raise ConfigError(
            f"a sequence of {tokens} tokens is longer than the model's context of {longest}; pass only its last "
            f"{longest} tokens, or build the model with a larger context_length."
        )

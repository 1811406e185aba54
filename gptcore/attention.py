"""Causal self-attention: the only part of a GPT in which a token learns of others.

The projections and their names are those of Raschka's "Build a Large Language Model (From Scratch)", chapter 3. Inside
stands PyTorch's fused kernel, and no mask is stored.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.untouched import is_untouched

_ROTARY_BASE = 10_000.0
_QK_SCALE = 1.2
"""Of normed queries and keys: without it, no token could get much more than its equal share of attention."""


class Rotary(nn.Module):
    """Positions as rotations, so that a query and a key meet at an angle that depends on their distance alone.

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864. The halves of a
    head are the two coordinates of each plane.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int) -> None:
        """Raises ConfigError for a head of odd width."""
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"rotary positions need heads of even width, found {head_dim}; choose another n_heads.")
        rates = _ROTARY_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(context_length), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """(batch, heads, tokens, head_dim), turned. `positions` (batch, tokens) are 0, 1, 2, ... where not given."""
        if positions is None:
            return turn(x, self.cos[: x.shape[2]], self.sin[: x.shape[2]])
        return turn(x, *self.at(positions))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch, 1, tokens, head_dim / 2) of positions (batch, tokens)."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim), every plane turned by its angle."""
    left, right = x.chunk(2, dim=3)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=3)


class MultiHeadAttention(nn.Module):
    """Causal self-attention of several heads: every token looks at itself and at those before it."""

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
        """`rotary` turns queries and keys by their positions, `qk_norm` brings each one's head to a fixed length.

        Raises ConfigError where `d_out` is not divisible by `num_heads`, or `rotary` heads have an odd width.
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
        """(batch, tokens, d_in) -> (batch, tokens, d_out).

        Raises ConfigError where the tokens are more than `context_length`.
        """
        check_length(x.shape[1], self.context_length)
        queries, keys, values = (self._heads(project(x)) for project in (self.W_query, self.W_key, self.W_value))
        if self.qk_norm:
            queries, keys = norm_heads(queries), norm_heads(keys)
        if self.rotary is not None:
            queries, keys = self.rotary(queries), self.rotary(keys)
        return self.out_proj(self._attend(queries, keys, values).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if is_untouched(self.dropout, nn.Dropout):
            dropout = self.dropout.p if self.dropout.training else 0.0
            return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        # The fused kernel never calls the dropout module, so one that is hooked or replaced gets the weights here.
        scores = queries @ keys.transpose(2, 3) * self.head_dim**-0.5
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        return self.dropout(torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)) @ values

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}mask", None)  # the book stores its causal mask as a buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


def norm_heads(x: Tensor) -> Tensor:
    """(..., head_dim), each head to a fixed length (Henry et al. 2020, "Query-Key Normalization", arXiv:2010.04245)."""
    return _QK_SCALE * F.rms_norm(x, x.shape[-1:])


def check_length(tokens: int, longest: int) -> None:
    """Raises ConfigError if there are more tokens than there is room for."""
    if tokens > longest:
        raise ConfigError(
            f"a sequence of {tokens} tokens is longer than the model's context of {longest}; give it the last ones "
            "only, or build it with a larger context_length."
        )

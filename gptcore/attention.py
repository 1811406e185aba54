"""Causal self-attention: the only part of a GPT in which a token learns of others. With the cache that remembers them.

The projections and their names are those of Raschka's "Build a Large Language Model (From Scratch)", chapter 3. Inside
stands PyTorch's fused kernel, and no mask is stored.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.untouched import is_untouched

if TYPE_CHECKING:
    from gptcore.model import GPTModel

_ROTARY_BASE = 10_000.0
_QK_SCALE = 1.2
"""Of normed queries and keys: without it, no token could get much more than its equal share of attention."""


class KVCache:
    """Keys and values of the tokens seen so far, one allocation for all layers. To be used without gradients."""

    def __init__(self, model: "GPTModel", batch_size: int, max_tokens: int | None = None) -> None:
        """Room for `max_tokens` tokens (at most and by default the model's context) of `batch_size` texts."""
        attention: MultiHeadAttention = model.trf_blocks[0].att  # type: ignore[assignment]
        tokens = min(max_tokens or model.context_length, model.context_length)
        shape = (len(model.trf_blocks), 2, batch_size, attention.num_heads, tokens, attention.head_dim)
        weight = model.tok_emb.weight
        self.tensor = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        """(layers, 2, batch, heads, tokens, head_dim): keys at [:, 0], values at [:, 1]."""
        self.length = 0
        """Tokens seen. Set it to 0 to start again."""

    @property
    def max_tokens(self) -> int:
        """Tokens there is room for."""
        return self.tensor.shape[4]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values (batch, heads, tokens, head_dim) of a layer; returns those of all tokens.

        `length` stays as it is until every layer has stored its own.
        """
        end = self.length + keys.shape[2]
        store = self.tensor[layer]
        store[0, :, :, self.length : end] = keys
        store[1, :, :, self.length : end] = values
        return store[0, :, :, :end], store[1, :, :, :end]


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

    def forward(self, x: Tensor, past: int) -> Tensor:
        """(batch, heads, tokens, head_dim), the first of them at position `past`, turned."""
        cos, sin = (table[past : past + x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        left, right = x.chunk(2, dim=3)
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

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(batch, tokens, d_in) -> (batch, tokens, d_out). With a cache, `x` follows the tokens already in it.

        Raises ConfigError where the tokens are more than `context_length`.
        """
        past = 0 if cache is None else cache.length
        check_length(past + x.shape[1], self.context_length)
        queries, keys, values = (self._heads(project(x)) for project in (self.W_query, self.W_key, self.W_value))
        if self.qk_norm:
            queries, keys = (_QK_SCALE * F.rms_norm(each, (self.head_dim,)) for each in (queries, keys))
        if self.rotary is not None:
            queries, keys = self.rotary(queries, past), self.rotary(keys, past)
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
        return self.out_proj(self._attend(queries, keys, values).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        new, total = queries.shape[2], keys.shape[2]
        if not is_untouched(self.dropout, nn.Dropout):
            # The fused kernel never calls the dropout module, so one that is hooked or replaced gets the weights here.
            scores = queries @ keys.transpose(2, 3) * self.head_dim**-0.5
            scores = scores.masked_fill(~_visible(new, total, scores.device), -torch.inf)
            return self.dropout(torch.softmax(scores, dim=-1)) @ values
        mask = None if new in (1, total) else _visible(new, total, queries.device)
        dropout = self.dropout.p if self.dropout.training else 0.0
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=new == total
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}mask", None)  # the book stores its causal mask as a buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


def _visible(new: int, total: int, device: torch.device) -> Tensor:
    """(new, total): True where the i-th of the last `new` tokens may look."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


def check_length(tokens: int, longest: int) -> None:
    """Raises ConfigError if there are more tokens than there is room for."""
    if tokens > longest:
        raise ConfigError(
            f"a sequence of {tokens} tokens is longer than the {longest} that there is room for (the model's context "
            "or its cache); give it the last ones only, or build it with a larger context_length."
        )

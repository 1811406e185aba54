"""The model: a GPT-2 in the words of Raschka's "Build a Large Language Model (From Scratch)", chapters 3 and 4.

Names, creation order and initial values of the parameters are the book's, so its state dicts load here and the same
seed gives the same model. Inside, attention and norms use PyTorch's fused kernels, no mask is stored, and a KVCache
lets `forward` go on where it stopped. `is_untouched` and `is_ours` tell whether a user has hooked, wrapped or replaced
a part: whoever takes a short cut past `forward` asks them first. Losses and sampling live elsewhere.
"""

import contextlib
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gptcore.errors import ConfigError

_COUNTS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, so that computing what `kind` computes is the same as calling it.

    False for subclasses and parametrised modules (which are subclasses too), and for modules that are hooked, compiled
    in place or given a `forward` of their own.
    """
    if type(module) is not kind or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    return not _has_any_global_hook() and not any(getattr(module, hooks) for hooks in _HOOKS)


def is_ours(model: nn.Module) -> bool:
    """Whether `model` is a GPTModel of which every part is untouched, so that it may be run in pieces with a cache."""
    return type(model) is GPTModel and all(
        type(part) in _PARTS and is_untouched(part, type(part)) for part in model.modules()
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches every part of `model` to eval mode and afterwards each one back to the mode that it was in."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


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


class MultiHeadAttention(nn.Module):
    """Causal self-attention of several heads: every token looks at itself and at those before it."""

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        """Raises ConfigError where `d_out` is not divisible by `num_heads`."""
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
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(batch, tokens, d_in) -> (batch, tokens, d_out). With a cache, `x` follows the tokens already in it.

        Raises ConfigError where the tokens are more than `context_length`.
        """
        past = 0 if cache is None else cache.length
        _check_length(past + x.shape[1], self.context_length)
        queries, keys, values = (self._heads(project(x)) for project in (self.W_query, self.W_key, self.W_value))
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


class LayerNorm(nn.Module):
    """Each token's features to mean 0 and variance 1, then a learned scale and shift."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """The tanh approximation of GELU that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Reads `emb_dim`. Raises ConfigError where it is missing or out of range."""
        super().__init__()
        _check(cfg, "emb_dim")
        width = cfg["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward net, each behind a norm and beside a shortcut."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Reads all of the seed's keys but `vocab_size` and `n_layers`. Raises ConfigError as GPTModel does."""
        super().__init__()
        _check(cfg, "context_length", "emb_dim", "n_heads", "drop_rate", "qkv_bias")
        width = cfg["emb_dim"]
        self.att = MultiHeadAttention(
            width, width, cfg["context_length"], cfg["drop_rate"], cfg["n_heads"], cfg["qkv_bias"]
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(batch, tokens, emb_dim) -> (batch, tokens, emb_dim)."""
        normed = self.norm1(x)
        attended = self.att(normed) if cache is None else self.att(normed, cache, layer)
        x = x + self.drop_shortcut(attended)
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Built from the seed's dict: vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias.

        Other keys are ignored. Raises ConfigError naming the key that is missing, out of range or in contradiction.
        """
        super().__init__()
        _check(cfg, *_COUNTS, "drop_rate", "qkv_bias")
        width = cfg["emb_dim"]
        self.context_length = cfg["context_length"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], width)
        self.pos_emb = nn.Embedding(self.context_length, width)
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*(TransformerBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = LayerNorm(width)
        self.out_head = nn.Linear(width, cfg["vocab_size"], bias=False)

    def forward(self, in_idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Ids (batch, tokens) -> logits (batch, tokens, vocab_size). With a cache, the ids follow those already seen.

        Raises ConfigError where the tokens, seen ones included, are more than the context, and on the CPU where an id
        is outside the vocabulary. (On a GPU that would cost a synchronisation per call: CUDA's own assertion says it.)
        """
        return self.out_head(self.hidden(in_idx, cache))

    def hidden(self, in_idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """All of `forward` but the head: ids (batch, tokens) -> (batch, tokens, emb_dim). Raises as `forward` does."""
        past = 0 if cache is None else cache.length
        end = past + in_idx.shape[1]
        _check_length(end, self.context_length if cache is None else cache.max_tokens)
        positions = torch.arange(past, end, device=in_idx.device)
        x = self.drop_emb(self._embed(in_idx) + self.pos_emb(positions))
        if cache is None:
            x = self.trf_blocks(x)
        else:
            for layer, block in enumerate(self.trf_blocks):
                x = block(x, cache, layer)
            cache.length = end
        return self.final_norm(x)

    def _embed(self, in_idx: Tensor) -> Tensor:
        try:
            return self.tok_emb(in_idx)
        except IndexError:
            vocab_size = len(self.tok_emb.weight)
            wrong = in_idx[(in_idx < 0) | (in_idx >= vocab_size)]
            if not len(wrong):
                raise
            raise ConfigError(
                f"token id {int(wrong[0])} is outside the model's vocabulary of {vocab_size} ids; "
                "encode the text with the tokenizer that the model was built for."
            ) from None


_PARTS = (
    *(GPTModel, TransformerBlock, MultiHeadAttention, FeedForward, LayerNorm, GELU),
    *(nn.Embedding, nn.Linear, nn.Dropout, nn.Sequential),
)


def _check_length(tokens: int, longest: int) -> None:
    if tokens > longest:
        raise ConfigError(
            f"a sequence of {tokens} tokens is longer than the {longest} that there is room for (the model's context "
            "or its cache); give it the last ones only, or build it with a larger context_length."
        )


def _check(cfg: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in cfg]
    if missing:
        raise ConfigError(f"the model's cfg lacks {', '.join(missing)}; it needs {', '.join(keys)}.")
    for key in keys:
        if key in _COUNTS and (isinstance(cfg[key], bool) or not isinstance(cfg[key], Integral) or cfg[key] < 1):
            raise ConfigError(f"the model's cfg has {key} {cfg[key]!r}; it must be a whole number, at least 1.")
    if "drop_rate" in keys and not (isinstance(cfg["drop_rate"], int | float) and 0 <= cfg["drop_rate"] <= 1):
        raise ConfigError(f"the model's cfg has drop_rate {cfg['drop_rate']!r}; it must lie between 0 and 1.")
    if "n_heads" in keys and cfg["emb_dim"] % cfg["n_heads"]:
        raise ConfigError(
            f"the model's cfg has emb_dim {cfg['emb_dim']}, which is not divisible by n_heads {cfg['n_heads']}."
        )

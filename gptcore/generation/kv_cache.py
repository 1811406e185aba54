"""Decoders: they read several texts token by token and return the logits of the next token of each.

`Decoder` is for a GPTModel with every component untouched. It has a KV cache: the keys and values of the tokens read so
far. It also calls the functions inside the modules instead of the modules: 1.24 times as many tokens per second as with
module calls at shape M of bench/, 1.13 times at L. `UncachedDecoder` is for any other model, and reads every whole
window again for each token. Both return the logits that the model itself returns for the same window, up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.generation.quantize import Int8Slice
from gptcore.model.attention import MultiHeadAttention, norm_heads, rotate
from gptcore.model.gpt import FeedForward, GPTModel, TransformerBlock, eval_mode
from gptcore.processor import choose_min_rows

CacheWriter = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes the number of a layer and its new keys and values, each (rows, heads, tokens, head_dim). Stores them, and
returns the keys and values to attend to, each (rows, heads, seen, head_dim)."""


class Decoder:
    """A GPTModel with a KV cache of one row per text.

    Rows are numbered from 0 without gaps. Dropout is never applied. Call it without gradients.

    Example: `logits = decoder.prefill([[1, 2, 3]])`, then `logits = decoder.decode([int(logits[0].argmax())])`.
    """

    def __init__(self, model: GPTModel, rows: int, max_tokens: int | None = None) -> None:
        """Allocate a cache for `rows` texts of `max_tokens` tokens each (default and maximum: the model's context)."""
        blocks = cast("Sequence[TransformerBlock]", model.trf_blocks)
        attention, weight = blocks[0].att, model.tok_emb.weight
        tokens = min(max_tokens or model.context_length, model.context_length)
        shape = (len(blocks), 2, rows, attention.num_heads, tokens, attention.head_dim)
        self._cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        """(layers, 2, rows, heads, tokens, head_dim): keys at [:, 0], values at [:, 1]. A row is filled from its
        beginning. The mask hides the rest, but the rest is zeroed: 0 times NaN would be NaN."""
        self._lengths: list[int] = []
        """Tokens in each row."""
        self._model = model
        self._blocks = [_Block(block) for block in blocks]
        self._final_norm = model.final_norm.forward
        self._head = _choose_multiply(model.out_head)
        self._rotary = attention.rotary

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read each prompt into a new row -> logits (prompts, vocabulary) of the token that follows each prompt.

        The prompts are read together. Shorter ones are padded at their end, where causal attention does not look.
        """
        first, lengths = len(self._lengths), [len(prompt) for prompt in prompts]
        longest, device = max(lengths), self._cache.device
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, device=device)  # (prompts, longest)
        positions = torch.arange(longest, device=device)[None]  # (1, longest)

        def store(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            # (2, prompts, heads, longest, head_dim)
            rows = self._cache[layer, :, first : first + len(prompts), :, :longest]
            rows[0], rows[1] = keys, values
            return keys, values

        hidden = self._read(ids, positions, store, is_causal=longest > 1)  # (prompts, longest, emb_dim)
        self._lengths += lengths
        last = torch.tensor(lengths, device=device) - 1  # (prompts,)
        hidden = hidden[torch.arange(len(prompts), device=device), last]  # (prompts, emb_dim)
        return self._head(self._final_norm(hidden))  # (prompts, vocabulary)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token in every row -> logits (rows, vocabulary) of the token that follows."""
        positions, store, mask = self._plan_decode_step()
        ids = torch.tensor(tokens, device=self._cache.device)[:, None]  # (rows, 1)
        hidden = self._read(ids, positions, store, mask)  # (rows, 1, emb_dim)
        self._lengths = [length + 1 for length in self._lengths]
        return self._head(self._final_norm(hidden[:, 0]))  # (rows, vocabulary)

    def _plan_decode_step(self) -> tuple[Tensor, CacheWriter, Tensor | None]:
        """Return the positions (rows or 1, 1) of the next tokens, a cache writer for them, and the attention mask.

        If all rows have the same length, no mask is needed and the writes are plain copies.
        """
        lengths, device = self._lengths, self._cache.device
        count, end = len(lengths), max(lengths) + 1
        # Views of all layers are made at once: keys at even indices, values at odd ones.
        seen = self._cache[:, :, :count, :, :end].flatten(0, 1).unbind()  # each (rows, heads, end, head_dim)
        if min(lengths) + 1 == end:
            ends = self._cache[:, :, :count, :, end - 1].flatten(0, 1).unbind()  # each (rows, heads, head_dim)

            def store_at_one_position(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                ends[2 * layer].copy_(keys[:, :, 0])
                ends[2 * layer + 1].copy_(values[:, :, 0])
                return seen[2 * layer], seen[2 * layer + 1]

            return torch.tensor([end - 1], device=device)[:, None], store_at_one_position, None

        positions = torch.tensor(lengths, device=device)[:, None]  # (rows, 1)
        mask = (torch.arange(end, device=device) <= positions)[:, None, None]  # (rows, 1, 1, end)
        rows, columns = torch.arange(count, device=device), positions[:, 0]  # (rows,) each

        def store_at_own_positions(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            seen[2 * layer][rows, :, columns] = keys[:, :, 0]
            seen[2 * layer + 1][rows, :, columns] = values[:, :, 0]
            return seen[2 * layer], seen[2 * layer + 1]

        return positions, store_at_own_positions, mask

    def drop(self, row: int) -> None:
        """Remove a row. The last row moves to its index."""
        length = self._lengths.pop()
        if row < len(self._lengths):
            self._cache[:, :, row, :, :length] = self._cache[:, :, len(self._lengths), :, :length]
            self._lengths[row] = length

    def _read(
        self, ids: Tensor, positions: Tensor, store: CacheWriter, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Ids (rows, tokens) at `positions` (rows or 1, tokens) -> (rows, tokens, emb_dim), before the final norm."""
        model = self._model
        x = model.embed(ids)  # (rows, tokens, emb_dim), as every x below
        if model.pos_emb is not None:
            x = x + F.embedding(positions, model.pos_emb.weight)
        if model.emb_norm is not None:
            x = model.emb_norm.forward(x)
        # Cosines and sines, each (rows or 1, 1, tokens, head_dim / 2).
        rotation = None if self._rotary is None else self._rotary.rotation_at(positions)
        for layer, block in enumerate(self._blocks):
            queries, keys, values = block.project(x, rotation)  # each (rows, heads, tokens, head_dim)
            keys, values = store(layer, keys, values)  # each (rows, heads, seen, head_dim)
            # (rows, heads, tokens, head_dim)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
            x = x + block.out(attended.transpose(1, 2).flatten(2))
            x = x + block.down(block.activation(block.up(block.norm2(x))))
        return x


class _Block:
    """The functions inside a transformer block."""

    def __init__(self, block: TransformerBlock) -> None:
        attention: MultiHeadAttention = block.att
        feed_forward: FeedForward = block.ff
        up, activation, down = feed_forward.layers
        self.norm1, self.norm2, self.activation = block.norm1.forward, block.norm2.forward, activation.forward
        self.out = _choose_multiply(attention.out_proj)
        self.up, self.down = _choose_multiply(up), _choose_multiply(down)
        self._project = _choose_projection(attention)
        self._qk_norm, self._shape = attention.qk_norm, (attention.num_heads, attention.head_dim)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, tokens, emb_dim) -> queries, keys and values, each (rows, heads, tokens, head_dim)."""
        normed, shape = self.norm1(x), (*x.shape[:2], *self._shape)  # (rows, tokens, emb_dim)
        queries, keys, values = (projected.view(shape).transpose(1, 2) for projected in self._project(normed))
        if self._qk_norm:
            queries, keys = norm_heads(queries), norm_heads(keys)
        if rotation is not None:
            queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        return queries, keys, values


def _choose_projection(attention: MultiHeadAttention) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return the function from (..., emb_dim) to queries, keys and values, each (..., emb_dim)."""
    if isinstance(attention.W_query, Int8Slice):
        fused = attention.W_query.fused.forward
        return lambda x: fused(x).chunk(3, dim=-1)
    query, key, value = (_choose_multiply(linear) for linear in (attention.W_query, attention.W_key, attention.W_value))
    return lambda x: (query(x), key(x), value(x))


def _choose_multiply(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of a linear `layer`, (..., in) -> (..., out), by the library that is faster for few rows."""
    if type(layer) is not nn.Linear:
        return layer.forward
    weight, bias = layer.weight, layer.bias
    has_onednn = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    rows = choose_min_rows(weight.numel()) if has_onednn else None
    if rows is None:
        return lambda x: F.linear(x, weight, bias)
    least = rows * weight.shape[1]
    onednn: Any = torch.ops.mkldnn._linear_pointwise.default

    def multiply(x: Tensor) -> Tensor:
        if x.numel() < least:
            return F.linear(x, weight, bias)
        return onednn(x, weight, bias, "none", [], "")

    return multiply


class UncachedDecoder:
    """The interface of Decoder for any model that maps ids (1, tokens) to logits (1, tokens, vocabulary).

    The model is called in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._windows: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts as `Decoder.prefill` does -> logits (prompts, vocabulary)."""
        windows = [list(prompt) for prompt in prompts]
        logits = self._predict(windows)
        self._windows += windows
        return logits

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token in every row, as `Decoder.decode` does -> logits (rows, vocabulary)."""
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        return self._predict(self._windows)

    def drop(self, row: int) -> None:
        """Remove a row. The last row moves to its index."""
        last = self._windows.pop()
        if row < len(self._windows):
            self._windows[row] = last

    def _predict(self, windows: Sequence[Sequence[int]]) -> Tensor:
        """Return logits (windows, vocabulary) of the token that follows each window."""
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        with eval_mode(self._model):
            return torch.cat([self._model(torch.tensor([window], device=device))[:, -1] for window in windows])

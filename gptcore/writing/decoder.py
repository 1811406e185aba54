"""A model that reads text token by token: the keys and values of what it has read are kept, for several texts at once.

`Decoder` is for our own models, of which every part is untouched. It takes the model apart into the functions of its
parts and calls those, which spares the cost of calling modules: 1.24 times as many tokens per second at shape M of
bench/ (1.13 at L). `WholeWindows` is for any other model, which reads its whole window again for every token. Both
give the logits that the model itself gives for the same window, up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.attention import MultiHeadAttention, norm_heads, turn
from gptcore.model import FeedForward, GPTModel, TransformerBlock, eval_mode
from gptcore.writing.quantize import Int8Share

_SKINNY, _LARGE = 4, 2**20
"""From so many rows on, and for weights of so many numbers (more than a core's cache holds), oneDNN multiplies faster
than MKL: 1.3 to 2 times for GPT-2's matrices at 8 rows, as fast at 32. Elsewhere MKL does, up to twice as fast."""

Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a layer, stores new keys and values (rows, heads, tokens, head_dim); returns those to attend to."""


class Decoder:
    """Texts side by side, one row each, and what a GPTModel of ours predicts to follow them.

    Rows are numbered from 0 without gaps. The model's dropout is never applied. To be used without gradients.
    """

    def __init__(self, model: GPTModel, rows: int, max_tokens: int | None = None) -> None:
        """Room for `rows` texts of `max_tokens` tokens each, at most and by default the model's context."""
        blocks = cast("Sequence[TransformerBlock]", model.trf_blocks)
        attention, weight = blocks[0].att, model.tok_emb.weight
        tokens = min(max_tokens or model.context_length, model.context_length)
        shape = (len(blocks), 2, rows, attention.num_heads, tokens, attention.head_dim)
        self._store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        """Keys at [:, 0], values at [:, 1]. A row's tokens stand at its beginning. What stands behind them is never
        looked at, but 0 times what is no number would be none."""
        self._lengths: list[int] = []
        self._model = model
        self._blocks = [_Block(block) for block in blocks]
        self._final_norm = model.final_norm.forward
        self._head = _linear(model.out_head)
        self._rotary = attention.rotary

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts, each into a new row -> logits (prompts, vocabulary) of the token that follows each.

        They are read together, the shorter ones followed by ids that no token of a prompt can see.
        """
        first, lengths = len(self._lengths), [len(prompt) for prompt in prompts]
        longest, device = max(lengths), self._store.device
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)

        def remember(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            rows = self._store[layer, :, first : first + len(prompts), :, :longest]
            rows[0], rows[1] = keys, values
            return keys, values

        hidden = self._read(ids, torch.arange(longest, device=device)[None], remember, is_causal=longest > 1)
        self._lengths += lengths
        last = torch.tensor(lengths, device=device) - 1
        return self._head(self._final_norm(hidden[torch.arange(len(prompts), device=device), last]))

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Reads one more token in every row -> logits (rows, vocabulary) of the one that follows."""
        lengths, device = self._lengths, self._store.device
        count, end = len(lengths), max(lengths) + 1
        ends_alike = min(lengths) + 1 == end
        past = torch.tensor([end - 1] if ends_alike else lengths, device=device)[:, None]
        # Views of all layers are made at once: keys at even places, values at odd ones.
        seen = self._store[:, :, :count, :, :end].flatten(0, 1).unbind()
        if ends_alike:
            mask, places = None, self._store[:, :, :count, :, end - 1].flatten(0, 1).unbind()
        else:
            mask, places = (torch.arange(end, device=device) <= past)[:, None, None], seen
            rows, ends = torch.arange(count, device=device), past[:, 0]

        def remember(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            for place, new in ((2 * layer, keys[:, :, 0]), (2 * layer + 1, values[:, :, 0])):
                if ends_alike:
                    places[place].copy_(new)
                else:
                    places[place][rows, :, ends] = new
            return seen[2 * layer], seen[2 * layer + 1]

        hidden = self._read(torch.tensor(tokens, device=device)[:, None], past, remember, mask)
        self._lengths = [length + 1 for length in lengths]
        return self._head(self._final_norm(hidden[:, 0]))

    def drop(self, row: int) -> None:
        """Forgets a row. The last one moves into its place."""
        length = self._lengths.pop()
        if row < len(self._lengths):
            self._store[:, :, row, :, :length] = self._store[:, :, len(self._lengths), :, :length]
            self._lengths[row] = length

    def _read(
        self, ids: Tensor, positions: Tensor, remember: Remember, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Ids (rows, tokens) at `positions` (rows or 1, tokens) -> (rows, tokens, emb_dim), before the last norm."""
        model = self._model
        x = model.embed(ids)
        if model.pos_emb is not None:
            x = x + F.embedding(positions, model.pos_emb.weight)
        if model.emb_norm is not None:
            x = model.emb_norm.forward(x)
        rotation = None if self._rotary is None else self._rotary.at(positions)
        for layer, block in enumerate(self._blocks):
            queries, keys, values = block.heads(x, rotation)
            keys, values = remember(layer, keys, values)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
            x = x + block.out(attended.transpose(1, 2).flatten(2))
            x = x + block.down(block.activation(block.up(block.norm2(x))))
        return x


class _Block:
    """A block's parts as functions."""

    def __init__(self, block: TransformerBlock) -> None:
        attention: MultiHeadAttention = block.att
        feed_forward: FeedForward = block.ff
        up, activation, down = feed_forward.layers
        self.norm1, self.norm2, self.activation = block.norm1.forward, block.norm2.forward, activation.forward
        self.out, self.up, self.down = (_linear(part) for part in (attention.out_proj, up, down))
        self._project = _projection(attention)
        self._qk_norm, self._shape = attention.qk_norm, (attention.num_heads, attention.head_dim)

    def heads(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, tokens, emb_dim) -> queries, keys and values, each (rows, heads, tokens, head_dim)."""
        normed, shape = self.norm1(x), (*x.shape[:2], *self._shape)
        queries, keys, values = (each.view(shape).transpose(1, 2) for each in self._project(normed))
        if self._qk_norm:
            queries, keys = norm_heads(queries), norm_heads(keys)
        if rotation is not None:
            queries, keys = turn(queries, *rotation), turn(keys, *rotation)
        return queries, keys, values


def _projection(attention: MultiHeadAttention) -> Callable[[Tensor], Sequence[Tensor]]:
    """What makes queries, keys and values."""
    if isinstance(attention.W_query, Int8Share):
        whole = attention.W_query.whole.forward
        return lambda x: whole(x).chunk(3, dim=-1)
    query, key, value = (_linear(part) for part in (attention.W_query, attention.W_key, attention.W_value))
    return lambda x: (query(x), key(x), value(x))


def _linear(part: nn.Module) -> Callable[[Tensor], Tensor]:
    """What `part` computes, by whichever library is fast for so few rows."""
    if type(part) is not nn.Linear:
        return part.forward
    weight, bias = part.weight, part.bias
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not on_cpu or weight.numel() < _LARGE:
        return lambda x: F.linear(x, weight, bias)
    onednn: Any = torch.ops.mkldnn._linear_pointwise.default

    def multiply(x: Tensor) -> Tensor:
        if x.numel() < _SKINNY * x.shape[-1]:
            return F.linear(x, weight, bias)
        return onednn(x, weight, bias, "none", [], "")

    return multiply


class WholeWindows:
    """The same for any model that maps ids (1, tokens) to logits (1, tokens, vocabulary), in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._windows: list[list[int]] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As Decoder.begin."""
        windows = [list(prompt) for prompt in prompts]
        self._windows += windows
        return self._logits(windows)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """As Decoder.extend."""
        for window, token in zip(self._windows, tokens, strict=True):
            window.append(token)
        return self._logits(self._windows)

    def drop(self, row: int) -> None:
        """As Decoder.drop."""
        last = self._windows.pop()
        if row < len(self._windows):
            self._windows[row] = last

    def _logits(self, windows: Sequence[Sequence[int]]) -> Tensor:
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        with eval_mode(self._model):
            return torch.cat([self._model(torch.tensor([window], device=device))[:, -1] for window in windows])

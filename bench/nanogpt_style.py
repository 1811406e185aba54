"""A GPT-2 in the style of nanoGPT's model.py, for machines that have no checkout of it.

Its parameters have GPT-2's published names. Queries, keys and values come from one product, attention is PyTorch's
fused kernel, and the loss comes from the logits of the whole batch. nanoGPT also compiles the model as a whole, and
pads the vocabulary to a multiple of 64. Nothing of gptcore is used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.shapes import Shape


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = batch, tokens, self.n_heads, width // self.n_heads
        queries, keys, values = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.c_proj(attended.transpose(1, 2).contiguous().view(batch, tokens, width))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, n_heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Turns ids and targets, each (batch, tokens), into the mean cross-entropy in nats. The head is the embedding."""

    def __init__(self, shape: Shape, padding: int) -> None:
        super().__init__()
        width = shape.emb_dim
        parts: dict[str, Any] = {
            "wte": nn.Embedding(shape.vocab_size + padding, width),
            "wpe": nn.Embedding(shape.context_length, width),
            "h": nn.ModuleList(Block(width, shape.n_heads) for _ in range(shape.n_layers)),
            "ln_f": nn.LayerNorm(width),
        }
        self.transformer = nn.ModuleDict(parts)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1], device=ids.device))
        for block in parts["h"]:  # type: ignore[union-attr]
            x = block(x)
        logits = F.linear(parts["ln_f"](x), parts["wte"].weight)  # type: ignore[arg-type]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

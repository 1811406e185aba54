"""The models that are compared, their training data, and the least arithmetic and memory traffic that they need.

Every contender of `python -m bench` gets the same shape, the same batches and the same settings of AdamW.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 123
LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """A GPT-2 with a tied head and biases everywhere but in the head, and the batch of one step."""

    name: str
    n_layers: int
    n_heads: int
    emb_dim: int
    context_length: int
    batch_size: int
    vocab_size: int
    rounds: int
    """The default number of timed steps of each contender, after two for warm-up: few if a step takes seconds."""

    def cfg(self, drop_rate: float) -> dict[str, Any]:
        """Return the configuration from which gptcore's GPTModel is built."""
        keys = ("n_layers", "n_heads", "emb_dim", "context_length", "vocab_size")
        parts = {"drop_rate": drop_rate, "qkv_bias": True, "tied": True, "init": "gpt2"}
        return {**{key: getattr(self, key) for key in keys}, **parts}

    @property
    def num_weights(self) -> int:
        """Count the weights of the matrices that multiply every token: 12 d^2 in each block, and the head."""
        return 12 * self.n_layers * self.emb_dim**2 + self.vocab_size * self.emb_dim

    @property
    def step_flops(self) -> int:
        """Count the floating-point operations of one training step, matmuls only.

        They are two for each weight and token, and two for each feature and pair of tokens in both products of
        attention, in which half of the pairs are masked. Backward costs twice as much as forward (Chowdhery et al.
        2022, "PaLM", appendix B, which ignores the mask).
        """
        tokens = self.batch_size * self.context_length
        attention = self.n_layers * self.emb_dim * self.context_length
        return 6 * tokens * (self.num_weights + attention)

    @property
    def weight_bytes(self) -> int:
        """Count the bytes that each generated token reads from memory."""
        return _FLOAT_BYTES * self.num_weights

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (batch, tokens) of step `index`.

        The ids are random with probability about 1 / id, like the words of a language, so the model can learn
        something.
        """
        generator = torch.Generator().manual_seed(SEED + index)
        uniform = torch.rand(self.batch_size, self.context_length + 1, generator=generator)
        ids = (self.vocab_size**uniform).long() - 1
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 4, 4, 128, 128, 16, 50257, rounds=18),
        Shape("M", 6, 6, 384, 256, 8, 50257, rounds=4),
        Shape("L", 12, 12, 768, 256, 2, 50257, rounds=4),
        Shape("C", 6, 6, 384, 256, 12, 65, rounds=6),
        Shape("c", 4, 4, 128, 64, 12, 65, rounds=40),
    )
}
"""L is GPT-2's smallest size with a context of 256. C and c are models of characters."""


def adamw(parameters: Iterable[nn.Parameter], fused: bool) -> torch.optim.AdamW:
    """Return AdamW as every contender uses it: weight decay acts on parameters with two dimensions."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() >= 2].append(parameter)
    decays = ({"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0})
    return torch.optim.AdamW(decays, lr=LEARNING_RATE, betas=BETAS, fused=fused or None)

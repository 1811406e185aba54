"""Weights as 8-bit integers, for generation on a CPU. They take a quarter of the memory, and reading them is what a
token costs.

Each output of a linear layer has its own scale. Inputs are rounded to 8 bits on every call, by the largest value among
them ("dynamic quantisation"), so requests in one batch are rounded together. FBGEMM adds up the products as integers.
Embeddings, norms and attention keep their precision. See bench/RESULTS.md for the cost in bits per byte.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.errors import CheckpointError, ConfigError
from gptcore.model.attention import MultiHeadAttention

MODES = ("int8",)
_ENGINE = "fbgemm"


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, or several layers with the same input as one, their outputs side by side."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (out, in)
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (out,)
        if not torch.isfinite(scales).all():
            raise CheckpointError("a weight is not a number, so it cannot be rounded. Load another version.")
        zeros = torch.zeros(len(scales), dtype=torch.long)  # (out,)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # to be removed after 2.13
            rounded = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)  # (out, in)
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])  # (out,)
        self._packed: Any = torch.ops.quantized.linear_prepack(rounded, bias)
        # Naming the overload saves a third of the time of a small call.
        self._multiply = torch.ops.quantized.linear_dynamic.default

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # True is reduce_range: inputs use 7 bits, so that sums of 16 bits cannot overflow.
        return self._multiply(x, self._packed, True)


class Int8Slice(nn.Module):
    """The queries, keys or values of an Int8Linear that computes all three.

    Fusing them saves calls, which cost more than the arithmetic when there are few tokens.
    """

    def __init__(self, fused: Int8Linear, index: int) -> None:
        super().__init__()
        self.fused, self._index = fused, index

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.fused(x).chunk(3, dim=-1)[self._index]  # (..., 3 * out) -> (..., out)


INT8_KINDS = (Int8Linear, Int8Slice)
"""The modules that `quantize` puts into a model."""


def quantize(model: nn.Module, mode: str = "int8") -> None:
    """Round the weights of every nn.Linear in `model`, in place. The model can no longer be trained or saved.

    Raises ConfigError for another mode, a model that is not on the CPU, or a build of torch without FBGEMM. Raises
    CheckpointError for weights that are not numbers.
    """
    if mode not in MODES:
        raise ConfigError(f"quantize is {mode!r}; it must be one of {', '.join(MODES)}.")
    device = next(model.parameters()).device.type
    if device != "cpu":
        raise ConfigError(f"int8 is for models on the CPU, this one is on {device}. Leave --quantize or --device out.")
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise ConfigError("this build of torch has no FBGEMM, which int8 needs (an x86 CPU). Leave --quantize out.")
    engine, torch.backends.quantized.engine = torch.backends.quantized.engine, _ENGINE
    try:
        for module in list(model.modules()):
            if isinstance(module, MultiHeadAttention):
                _fuse_projections(module)
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Int8Linear(child))
    finally:
        torch.backends.quantized.engine = engine


def _fuse_projections(attention: MultiHeadAttention) -> None:
    names = ("W_query", "W_key", "W_value")
    fused = Int8Linear(*(getattr(attention, name) for name in names))
    for index, name in enumerate(names):
        setattr(attention, name, Int8Slice(fused, index))

"""Weights as 8-bit whole numbers, for generation on a CPU: a quarter of the memory, which is what a token costs.

Each output of a linear layer has a scale of its own; what goes in is rounded to 8 bits anew every time, by the largest
value in it ("dynamic quantisation"), so a text that is written among others is rounded with them. Sums are made of
whole numbers, by FBGEMM. Embeddings, norms and attention stay as they are. What that costs in bits per byte stands in
bench/RESULTS.md.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.attention import MultiHeadAttention
from gptcore.errors import CheckpointError, ConfigError

MODES = ("int8",)
_ENGINE = "fbgemm"


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits; or several with the same input as one, their outputs side by side."""

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        if not torch.isfinite(scales).all():
            raise CheckpointError("a weight is no number, so it cannot be rounded: load another version.")
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # to be removed after 2.13
            rounded = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        self._packed: Any = torch.ops.quantized.linear_prepack(rounded, bias)
        self._multiply = torch.ops.quantized.linear_dynamic.default  # its overload, named: a third of a small call less

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Sums of 16 bits cannot overflow: `reduce_range` leaves them a bit."""
        return self._multiply(x, self._packed, True)


class Int8Share(nn.Module):
    """Queries, keys or values, of a layer that makes all three: one call where a token needs little arithmetic."""

    def __init__(self, whole: Int8Linear, index: int) -> None:
        super().__init__()
        self.whole, self._index = whole, index

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.whole(x).chunk(3, dim=-1)[self._index]


INT8_KINDS = (Int8Linear, Int8Share)
"""What `quantize` puts into a model."""


def quantize(model: nn.Module, mode: str = "int8") -> None:
    """Rounds the weights of every nn.Linear in `model`, in place. It can no longer be trained or saved.

    Raises ConfigError for another mode, where the model is not on the CPU, and where this build of torch cannot, and
    CheckpointError for weights that are no numbers.
    """
    if mode not in MODES:
        raise ConfigError(f"quantize is {mode!r}; it must be one of {', '.join(MODES)}.")
    device = next(model.parameters()).device.type
    if device != "cpu":
        raise ConfigError(f"int8 is for models on the CPU, this one is on {device}; leave --quantize out there.")
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise ConfigError("this build of torch has no FBGEMM, which int8 needs (an x86 CPU); leave --quantize out.")
    engine, torch.backends.quantized.engine = torch.backends.quantized.engine, _ENGINE
    try:
        for part in list(model.modules()):
            if isinstance(part, MultiHeadAttention):
                names = ("W_query", "W_key", "W_value")
                whole = Int8Linear(*(getattr(part, name) for name in names))
                for index, name in enumerate(names):
                    setattr(part, name, Int8Share(whole, index))
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, Int8Linear(child))
    finally:
        torch.backends.quantized.engine = engine

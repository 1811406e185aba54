"""Weights as 8-bit whole numbers, for generation on a CPU: a quarter of the memory, which is what a token costs.

Each output of a linear layer has a scale of its own; what goes in is rounded to 8 bits anew every time, by the largest
value in it ("dynamic quantisation"). Sums are made of whole numbers, by FBGEMM. Embeddings, norms and attention stay
as they are. What that costs in bits per byte stands in bench/RESULTS.md.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.errors import ConfigError

MODES = ("int8",)
_ENGINE = "fbgemm"


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # to be removed after 2.13
            rounded = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self._packed: Any = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). Sums of 16 bits cannot overflow: `reduce_range` leaves them a bit."""
        return torch.ops.quantized.linear_dynamic(x, self._packed, True)


def quantize(model: nn.Module, mode: str = "int8") -> None:
    """Rounds the weights of every nn.Linear in `model`, in place. It can no longer be trained or saved.

    Raises ConfigError for another mode, where the model is not on the CPU, and where this build of torch cannot.
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
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, Int8Linear(child))
    finally:
        torch.backends.quantized.engine = engine

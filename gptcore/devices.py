"""Which processor computes: what `auto` means on this machine, and which devices it has.

Training, scoring, generation and the loading of models take the name of a device (see `DEVICE_NAME` in config.py), and
ask here. torch is imported on the first question only.
"""

import re
from typing import TYPE_CHECKING

from gptcore.config import DEVICE_NAME
from gptcore.errors import ConfigError, DeviceMissing

if TYPE_CHECKING:
    import torch


def find_device() -> str:
    """Return the device that `auto` means on this machine: cuda, else mps, else cpu."""
    return next(kind for kind in ("cuda", "mps", "cpu") if count_devices(kind))


def choose_device(name: str) -> "torch.device":
    """Return the device of that name, or for `auto` the one that `find_device` returns.

    Raises DeviceMissing if this machine does not have the device, and ConfigError if no device has such a name.
    """
    import torch

    check_name(name)
    if name == "auto":
        return torch.device(find_device())
    if not _has_device(name):
        raise DeviceMissing(f"device {name}: this machine has only {_list_devices()}. Choose one of them, or auto.")
    return torch.device(name)


def choose_usable_device(name: str) -> "torch.device":
    """Return the device of that name if this machine has it, else the one that `find_device` returns.

    For a device that was recorded, perhaps on another machine.
    """
    import torch

    return torch.device(name if name != "auto" and _has_device(name) else find_device())


def check_name(name: str) -> None:
    """Raise ConfigError if `name` does not name a device, whether or not this machine has it. Imports no torch."""
    if not re.fullmatch(DEVICE_NAME, name):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps.")


def count_devices(kind: str) -> int:
    """Count the devices of a kind (cpu, cuda or mps) that this process may use."""
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(kind == "cpu" or torch.backends.mps.is_available())


def can_compute_in_bf16(name: str) -> bool:
    """Whether this device of this machine can train in bf16. Every CPU can."""
    import torch

    if name == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return name == "cpu" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def release_memory() -> None:
    """Return the GPU memory that this process no longer uses, so that another process can take it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _has_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return int(index or 0) < count_devices(kind)


def _list_devices() -> str:
    gpus = [f"cuda:{index}" for index in range(count_devices("cuda"))]
    return ", ".join(["cpu", *gpus, *["mps"] * count_devices("mps")])

"""The meaning of `auto` on this machine, and the version of training's arithmetic."""

from gptcore.config import MachineSettings, Precision, TrainConfig, explain_uneven
from gptcore.devices import can_compute_in_bf16, count_devices, find_device
from gptcore.errors import ConfigError
from gptcore.processes import count_cpus
from gptcore.processor import choose_precision

TRAINING_VERSION = 3
"""Raised by a change of gptcore/model or gptcore/training that gives other weights, so that their run keys differ.

`find_training_version` says which trainings it concerns."""


def resolve(train: TrainConfig, precision_so_far: Precision = "auto") -> TrainConfig:
    """Replace every `auto` by its value on this machine. The rule is fixed, so two runs choose the same.

    `precision_so_far` is that of an unfinished training. It is kept if the device can compute in it, because a training
    learns a little differently in another precision.

    - device: cuda, else mps, else cpu (gptcore/devices.py).
    - precision: bf16 where it is faster: on CUDA devices and on some CPUs (gptcore/processor.py).
    - compile: on CUDA devices, where it saves most launches of small kernels. On the CPUs measured it took 20 to 50 s
      and made no update faster, because the slow operations are fused already.
    - threads: the cores that this process may use.
    - processes: one per GPU with device cuda, else one.

    Raises ConfigError if the batch cannot be divided by that many processes.
    """
    device = find_device() if train.device == "auto" else train.device
    precision = train.precision
    if precision == "auto" and (precision_so_far != "bf16" or can_compute_in_bf16(device)):
        precision = precision_so_far
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else choose_precision() if device == "cpu" else "fp32"
    gpus = max(1, count_devices("cuda")) if device == "cuda" else 1
    processes = gpus if train.processes == "auto" else train.processes
    if (wrong := explain_uneven(train.batch_size, processes, "processes")) is not None:
        raise ConfigError(f"train: {wrong}")
    return train.model_copy(
        update={
            "device": device,
            "precision": precision,
            "compile": device.startswith("cuda") if train.compile == "auto" else train.compile,
            "threads": count_cpus() if train.threads == "auto" else train.threads,
            "processes": processes,
        }
    )


def find_training_version(train: TrainConfig, is_warm_start: bool) -> int:
    """Return the version of the arithmetic of a training: that of the newest change that concerns its settings.

    So a change that gives other weights starts no other training again. Version 3: after a warm-up, which every warm
    start has, the rate falls from its highest value. Before, it fell from the first update on. Muon computes its
    directions in another order.
    """
    falls_after_warm_up = (train.warmup_steps > 0 or is_warm_start) and train.schedule != "constant"
    return TRAINING_VERSION if falls_after_warm_up or train.optimizer == "muon" else 2


def describe_changes(before: TrainConfig, now: TrainConfig) -> str:
    """Return how the start of a training differs from the one before, as in `device cuda -> cpu, threads 8 -> 2`."""
    keys = (*MachineSettings.model_fields, "processes")
    changed = [key for key in keys if getattr(before, key) != getattr(now, key)]
    return ", ".join(f"{key} {getattr(before, key)} -> {getattr(now, key)}" for key in changed)

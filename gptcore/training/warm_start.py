"""Warm start: everything in which training from another model's weights differs from training from scratch.

Only the weights are taken from the other model; optimizer, schedule and random states start fresh. The learning rate of
the earlier training ended near zero. It has to rise again before the model can learn from new text, but a sudden rise
would destroy what the model knows (Gupta et al. 2023, "Continual Pre-Training of Large Language Models: How to (re)warm
your model?", arXiv:2308.04014). So the learning rate always warms up.
"""

import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gptcore import manifest
from gptcore.config import TrainConfig
from gptcore.errors import CheckpointError
from gptcore.training.batches import Batches
from gptcore.training.loop import steps_in_budget

_WARM_UP_FRACTION = 20
"""If train.warmup_steps is 0, the learning rate rises over one twentieth of the updates."""


def read_weights(model: nn.Module, path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the weights in a safetensors file, which must fit `model`.

    Raises CheckpointError if the file is missing, has another hash, or is not a safetensors file. Also raises it if the
    file holds tensors of other names or shapes, naming the first that differs and both shapes.
    """
    try:
        actual = manifest.sha256_of_file(path)
        if actual != sha256:
            raise CheckpointError(
                f"{path} has sha256 {actual}, config.json expects {sha256}: the file was altered. "
                "Prepare another directory."
            )
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, but training starts from it. Prepare another directory.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path} holds the weights of another architecture: {name} is {shapes.get(name, 'absent')} in the file "
                f"and {expected.get(name, 'absent')} in the model. Configure the model like the one it starts from, or "
                "set train.start_from: scratch."
            )
    return tensors


def add_warm_up(train: TrainConfig, batches: Batches) -> TrainConfig:
    """Return `train` with a warm-up: its own warmup_steps, or 5 percent of the budget's updates.

    If only seconds are limited, the 5 percent are of an epoch's updates.
    """
    updates = steps_in_budget(train, batches) or batches.steps_per_epoch
    return train.model_copy(update={"warmup_steps": train.warmup_steps or math.ceil(updates / _WARM_UP_FRACTION)})

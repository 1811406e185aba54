"""Training that starts from another model's weights: all that is different from training from scratch.

Only the weights are taken over; optimiser, schedule and random states begin anew. A schedule that ended near zero has
to rise again before the model learns anything from new text, and rising at once would destroy what it knows (Gupta et
al. 2023, "Continual Pre-Training of Large Language Models: How to (re)warm your model?", arXiv:2308.04014). So the
learning rate always warms up.
"""

import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gptcore import manifest
from gptcore.config import TrainConfig
from gptcore.data import Batches
from gptcore.errors import CheckpointError
from gptcore.train import steps_in_budget

REWARM_PART = 20
"""Where train.warmup_steps is 0, the learning rate rises over one such part of the updates."""


def read_weights(model: nn.Module, path: Path, sha256: str) -> dict[str, Tensor]:
    """The weights in a safetensors file, which fit `model`.

    Raises CheckpointError if the file is missing, has another hash, is none of safetensors, or holds tensors of other
    names or shapes, naming the first that differs and both shapes.
    """
    try:
        found = manifest.sha256_of_file(path)
        if found != sha256:
            raise CheckpointError(
                f"{path} has sha256 {found}, config.json expects {sha256}: it was altered. Prepare another directory."
            )
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing, and training is to start from it. Prepare another directory."
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not what its name says: {error}") from None
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"{path} holds the weights of another architecture: {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} in this model. Configure the model as its ancestor, or set "
                "train.start_from: scratch."
            )
    return tensors


def rewarmed(train: TrainConfig, batches: Batches) -> TrainConfig:
    """`train` with a warm-up. Without warmup_steps of its own, it takes 5 percent of the budget's updates; where only
    seconds are limited, of an epoch's."""
    updates = steps_in_budget(train, batches) or batches.steps_per_epoch
    return train.model_copy(update={"warmup_steps": train.warmup_steps or math.ceil(updates / REWARM_PART)})

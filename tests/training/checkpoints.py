"""A small training state that is trained, saved and restored, for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcore.config import TrainConfig
from gptcore.training import checkpoint
from gptcore.training.batches import Batches
from gptcore.training.loop import run_updates
from gptcore.training.state import TrainState
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "drop_rate": 0.1, "qkv_bias": True}
TRAIN = TrainConfig(max_steps=12, batch_size=2, device="cpu", threads=1, precision="fp32", compile=False)
TOKENS = np.random.default_rng(0).integers(0, 257, 161).astype(np.uint16)
IDENTITY = {"model.emb_dim": 16, "train.learning_rate": 1e-3}


def train_on(state: TrainState, until: int) -> None:
    """Train up to update `until`. Record an evaluation every four updates, the first one as the best."""
    batches = Batches(TOKENS, 16, 16, TRAIN.batch_size, TRAIN.accumulation, TRAIN.seed)
    for done in run_updates(state, batches, TRAIN) if state.step < until else ():
        if done.step % 4 == 1:
            state.record_evaluation(float(done.step))
        if done.step == until:
            break


def everything(state: TrainState) -> dict[str, Any]:
    """Return everything that determines how the training continues, as plain data."""
    moments = state.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.tolist() for name, value in state.model.state_dict().items()},
        "moments": {index: {key: value.tolist() for key, value in entry.items()} for index, entry in moments.items()},
        "random": torch.get_rng_state().tolist(),
        "counters": state.counters(),
        "best": state.best and {name: value.tolist() for name, value in state.best.weights.items()},
    }


def saved(checkpoints: Path, *steps: int, keep: int = 10) -> TrainState:
    """Train, and save at each of the steps. Return the state after the last step."""
    state = TrainState.initial(CFG, TRAIN)
    for step in steps:
        train_on(state, step)
        checkpoint.save(checkpoints, state, IDENTITY, keep)
    return state


def restored(checkpoints: Path, identity: dict[str, Any] = IDENTITY) -> TrainState:
    """Return a new state, restored from the newest usable checkpoint."""
    state = TrainState.initial(CFG, TRAIN)
    assert checkpoint.restore(checkpoints, state, identity)
    return state


def names(checkpoints: Path) -> list[str]:
    """Return the sorted names of the checkpoints in a directory."""
    return sorted(path.name for path in checkpoints.iterdir())

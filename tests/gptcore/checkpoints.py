"""A state that is trained, saved and restored, for the tests about checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcore.config import TrainConfig
from gptcore.data import Batches
from gptcore.learning import checkpoint
from gptcore.learning.state import TrainState
from gptcore.train import training

CFG = {
    "vocab_size": 257,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
TRAIN = TrainConfig(max_steps=12, batch_size=2, device="cpu", threads=1, precision="fp32", compile=False)
TOKENS = np.random.default_rng(0).integers(0, 257, 161).astype(np.uint16)
IDENTITY = {"model.emb_dim": 16, "train.learning_rate": 1e-3}


def train_on(state: TrainState, until: int) -> None:
    """Trains up to update `until`; each fourth update is noted as an evaluation, the first one as the best."""
    batches = Batches(TOKENS, 16, 16, TRAIN.batch_size, TRAIN.accumulation, TRAIN.seed)
    for done in training(state, batches, TRAIN) if state.step < until else ():
        if done.step % 4 == 1:
            state.note_evaluation(done.loss, float(done.step))
        if done.step == until:
            break


def everything(state: TrainState) -> dict[str, Any]:
    """All that decides how the training goes on, as plain data."""
    moments = state.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.tolist() for name, value in state.model.state_dict().items()},
        "moments": {index: {key: value.tolist() for key, value in entry.items()} for index, entry in moments.items()},
        "random": torch.get_rng_state().tolist(),
        "counters": state.counters(),
        "best": state.best and {name: value.tolist() for name, value in state.best.weights.items()},
    }


def saved(checkpoints: Path, *steps: int, keep: int = 10) -> TrainState:
    """Trains and saves at each of the steps; returns the state after the last one."""
    state = TrainState.initial(CFG, TRAIN)
    for step in steps:
        train_on(state, step)
        checkpoint.save(checkpoints, state, IDENTITY, keep)
    return state


def restored(checkpoints: Path, identity: dict[str, Any] = IDENTITY) -> TrainState:
    """A new state, brought to the newest checkpoint that can be used."""
    state = TrainState.initial(CFG, TRAIN)
    assert checkpoint.restore(checkpoints, state, identity)
    return state


def names(checkpoints: Path) -> list[str]:
    """What stands there."""
    return sorted(path.name for path in checkpoints.iterdir())

"""Checkpoints: what is restored is what was saved, and nothing that is damaged or foreign is."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import manifest
from gptcore.config import TrainConfig
from gptcore.data import Batches
from gptcore.errors import CheckpointError, DiskFull
from gptcore.learning import checkpoint
from gptcore.train import TrainState, training

CFG = {
    "vocab_size": 257,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
TRAIN = TrainConfig(max_steps=12, batch_size=2, device="cpu", threads=1, precision="fp32")
TOKENS = np.random.default_rng(0).integers(0, 257, 161).astype(np.uint16)
IDENTITY = {"model.emb_dim": 16, "train.learning_rate": 1e-3}


class Killed(BaseException):
    """Stands for SIGKILL: together with a disabled rmtree, no clean-up runs after it."""


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def train_on(state, until):
    """Trains up to update `until`; each fourth update is noted as an evaluation, the first one as the best."""
    batches = Batches(TOKENS, 16, 16, TRAIN.batch_size, TRAIN.accumulation, TRAIN.seed)
    for done in training(state, batches, TRAIN) if state.step < until else ():
        if done.step % 4 == 1:
            state.note_evaluation(done.loss, float(done.step))
        if done.step == until:
            break


def everything(state):
    """All that decides how the training goes on, as plain data."""
    moments = state.optimizer.state_dict()["state"]
    return {
        "weights": {name: value.tolist() for name, value in state.model.state_dict().items()},
        "moments": {index: {key: value.tolist() for key, value in entry.items()} for index, entry in moments.items()},
        "random": torch.get_rng_state().tolist(),
        "counters": state.counters(),
        "best": state.best and {name: value.tolist() for name, value in state.best.weights.items()},
    }


def saved(checkpoints, *steps, keep=10):
    """Trains and saves at each of the steps; returns the state after the last one."""
    state = TrainState.initial(CFG, TRAIN)
    for step in steps:
        train_on(state, step)
        checkpoint.save(checkpoints, state, IDENTITY, keep)
    return state


def restored(checkpoints, identity=IDENTITY):
    state = TrainState.initial(CFG, TRAIN)
    assert checkpoint.restore(checkpoints, state, identity)
    return state


def names(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


def test_a_restored_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    state = saved(tmp_path, 6)
    at_six = everything(state)
    train_on(state, 12)
    at_twelve = everything(state)
    torch.manual_seed(4711)
    back = restored(tmp_path)
    assert everything(back) == at_six
    train_on(back, 12)
    del at_twelve["counters"]["seconds"]
    assert {**everything(back), "counters": {**back.counters(), "seconds": None}} == {
        **at_twelve,
        "counters": {**at_twelve["counters"], "seconds": None},
    }


def test_a_state_without_a_best_comes_back_without_one(tmp_path):
    checkpoint.save(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY, 2)
    assert restored(tmp_path).best is None


def test_where_nothing_was_saved_nothing_is_restored(tmp_path):
    state = TrainState.initial(CFG, TRAIN)
    before = everything(state)
    assert not checkpoint.restore(tmp_path / "checkpoints", state, IDENTITY)
    assert everything(state) == before


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_checkpoints_hold_safetensors_and_json_only(tmp_path):
    saved(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit flip": lambda directory: flip_bit(directory / "model.safetensors"),
    "bit flip in the optimiser": lambda directory: flip_bit(directory / "optimizer.safetensors"),
    "truncated": lambda directory: os.truncate(directory / "model.safetensors", 1000),
    "zero bytes": lambda directory: os.truncate(directory / "random.safetensors", 0),
    "file missing": lambda directory: (directory / "best.safetensors").unlink(),
    "manifest missing": lambda directory: (directory / "manifest.json").unlink(),
    "manifest empty": lambda directory: os.truncate(directory / "manifest.json", 0),
    "manifest without content": lambda directory: (directory / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_in_a_warning_and_the_previous_one_used(tmp_path, damage):
    saved(tmp_path, 4, 6)
    DAMAGES[damage](tmp_path / "step-00000006")
    with pytest.warns(UserWarning, match="checkpoint passed over: .*step-00000006"):
        back = restored(tmp_path)
    assert back.step == 4


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_was_passed_over_is_replaced_when_training_comes_by_again(tmp_path, damage, keep):
    twin = everything(saved(tmp_path, 4, 6))
    DAMAGES[damage](tmp_path / "step-00000006")
    with pytest.warns(UserWarning, match="passed over"):
        state = restored(tmp_path)
    train_on(state, 5)
    checkpoint.save(tmp_path, state, IDENTITY, keep)
    assert restored(tmp_path).step == 5
    train_on(state, 6)
    checkpoint.save(tmp_path, state, IDENTITY, keep)
    back = everything(restored(tmp_path))
    assert {**back, "counters": None} == {**twin, "counters": None}
    assert names(tmp_path)[-1] == "step-00000006" and len(names(tmp_path)) == keep


def test_when_all_are_damaged_training_does_not_start_over(tmp_path):
    saved(tmp_path, 4, 6)
    for name in names(tmp_path):
        flip_bit(tmp_path / name / "model.safetensors")
    state = TrainState.initial(CFG, TRAIN)
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used"),
    ):
        checkpoint.restore(tmp_path, state, IDENTITY)


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({**IDENTITY, "train.learning_rate": 2e-3}, r"train\.learning_rate is 0\.001 there and 0\.002 here"),
        ({**IDENTITY, "model.emb_dim": 32}, r"model\.emb_dim is 16 there and 32 here"),
        ({**IDENTITY, "tokens": "ab"}, r"tokens is None there and 'ab' here"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_with_the_key_and_both_values(tmp_path, identity, said):
    saved(tmp_path, 2)
    with pytest.raises(CheckpointError, match=said):
        checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), identity)


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "best"])
def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path, name):
    checkpoints, executed = tmp_path / "checkpoints", tmp_path / "executed"
    saved(checkpoints, 4)
    (checkpoints / "step-00000004" / f"{name}.safetensors").write_bytes(pickle.dumps(Payload(executed)))
    with pytest.warns(UserWarning, match=f"passed over: .*{name}.safetensors"), pytest.raises(CheckpointError):
        restored(checkpoints)
    assert not executed.exists()


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "best"])
def test_a_pickle_that_the_manifest_vouches_for_is_refused_too(tmp_path, name):
    checkpoints, executed = tmp_path / "checkpoints", tmp_path / "executed"
    saved(checkpoints, 4)
    goal = checkpoints / "step-00000004"
    about = manifest.about(goal)
    with manifest.staging(checkpoints) as staged:
        shutil.copytree(goal, staged, dirs_exist_ok=True)
        (staged / "manifest.json").unlink()
        torch.save(Payload(executed), staged / f"{name}.safetensors")
        shutil.rmtree(goal)
        manifest.commit(staged, goal, about)
    with pytest.raises(CheckpointError, match=r"a file in .*step-00000004 is not what its name says"):
        restored(checkpoints)
    assert not executed.exists()


def die_at(monkeypatch, number):
    """The process dies just before its `number`-th file operation, counted from 1. Returns the operations so far."""
    done = []

    def dying(name, operation):
        def wrapper(*args, **kwargs):
            done.append(name)
            if len(done) == number:
                raise Killed
            return operation(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(checkpoint, "save_file", dying("save_file", checkpoint.save_file))
    monkeypatch.setattr(manifest, "flush", dying("flush", manifest.flush))
    for name in ("write_text", "rename"):
        monkeypatch.setattr(Path, name, dying(name, getattr(Path, name)))
    monkeypatch.setattr(manifest.shutil, "rmtree", lambda path, **kwargs: done.append("rmtree"))
    return done


def test_a_death_at_any_file_operation_of_a_save_costs_no_more_than_that_save(tmp_path):
    twin = saved(tmp_path / "twin", 5)
    expected = everything(twin)
    seen = set()
    for number in range(1, 100):
        checkpoints = tmp_path / str(number)
        saved(checkpoints, 2, 3, keep=2)
        state = restored(checkpoints)
        train_on(state, 5)
        with pytest.MonkeyPatch.context() as patched:
            operations = die_at(patched, number)
            try:
                checkpoint.save(checkpoints, state, IDENTITY, keep=2)
                break
            except Killed:
                seen.add(operations[number - 1])
        back = restored(checkpoints)
        assert back.step in (3, 5)
        train_on(back, 5)
        checkpoint.save(checkpoints, back, IDENTITY, keep=2)
        assert {**everything(back), "counters": None} == {**expected, "counters": None}
        assert names(checkpoints) == ["step-00000003", "step-00000005"], "what the dead one left is swept"
    assert seen == {"save_file", "flush", "write_text", "rename"}


def test_a_death_during_the_very_first_save_leaves_no_checkpoint(tmp_path):
    state = TrainState.initial(CFG, TRAIN)
    train_on(state, 2)
    with pytest.MonkeyPatch.context() as patched:
        die_at(patched, 3)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state, IDENTITY, keep=2)
    assert all(name.startswith(".tmp-") for name in names(tmp_path)) and names(tmp_path)
    assert not checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY)
    checkpoint.save(tmp_path, state, IDENTITY, keep=2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    state = saved(tmp_path, 2)
    train_on(state, 3)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "flush", full)
    with pytest.raises(DiskFull, match="is full: more than"):
        checkpoint.save(tmp_path, state, IDENTITY, keep=2)
    assert names(tmp_path) == ["step-00000002"]
    assert restored(tmp_path).step == 2

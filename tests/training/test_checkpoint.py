"""Checkpoints: a restored state equals the saved state.

Damaged and foreign checkpoints are tested in tests/faults.
"""

import torch

from gptcore.training import checkpoint
from gptcore.training.state import TrainState
from tests.training.checkpoints import CFG, IDENTITY, TRAIN, everything, names, restored, saved, train_on


def test_a_restored_training_continues_as_if_it_had_never_stopped(tmp_path):
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


def test_a_state_without_best_weights_is_restored_without_them(tmp_path):
    checkpoint.save(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY, 2)
    assert restored(tmp_path).best is None


def test_without_a_checkpoint_restore_leaves_the_state_unchanged(tmp_path):
    state = TrainState.initial(CFG, TRAIN)
    before = everything(state)
    assert not checkpoint.restore(tmp_path / "checkpoints", state, IDENTITY)
    assert everything(state) == before


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_checkpoints_contain_only_safetensors_and_json(tmp_path):
    saved(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}


def test_random_numbers_of_a_device_are_left_out_if_another_kind_of_device_resumes():
    states = {"cpu": torch.get_rng_state(), "device": torch.zeros(16, dtype=torch.uint8)}
    for saved_on, device, kept in (("cuda:1", "cuda", states), ("cuda", "cpu", {"cpu": states["cpu"]})):
        counters = {"executions": [{"device": saved_on}]}
        assert checkpoint._keep_usable(states, counters, torch.device(device)) == kept
    assert checkpoint._keep_usable(states, {}, torch.device("cuda")) == states, "an earlier release saved it"
    checkpoint._set_random_states({"cpu": states["cpu"]}, torch.device("cuda"))

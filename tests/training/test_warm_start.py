"""Warm start: a training uses the weights of another model, and can be interrupted like any other training."""

import contextlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore import manifest
from gptcore.config import TrainConfig
from gptcore.errors import CheckpointError
from gptcore.model.gpt import GPTModel
from gptcore.tokens.files import load_tokens
from gptcore.training.batches import Batches
from gptcore.training.loop import compute_mean_loss
from gptcore.training.trainer import train_directory
from gptcore.training.warm_start import add_warm_up
from tests.trainings import MODEL, StopAfter, edit_config, finish, outcome, prepare

TRAIN = {"max_steps": 21, "batch_size": 4, "warmup_steps": 0, "eval_every": 4, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def ancestor(tokens, tmp_path_factory):
    """The weights of a short training from scratch."""
    run = prepare(tmp_path_factory.mktemp("ancestor") / "run", tokens, **{**TRAIN, "max_steps": 12, "seed": 5})
    finish(run)
    return run.weights


@pytest.fixture
def make(tmp_path, tokens, ancestor):
    """A function that makes a run directory that starts from the ancestor's weights."""

    def prepared(name="run", model=MODEL, weights=ancestor, **train):
        return prepare(tmp_path / name, tokens, weights, model, **{**TRAIN, "start_from": "champion", **train})

    return prepared


@pytest.fixture(scope="module")
def uninterrupted(tokens, ancestor, tmp_path_factory):
    """The outcome of a warm start that was never interrupted."""
    train = {**TRAIN, "start_from": "champion"}
    run = prepare(tmp_path_factory.mktemp("twin") / "run", tokens, ancestor, MODEL, **train)
    finish(run)
    return outcome(run)


class Killed(BaseException):
    """A stand-in for SIGKILL: nothing is saved."""


class KillAfter(StopAfter):
    """A stand-in for `Stop` that kills the training once update `step` is logged."""

    @property
    def reason(self):
        if super().reason is not None:
            raise Killed


def end_after(run, step, kill):
    """Stop or kill the training once update `step` is logged."""
    with contextlib.suppress(Killed):
        assert train_directory(run.path, (KillAfter if kill else StopAfter)(run, step)) is None
    assert run.read_result() is None


def test_the_first_loss_is_that_of_the_ancestors_weights(make, tokens, ancestor):
    run = make(model={**MODEL, "drop_rate": 0.0}, max_steps=1)
    finish(run)
    model = GPTModel(run.read_config().cfg())
    model.load_state_dict(load_file(ancestor))
    first = Batches(load_tokens(tokens.path).side("train"), 32, 32, 4, 2, 123).make_micro_batches(0)
    expected = compute_mean_loss(model, first, torch.device("cpu"))
    assert run.read_metrics()[0]["loss"] == pytest.approx(expected, abs=1e-6)
    assert expected < 5.0, "a model with random weights has a loss of 5.5 nats per byte"


def test_a_training_that_learns_nothing_ends_with_the_ancestors_weights(make, ancestor):
    run = make(learning_rate=1e-30, max_steps=3)
    finish(run)
    before, after = load_file(ancestor), load_file(run.weights)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("step", [1, 6, 15, 20])
def test_an_interrupted_warm_start_ends_like_its_uninterrupted_twin(make, uninterrupted, kill, step):
    run = make()
    end_after(run, step, kill)
    finish(run)
    assert outcome(run) == uninterrupted


def test_the_random_numbers_are_those_of_a_training_from_scratch(make, tokens, tmp_path):
    """Start from the same weights that the random seed gives, and expect the same as from scratch."""
    torch.manual_seed(123)
    fresh = GPTModel(make().read_config().cfg())
    save_file(fresh.state_dict(), tmp_path / "fresh.safetensors")
    warm = make("warm", weights=tmp_path / "fresh.safetensors", warmup_steps=2)
    scratch = prepare(tmp_path / "scratch", tokens, **{**TRAIN, "warmup_steps": 2})
    for run in (warm, scratch):
        finish(run)
    assert outcome(warm) == outcome(scratch)


def test_the_learning_rate_warms_up_again(make):
    run = make(schedule="constant", max_steps=21)
    finish(run)
    rates = [line["learning_rate"] for line in run.read_metrics()]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01]) and set(rates[2:]) == {0.01}


@pytest.mark.parametrize(
    ("given", "warmup"),
    [
        ({"max_steps": 1000}, 50),
        ({"max_steps": 1}, 1),
        ({"max_epochs": 7}, 7),
        ({"max_seconds": 60.0}, 1),
        ({"max_steps": 1000, "warmup_steps": 7}, 7),
    ],
)
def test_the_warm_up_is_a_twentieth_of_the_updates_unless_it_is_given(given, warmup):
    batches = Batches(torch.arange(32 * 8 * 20 + 1).numpy(), 32, 32, 4, 2, 123)
    assert batches.steps_per_epoch == 20
    assert add_warm_up(TrainConfig(**given), batches) == TrainConfig(**{**given, "warmup_steps": warmup})


def test_altered_start_weights_are_refused_with_both_hashes(make):
    run = make()
    expected = run.read_config().start.weights_sha256
    data = bytearray(run.start.read_bytes())
    data[-1] ^= 1
    run.start.write_bytes(data)
    found = manifest.sha256_of_file(run.start)
    with pytest.raises(
        CheckpointError, match=rf"start\.safetensors has sha256 {found}, config\.json expects {expected}"
    ):
        finish(run)
    assert isinstance(run.read_failure(), CheckpointError)


def test_missing_start_weights_are_refused_by_name(make):
    run = make()
    run.start.unlink()
    with pytest.raises(CheckpointError, match=r"start\.safetensors is missing"):
        finish(run)


def test_a_start_file_that_is_not_safetensors_is_refused(make, tmp_path):
    (tmp_path / "weights").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match=r"start\.safetensors is not a safetensors file"):
        finish(make(weights=tmp_path / "weights"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"emb_dim": 32}, r"final_norm\.scale is \(16,\) in the file and \(32,\) in the model"),
        ({"context_length": 16}, r"pos_emb\.weight is \(32, 16\) in the file and \(16, 16\) in the model"),
        ({"n_layers": 1}, r"trf_blocks\.1\.\S+ is \(.*\) in the file and absent in the model"),
        ({"n_layers": 3}, r"trf_blocks\.2\.\S+ is absent in the file and \(.*\) in the model"),
    ],
)
def test_weights_of_another_shape_are_refused_with_the_key_and_both_shapes(make, model, said):
    with pytest.raises(CheckpointError, match=said):
        finish(make(model={**MODEL, **model}))


def test_a_checkpoint_of_a_training_with_another_start_is_refused_with_both_hashes(make):
    run = make()
    end_after(run, 2, kill=False)
    expected = run.read_config().start.weights_sha256
    edit_config(run, "start", "weights_sha256", "ef" * 32)
    with pytest.raises(CheckpointError, match=f"start.weights_sha256 is '{expected}', this training has '{'ef' * 32}'"):
        finish(run)

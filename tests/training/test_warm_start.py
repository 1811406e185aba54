"""Warm start: a training uses the weights of another model, and can be interrupted like any other training."""

import contextlib
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore import manifest
from gptcore.config import CorpusConfig, RunConfig, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.errors import CheckpointError
from gptcore.model.gpt import GPTModel
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.training.batches import Batches
from gptcore.training.loop import compute_mean_loss
from gptcore.training.resolve import TRAINING_VERSION
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from gptcore.training.warm_start import add_warm_up

MODEL = {"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
TRAIN = {
    "max_steps": 21,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "eval_every": 4,
    "eval_batches": 2,
    "checkpoint_steps": 4,
    "device": "cpu",
    "precision": "fp32",
    "compile": False,
    "threads": 1,
}
MEASURED = {"tokens_per_second", "seconds", "memory_mb", "time_ms"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    draw = random.Random(7)
    words = "the old man looked at a grey sea and said that nothing would come of it but wind".split()
    sentences = (" ".join(draw.choices(words, k=9)).capitalize() + ".\n\n" for _ in range(110))
    (root / "text.txt").write_text("".join(sentences))
    asked = {"sources": ("text.txt",), "block_bytes": 256, "val_fraction": 0.2, "holdout_fraction": 0.2}
    return tokenize(ingest(CorpusConfig(**asked), root / "corpora", root).path, "bytes", root / "tokens")


@pytest.fixture(scope="module")
def ancestor(tokens, tmp_path_factory):
    """The weights of a short training from scratch."""
    run = RunDirectory(tmp_path_factory.mktemp("ancestor") / "run")
    run.prepare(config(tokens, {"max_steps": 12, "seed": 5}))
    train_directory(run.path, Stop())
    return run.weights


@pytest.fixture
def make(tmp_path, tokens, ancestor):
    """A function that makes a run directory that starts from the ancestor's weights."""

    def prepared(name="run", model=MODEL, weights=ancestor, **train):
        run = RunDirectory(tmp_path / name)
        start = {"uri": "models:/gpt-a/3", "weights_sha256": manifest.sha256_of_file(weights)}
        run.prepare(config(tokens, {"start_from": "champion", **train}, model, start), weights)
        return run

    return prepared


def config(tokens, train, model=MODEL, start=None):
    return RunConfig(
        training_version=TRAINING_VERSION,
        tokens=str(tokens.path),
        tokens_sha256=tokens.sha256,
        model=model,
        vocab_size=tokens.n_vocab,
        train={**TRAIN, **train},
        start=start,
        run_key="ab" * 32,
    )


class Killed(BaseException):
    """A stand-in for SIGKILL: nothing is saved."""


class EndAfter:
    """A stand-in for `Stop` that requests a stop, or kills the training, once update `step` is logged."""

    def __init__(self, run: RunDirectory, step: int, kill: bool) -> None:
        self.run, self.step, self.kill = run, step, kill

    @property
    def reason(self):
        if self.run.read_metrics()[-1]["step"] < self.step:
            return None
        if self.kill:
            raise Killed
        return "the test"


def finish(run):
    return train_directory(run.path, Stop())


def end_after(run, step, kill):
    with contextlib.suppress(Killed):
        assert train_directory(run.path, EndAfter(run, step, kill)) is None
    assert run.read_result() is None


def what_came_out(run):
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in run.read_metrics()]
    return lines, {key: value for key, value in vars(run.read_result()).items() if key != "seconds"}


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
def test_an_interrupted_warm_start_ends_like_its_uninterrupted_twin(make, kill, step):
    twin, run = make("twin"), make()
    finish(twin)
    end_after(run, step, kill)
    finish(run)
    assert what_came_out(run) == what_came_out(twin)


def test_the_random_numbers_are_those_of_a_training_from_scratch(make, tokens, tmp_path):
    """Start from the same weights that the random seed gives, and expect the same as from scratch."""
    torch.manual_seed(123)
    fresh = GPTModel(make().read_config().cfg())
    save_file(fresh.state_dict(), tmp_path / "fresh.safetensors")
    warm = make("warm", weights=tmp_path / "fresh.safetensors", warmup_steps=2)
    scratch = RunDirectory(tmp_path / "scratch")
    scratch.prepare(config(tokens, {"warmup_steps": 2}))
    for run in (warm, scratch):
        finish(run)
    assert what_came_out(warm) == what_came_out(scratch)


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
        ({"qkv_bias": True}, r"trf_blocks\.0\.att\.W_key\.bias is absent in the file and \(16,\) in the model"),
    ],
)
def test_weights_of_another_shape_are_refused_with_the_key_and_both_shapes(make, model, said):
    with pytest.raises(CheckpointError, match=said):
        finish(make(model={**MODEL, **model}))


def test_a_checkpoint_of_a_training_with_another_start_is_refused_with_both_hashes(make):
    run = make()
    end_after(run, 2, kill=False)
    expected = run.read_config().start.weights_sha256
    path = run.path / "config.json"
    body = json.loads(path.read_text())
    body["start"]["weights_sha256"] = "ef" * 32
    path.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=f"start.weights_sha256 is '{expected}', this training has '{'ef' * 32}'"):
        finish(run)

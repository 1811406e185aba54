"""A loss or a gradient that is not finite: training ends before the update that it would spoil."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptcore.errors import TrainingDiverged
from gptcore.tokens.directory import Tokens
from gptcore.training import parallel, trainer
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from tests.trainings import TRAIN, outcome, prepare


class Spoiled:
    """A loss function that spoils the last micro-batch of update `step`: the loss itself, or its gradient."""

    def __init__(self, step: int, what: str, by: float) -> None:
        self.last_pass = step * TRAIN["accumulation"]
        self.what, self.by, self.passes = what, by, 0
        self.calc_loss_batch = parallel.calc_loss_batch

    def __call__(self, inputs: Tensor, targets: Tensor, model: Any, device: Any) -> Tensor:
        loss = self.calc_loss_batch(inputs, targets, model, device)
        if not torch.is_grad_enabled():
            return loss
        self.passes += 1
        if self.passes == self.last_pass:
            if self.what == "loss":
                return loss * self.by
            loss.register_hook(lambda gradient: gradient * self.by)
        return loss


def weights_before(tmp_path: Path, tokens: Tokens, step: int) -> dict[str, Tensor]:
    """Return the weights of an undisturbed training before update `step`."""
    run = prepare(tmp_path / "before", tokens, session_seconds=1e-9)
    for _ in range(step - 1):
        assert train_directory(run.path, Stop()) is None
    return load_file(run.checkpoints / f"step-{step - 1:08d}" / "model.safetensors")


@pytest.mark.parametrize("step", [2, 6], ids=["before any checkpoint", "after one"])
@pytest.mark.parametrize("by", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_training_before_the_update(
    tmp_path: Path, tokens: Tokens, what: str, by: float, step: int
) -> None:
    run, trainings = prepare(tmp_path / "run", tokens), []
    resumed = trainer._Training.resumed

    def watched(*given: Any) -> Any:
        trainings.append(resumed(*given))
        return trainings[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer._Training, "resumed", watched)
        patched.setattr(parallel, "calc_loss_batch", Spoiled(step, what, by))
        with pytest.raises(TrainingDiverged, match=rf"the {what}[a-z ]* of step {step} is (nan|inf)"):
            train_directory(run.path, Stop())
    weights = trainings[0].state.model.state_dict()
    assert {name: value.tolist() for name, value in weights.items()} == {
        name: value.tolist() for name, value in weights_before(tmp_path, tokens, step).items()
    }, "the weights are those before the update"
    assert run.read_result() is None and not run.final.exists()
    failure = run.read_failure()
    assert isinstance(failure, TrainingDiverged) and failure.step == step - 1
    assert [line["step"] for line in run.read_metrics()] == list(range(1, step))
    for path in run.path.rglob("*.safetensors"):
        assert all(torch.isfinite(value.float()).all() for value in load_file(path).values()), path


def test_a_restart_after_a_temporary_divergence_ends_like_the_twin(tmp_path: Path, tokens: Tokens) -> None:
    twin, run = prepare(tmp_path / "twin", tokens), prepare(tmp_path / "run", tokens)
    train_directory(twin.path, Stop())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parallel, "calc_loss_batch", Spoiled(6, "gradient", math.nan))
        with pytest.raises(TrainingDiverged):
            train_directory(run.path, Stop())
    train_directory(run.path, Stop())
    assert outcome(run) == outcome(twin) and run.read_failure() is None


def test_an_evaluation_that_is_not_finite_ends_the_training_with_nothing_to_register(
    tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(tmp_path / "run", tokens)
    monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: math.nan)
    with pytest.raises(TrainingDiverged, match="after step 1 are nan and nan"):
        train_directory(run.path, Stop())
    failure = run.read_failure()
    assert isinstance(failure, TrainingDiverged) and failure.step == 1 and run.read_result() is None

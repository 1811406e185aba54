"""The training loop: what an update does, when it is refused, when training ends, and what must not change weights."""

import math
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gptcore.config import TrainConfig
from gptcore.errors import TrainingDiverged
from gptcore.generation.generate import generate
from gptcore.model.gpt import GPTModel, is_untouched_gpt
from gptcore.tokens.tokenizer import get_tokenizer
from gptcore.train import train_model_simple
from gptcore.training import loop
from gptcore.training.batches import Batches, make_eval_batches
from gptcore.training.loop import compute_mean_loss, is_evaluation_step, run_updates, steps_in_budget, update_weights
from gptcore.training.resolve import resolve
from gptcore.training.state import TrainState
from tests.tiny import TINY_CFG

CONTEXT = TINY_CFG["context_length"]
TOKENS = np.random.default_rng(0).integers(0, 257, 20 * CONTEXT + 1).astype(np.uint16)


def train_config(**given):
    return TrainConfig(
        **{"batch_size": 4, "device": "cpu", "threads": 1, "precision": "fp32", "compile": False, **given}
    )


def batches(train):
    return Batches(TOKENS, CONTEXT, CONTEXT, train.batch_size, train.accumulation, train.seed)


def trained(train, cfg=TINY_CFG, between=lambda state: None):
    state = TrainState.initial(cfg, train)
    for _ in run_updates(state, batches(train), train):
        between(state)
    return state


def weights_of(model):
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


# Updates.


def test_the_initial_weights_depend_only_on_the_random_seed():
    train = train_config(seed=5)
    torch.manual_seed(5)
    expected = weights_of(GPTModel(TINY_CFG))
    torch.manual_seed(99)
    state = TrainState.initial(TINY_CFG, train)
    assert weights_of(state.model) == expected
    assert state.model.training and state.step == 0


def test_training_lowers_the_loss_on_the_training_tokens():
    train = train_config(max_steps=60, learning_rate=1e-2)
    every = make_eval_batches(TOKENS, CONTEXT, 4, None)
    state = TrainState.initial(TINY_CFG, train)
    before = compute_mean_loss(state.model, every, state.device)
    assert before == pytest.approx(math.log(257), rel=0.1), "an untrained model is close to uniform"
    assert compute_mean_loss(trained(train).model, every, state.device) < before - 1


def test_every_update_is_reported_with_its_numbers():
    train = train_config(max_steps=7, accumulation=2, learning_rate=0.01, schedule="linear", warmup_steps=1)
    state = TrainState.initial(TINY_CFG, train)
    updates = list(run_updates(state, batches(train), train))
    assert [update.step for update in updates] == list(range(1, 8))
    assert [update.tokens_seen for update in updates] == [128 * step for step in range(1, 8)]
    assert [update.epoch for update in updates] == pytest.approx([step / 2 for step in range(1, 8)])
    assert [update.progress for update in updates] == pytest.approx([step / 7 for step in range(1, 8)])
    rates = [0.01 * share for share in (1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert [update.learning_rate for update in updates] == pytest.approx(rates)
    assert all(0 < update.loss < 10 and update.grad_norm > 0 and update.tokens_per_second > 0 for update in updates)
    assert updates[-1].seconds == state.seconds > updates[0].seconds > 0


def test_accumulating_two_batches_of_four_gives_the_weights_of_one_batch_of_eight():
    two = trained(train_config(max_steps=6, batch_size=4, accumulation=2))
    one = trained(train_config(max_steps=6, batch_size=8, accumulation=1))
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_update_gives_a_tied_matrix_the_same_gradient_as_autograd(accumulation):
    train = train_config(accumulation=accumulation, grad_clip=0.0)
    state, plain = (TrainState.initial({**TINY_CFG, "tied": True, "init": "gpt2"}, train) for _ in range(2))
    micro_batches = batches(train).make_micro_batches(0)
    for inputs, targets in micro_batches:
        loss = torch.nn.functional.cross_entropy(plain.model(inputs).flatten(0, 1), targets.flatten())
        (loss / accumulation).backward()
    update_weights(state, micro_batches, 1e-3, train)
    expected = dict(plain.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-7, rtol=1e-4, msg=name)
    assert is_untouched_gpt(state.model), "the hook has been removed"


def test_blocks_are_compiled_if_compile_is_true():
    train = train_config(max_steps=2)
    with torch.compiler.set_stance("force_eager"):  # the C++ compiler is not under test
        compiled = trained(train_config(max_steps=2, compile=True))
    assert all(block._compiled_call_impl for block in compiled.model.trf_blocks)
    assert weights_of(compiled.model) == weights_of(trained(train).model)


def test_the_gradient_is_clipped_to_the_configured_norm():
    train = train_config(max_steps=1, grad_clip=0.01)
    state = TrainState.initial(TINY_CFG, train)
    (update,) = run_updates(state, batches(train), train)
    gradients = torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()])
    assert update.grad_norm > 0.01
    assert gradients.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_clipping_can_be_switched_off():
    train = train_config(max_steps=1, grad_clip=0)
    state = TrainState.initial(TINY_CFG, train)
    (update,) = run_updates(state, batches(train), train)
    gradients = torch.cat([parameter.grad.flatten() for parameter in state.model.parameters()])
    assert gradients.norm().item() == pytest.approx(update.grad_norm)


def test_equal_seeds_give_equal_weights_and_different_seeds_do_not():
    cfg = {**TINY_CFG, "drop_rate": 0.1}
    one, same, other = (trained(train_config(max_steps=4, seed=seed), cfg) for seed in (1, 1, 2))
    assert weights_of(one.model) == weights_of(same.model) != weights_of(other.model)


# What must not change the weights.


@pytest.mark.parametrize("every", [1, 3])
def test_evaluating_and_sampling_at_any_frequency_leave_the_weights_bitwise_unchanged(every):
    cfg, train = {**TINY_CFG, "drop_rate": 0.1}, train_config(max_steps=12)
    held_out = make_eval_batches(TOKENS, CONTEXT, 4, 2)

    def look(state):
        if state.step % every == 0:
            compute_mean_loss(state.model, held_out, state.device)
            state.record_evaluation(1.0)
            list(generate(state.model, [1, 2], 5, temperature=1.0, seed=3))
            assert state.model.training

    assert weights_of(trained(train, cfg, look).model) == weights_of(trained(train, cfg).model)


def test_the_mean_loss_weighs_a_smaller_last_batch_by_its_size():
    state = TrainState.initial(TINY_CFG, train_config())
    every = make_eval_batches(TOKENS, CONTEXT, 8, None)
    assert [len(inputs) for inputs, _ in every] == [8, 8, 4]
    one_by_one = [
        compute_mean_loss(state.model, [batch], state.device) for batch in make_eval_batches(TOKENS, CONTEXT, 1, None)
    ]
    assert compute_mean_loss(state.model, every, state.device) == pytest.approx(sum(one_by_one) / 20, rel=1e-5)


# Divergence.


def poisoned_weight(state):
    with torch.no_grad():
        state.model.out_head.weight[3, 3] = math.nan


def infinite_loss(state):
    with torch.no_grad():
        state.model.out_head.weight.mul_(1e38)


def infinite_gradient(state):
    state.model.pos_emb.weight.register_hook(lambda gradient: gradient * math.inf)


def nan_gradient(state):
    state.model.trf_blocks[0].ff.layers[0].bias.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize(
    ("inject", "said"),
    [
        (poisoned_weight, "the loss of step 4 is nan"),
        (infinite_loss, "the loss of step 4 is (inf|nan)"),
        (infinite_gradient, "the gradient norm of step 4 is (inf|nan)"),
        (nan_gradient, "the gradient norm of step 4 is nan"),
    ],
)
def test_divergence_is_raised_before_the_update(inject, said, grad_clip):
    train = train_config(max_steps=10, accumulation=2, grad_clip=grad_clip)
    state = TrainState.initial(TINY_CFG, train)
    steps = run_updates(state, batches(train), train)
    for _ in range(3):
        next(steps)
    inject(state)
    weights, moments = weights_of(state.model), str(state.optimizer.state_dict()["state"])
    with pytest.raises(TrainingDiverged, match=said) as caught:
        next(steps)
    assert caught.value.step == state.step == 3
    assert weights_of(state.model) == weights
    assert str(state.optimizer.state_dict()["state"]) == moments


def test_the_error_of_a_diverged_training_says_what_to_change():
    train = train_config(max_steps=1)
    state = TrainState.initial(TINY_CFG, train)
    poisoned_weight(state)
    with pytest.raises(TrainingDiverged, match=r"Lower train\.learning_rate"):
        next(run_updates(state, batches(train), train))


# Budgets.


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_epochs": 2}, 10),
        ({"max_tokens": 128}, 2),
        ({"max_tokens": 129}, 3),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_steps": 4, "max_epochs": 1, "max_tokens": 10_000}, 4),
    ],
)
def test_the_first_budget_that_is_used_up_ends_the_training(budget, steps):
    train = train_config(**budget)
    assert steps_in_budget(train, batches(train)) == steps
    assert trained(train).step == steps


def test_a_budget_of_seconds_ends_the_training_and_drives_the_schedule(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    train = train_config(max_seconds=4, schedule="linear", learning_rate=1.0)
    state = TrainState.initial(TINY_CFG, train)
    updates = list(run_updates(state, batches(train), train))
    assert state.seconds == 4, "each update took one second of the clock"
    assert [update.learning_rate for update in updates] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_used_up_budget_allows_no_further_update():
    train = train_config(max_steps=2)
    state = trained(train)
    assert list(run_updates(state, batches(train), train)) == []


# The best weights.


def test_the_best_weights_are_those_of_the_lowest_validation_loss():
    train = train_config(max_steps=4)
    losses, kept = iter([3.0, 2.0, 2.0, 2.5]), {}

    def note(state):
        kept[state.step] = weights_of(state.model)
        state.record_evaluation(next(losses))

    state = trained(train, between=note)
    assert (state.best.step, state.best.val_loss, state.stale_evaluations) == (2, 2.0, 2)
    assert {name: value.numpy().tobytes() for name, value in state.best.weights.items()} == kept[2]


def test_evaluations_fall_on_the_same_steps_as_in_the_book():
    assert [step for step in range(1, 20) if is_evaluation_step(step, 5)] == [1, 6, 11, 16]


def test_auto_settings_are_resolved_to_definite_values():
    resolved = resolve(TrainConfig())
    assert resolved.device != "auto" and resolved.precision in ("fp32", "bf16") and resolved.threads >= 1
    assert resolve(resolved) == resolved


def test_an_unfinished_training_keeps_its_precision_if_the_device_has_it(monkeypatch):
    assert resolve(TrainConfig(device="cpu"), "bf16").precision == "bf16"
    assert resolve(TrainConfig(device="cpu", precision="fp32"), "bf16").precision == "fp32"
    for is_newer in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_, is_newer=is_newer: is_newer)
        assert resolve(TrainConfig(device="mps"), "bf16").precision == ("bf16" if is_newer else "fp32")


# The book's loop.


def simple_setup(drop_rate=0.0):
    ids = torch.from_numpy(TOKENS[: 18 * CONTEXT + 1].astype(np.int64))
    windows = TensorDataset(ids[:-1].view(18, CONTEXT), ids[1:].view(18, CONTEXT))
    torch.manual_seed(123)
    model = GPTModel({**TINY_CFG, "drop_rate": drop_rate})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    return model, DataLoader(windows, batch_size=2, shuffle=True), DataLoader(windows, batch_size=2), optimizer


def run_simple(eval_freq=5, num_epochs=10, **given):
    model, train_loader, val_loader, optimizer = simple_setup(**given)
    tokenizer = get_tokenizer("bytes")
    history = train_model_simple(
        model, train_loader, val_loader, optimizer, "cpu", num_epochs, eval_freq, 2, "Every effort", tokenizer
    )
    return model, history


def test_train_model_simple_makes_and_prints_the_eighteen_evaluations_of_the_book(capsys):
    # Ten epochs of nine batches, evaluated every five updates, as in the book's chapter 5.
    model, (train_losses, val_losses, tokens_seen) = run_simple()
    assert len(train_losses) == len(val_losses) == len(tokens_seen) == 18
    assert tokens_seen == [(5 * number + 1) * 2 * CONTEXT for number in range(18)]
    assert train_losses[-1] < train_losses[0] and model.training
    lines = capsys.readouterr().out.splitlines()
    pattern = r"Ep (\d+) \(Step (\d{6})\): Train loss \d\.\d{3}, Val loss \d\.\d{3}"
    found = [match.groups() for line in lines if (match := re.fullmatch(pattern, line))]
    assert [int(step) for _, step in found] == list(range(0, 90, 5))
    assert [int(epoch) for epoch, _ in found] == [step // 9 + 1 for step in range(0, 90, 5)]
    assert sum(line.startswith("Every effort") for line in lines) == 10


def test_train_model_simple_stops_before_an_update_whose_loss_is_not_finite():
    model, train_loader, val_loader, optimizer = simple_setup()
    with torch.no_grad():
        model.out_head.weight.fill_(math.nan)
    weights = weights_of(model)
    with pytest.raises(TrainingDiverged, match="the loss of step 1 is nan"):
        train_model_simple(model, train_loader, val_loader, optimizer, "cpu", 1, 1, 1, "x", get_tokenizer("bytes"))
    assert weights_of(model) == weights

"""The losses against torch's own cross-entropy on all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import ConfigError
from gptcore.model import loss as loss_module
from gptcore.model.gpt import GPTModel
from gptcore.model.loss import calc_loss_batch, calc_loss_loader, fused_cross_entropy
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "vocab_size": 67, "context_length": 8}


def inputs(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def plain(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets)


def assert_same(hidden, weight, targets, atol, scale: float = 1.0):
    expected = plain(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected * scale, (hidden, weight))
    ours = fused_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(ours * scale, (hidden, weight))
    assert torch.allclose(ours, expected, atol=atol, rtol=atol), (ours.item(), expected.item())
    for mine, theirs in zip(grads, expected_grads):
        assert torch.allclose(mine, theirs, atol=atol, rtol=atol), (mine - theirs).abs().max()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 130),
    chunk=st.integers(1, 17),
    scale=st.sampled_from([1.0, 0.25, -3.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_cross_entropy_in_float64_whatever_the_shape(
    rows, width, vocabulary, chunk, scale, seed
):
    usual = loss_module._ROWS
    loss_module._ROWS = chunk
    try:
        assert_same(*inputs(rows, width, vocabulary, torch.float64, seed=seed), atol=1e-12, scale=scale)
    finally:
        loss_module._ROWS = usual


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1300])
def test_loss_and_gradients_equal_cross_entropy_in_float32(rows):
    assert_same(*inputs(rows, 32, 1003), atol=1e-5)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits_have_the_loss_of_cross_entropy(logit):
    hidden = torch.tensor([[1.0], [1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[logit], [0.0], [-logit], [3.0]], requires_grad=True)
    for target in range(4):
        assert_same(hidden, weight, torch.tensor([target, 0, 2]), atol=1e-5)


def test_very_unlikely_targets_keep_their_exact_loss_across_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "_ROWS", 7)
    hidden, weight, targets = inputs(50, 16, 40, scale=30.0)
    assert fused_cross_entropy(hidden, weight, targets).item() > 60
    assert_same(hidden, weight, targets, atol=2e-5)


def test_gradcheck_accepts_the_fused_loss():
    hidden, weight, targets = inputs(5, 3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: fused_cross_entropy(h, w, targets), (hidden, weight))


def test_backward_may_be_repeated_and_scaled():
    hidden, weight, targets = inputs(9, 4, 11)
    expected = torch.autograd.grad(plain(hidden, weight, targets), weight)[0]
    loss = fused_cross_entropy(hidden, weight, targets)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert torch.allclose(weight.grad, times * expected, atol=1e-6)
    weight.grad = None
    loss.backward(torch.tensor(-0.5))
    assert torch.allclose(weight.grad, -0.5 * expected, atol=1e-6)


def test_a_returned_gradient_is_not_shared_with_the_graph():
    hidden, weight, targets = inputs(9, 4, 11)
    loss = fused_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    loss.backward(retain_graph=True)
    weight.grad.zero_()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], first)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_tensors_get_no_gradient_and_the_others_get_the_right_one(frozen):
    hidden, weight, targets = inputs(9, 4, 11)
    expected = dict(zip(("hidden", "weight"), torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = fused_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.requires_grad:
            assert torch.allclose(tensor.grad, expected[name], atol=1e-6)
        else:
            assert tensor.grad is None


def test_a_batch_without_tokens_gives_no_gradient():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(300_000, 4, requires_grad=True)
    torch.full((300_000, 4), 7.0)  # the next buffer of this size may reuse this memory
    fused_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64)).backward()
    assert not (weight.grad.nan_to_num() != 0).any()


def test_ignored_targets_do_not_count():
    hidden, weight, targets = inputs(20, 4, 11)
    targets[3:9] = -100
    assert_same(hidden, weight, targets, atol=1e-6)
    assert math.isnan(fused_cross_entropy(hidden, weight, torch.full_like(targets, -100)).item())


@pytest.mark.parametrize("wrong", [11, -1])
def test_a_target_outside_the_vocabulary_is_an_error(wrong):
    hidden, weight, targets = inputs(20, 4, 11)
    targets[3] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|expected to be"):
        fused_cross_entropy(hidden, weight, targets)


def test_a_nan_in_the_hidden_states_gives_a_nan_loss():
    hidden, weight, targets = inputs(20, 4, 11)
    with torch.no_grad():
        hidden[4, 2] = math.nan
    assert math.isnan(fused_cross_entropy(hidden, weight, targets).item())


def test_bf16_keeps_the_softmax_and_the_loss_in_fp32():
    hidden, weight, targets = inputs(600, 32, 300, torch.bfloat16)
    loss = fused_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = plain(*wide, targets)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 2e-2
    for ours, theirs in ((hidden, wide[0]), (weight, wide[1])):
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-2
        # Rounding may scatter the gradient but not shorten it.
        assert abs(ours.grad.float().norm() / theirs.grad.norm() - 1) < 1e-3


def test_the_loss_under_autocast_equals_cross_entropy_under_autocast():
    torch.manual_seed(0)
    model = GPTModel(CFG)
    ids, targets = torch.randint(67, (2, 4, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss = calc_loss_batch(ids, targets, model, "cpu")
    assert loss.dtype == expected.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-4
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    ours = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 3e-2 * b.norm() + 1e-6


def batches(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(67, (2, size, 8), generator=generator)) for size in sizes]


def test_the_loader_loss_is_the_mean_over_batches_whatever_their_size():
    torch.manual_seed(0)
    model = GPTModel(CFG)
    loader = batches([4, 4, 1])
    single = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in loader]
    assert calc_loss_loader(loader, model, "cpu") == pytest.approx(sum(single) / 3, abs=1e-5)
    assert calc_loss_loader(loader, model, "cpu", num_batches=2) == pytest.approx(sum(single[:2]) / 2, abs=1e-5)
    assert calc_loss_loader(loader, model, "cpu", num_batches=50) == pytest.approx(sum(single) / 3, abs=1e-5)


def test_an_empty_loader_gives_nan_and_a_limit_of_zero_batches_is_refused():
    model = GPTModel(CFG)
    assert math.isnan(calc_loss_loader([], model, "cpu"))
    with pytest.raises(ConfigError, match="num_batches is 0"):
        calc_loss_loader(batches([1]), model, "cpu", num_batches=0)


def test_the_fused_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "_ROWS", 16)
    seen = []
    allocate = loss_module._allocate_logits
    monkeypatch.setattr(loss_module, "_allocate_logits", lambda *args: seen.append(allocate(*args)) or seen[-1])
    hidden, weight, targets = inputs(160, 8, 1000)
    fused_cross_entropy(hidden, weight, targets).backward()
    assert [tuple(buffer.shape) for buffer in seen] == [(16, 1024)]

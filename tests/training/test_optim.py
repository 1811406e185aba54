"""The optimizers against the arithmetic of their papers, and the learning rate against values worked out by hand."""

import pytest
import torch
from torch import nn

from gptcore.config import TrainConfig
from gptcore.model.gpt import GPTModel
from gptcore.training import muon
from gptcore.training.muon import Muon, orthogonalise
from gptcore.training.optim import learning_rate, make_optimizer, set_learning_rate
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "qkv_bias": True}


def test_weight_decay_acts_on_matrices_and_not_on_biases_and_gains():
    model = GPTModel(CFG)
    decayed, spared = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert {"tok_emb.weight", "pos_emb.weight", "out_head.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_frozen_parameters_are_left_out():
    model = GPTModel(CFG)
    model.tok_emb.weight.requires_grad_(False)
    optimised = [id(p) for group in make_optimizer(model, TrainConfig()).param_groups for p in group["params"]]
    assert id(model.tok_emb.weight) not in optimised


def test_the_first_update_is_the_one_of_the_adamw_paper():
    # Loshchilov & Hutter 2019, algorithm 2, at t = 1: the bias-corrected moments are g and g * g. First the weight
    # shrinks by learning rate times decay. Then the step is the learning rate times the sign of the gradient.
    matrix, bias = nn.Parameter(torch.tensor([[2.0, -1.0]])), nn.Parameter(torch.tensor([4.0]))
    module = nn.Module()
    module.matrix, module.bias = matrix, bias
    optimizer = make_optimizer(module, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    matrix.grad, bias.grad = torch.tensor([[3.0, -0.2]]), torch.tensor([7.0])
    optimizer.step()
    assert matrix.tolist()[0] == pytest.approx([2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1])
    assert bias.tolist() == pytest.approx([3.9])


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        ("constant", 0.0, 1.0),
        ("constant", 0.9, 1.0),
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.75),
        ("linear", 1.0, 0.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 1 / 3, 0.75),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, progress, share):
    cfg = TrainConfig(schedule=schedule, learning_rate=0.01)
    assert learning_rate(cfg, 500, progress) == pytest.approx(0.01 * share, abs=1e-15)


def test_the_learning_rate_rises_in_equal_steps_during_warm_up():
    cfg = TrainConfig(schedule="constant", learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(cfg, step, 0.0) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ("linear", [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ("cosine", [1 / 4, 2 / 4, 3 / 4, 1, 0.904508, 0.654508, 0.345492, 0.095492]),
    ],
)
def test_the_learning_rate_reaches_its_highest_value_after_the_warm_up_and_falls_from_there(schedule, shares):
    cfg = TrainConfig(schedule=schedule, learning_rate=1.0, warmup_steps=3)
    assert [learning_rate(cfg, step, step / 8) for step in range(8)] == pytest.approx(shares, abs=1e-6)
    in_seconds = [0.0, 0.1, 0.25, 0.4, 0.5, 0.7, 0.8, 0.95]  # updates of unequal length
    rates = [learning_rate(cfg, step, progress) for step, progress in enumerate(in_seconds)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[3:] == sorted(rates[3:], reverse=True)
    assert learning_rate(cfg, 8, 1.0) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_without_warm_up_the_first_update_has_the_full_learning_rate():
    assert learning_rate(TrainConfig(learning_rate=0.5), 0, 0.0) == 0.5


def test_every_parameter_group_gets_the_learning_rate():
    optimizer = make_optimizer(GPTModel(CFG), TrainConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_muon_makes_every_singular_value_of_its_step_about_one():
    matrices = torch.randn(3, 40, 16) @ torch.diag(torch.logspace(0, -2, 16))
    for made in (orthogonalise(matrices), orthogonalise(matrices.mT)):
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices[0], full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalise(matrices)[0].flatten(), (left @ right).flatten(), dim=0
    )
    assert cosine > 0.95
    made = orthogonalise(torch.stack([1e-3 * matrices[0], 0 * matrices[0]]))
    torch.testing.assert_close(made[0], orthogonalise(matrices)[0], rtol=1e-3, atol=1e-4)
    assert not made[1].any(), "no gradient, no step"


@pytest.mark.parametrize("smallest", [-1, -4])
def test_muon_gets_the_same_step_by_products_of_small_matrices(monkeypatch, smallest):
    long = torch.diag(torch.logspace(0, smallest, 16)) @ torch.randn(3, 16, 64)
    by_small_ones = orthogonalise(long)
    monkeypatch.setattr(muon, "_iterate_on_gram", muon._iterate)
    torch.testing.assert_close(by_small_ones, orthogonalise(long), rtol=1e-3, atol=1e-4)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPTModel(CFG)
    inner, matrices, vectors = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("trf_blocks" in names[id(p)] and p.dim() == 2 for p in inner["params"]) and len(inner["params"]) == 12
    assert {names[id(p)] for p in matrices["params"]} == {"tok_emb.weight", "pos_emb.weight", "out_head.weight"}
    assert (inner["weight_decay"], matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.3, 0.0)
    assert sum(len(group["params"]) for group in (inner, matrices, vectors)) == len(names)


def test_the_first_update_of_muon_is_as_large_as_adamws():
    module = nn.Module()
    module.trf_blocks = nn.Linear(64, 32, bias=False)
    weight = module.trf_blocks.weight
    optimizer = make_optimizer(module, TrainConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.5))
    before = weight.detach().clone()
    weight.grad = torch.randn(32, 64)
    optimizer.step()
    moved = weight.detach() - 0.95 * before
    assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)  # Liu et al. 2025, section 2.2
    assert (moved * weight.grad).sum() < 0


def test_parameters_that_muon_leaves_to_adamw_are_updated_exactly_as_by_torch():
    torch.manual_seed(1)
    mine, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    ours = Muon([{"params": [mine], "weight_decay": 0.3}], lr=0.01)
    torchs = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    for _ in range(4):
        mine.grad = torch.randn(5, 3)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    assert torch.equal(mine, theirs)

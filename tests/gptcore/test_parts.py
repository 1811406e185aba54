"""The parts that a model may be made of, each against its definition, and together in a model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gptcore import memory
from gptcore.attention import MultiHeadAttention, Rotary
from gptcore.config import ModelConfig, TrainConfig
from gptcore.errors import ConfigError
from gptcore.generate import generate_text_simple
from gptcore.loss import calc_loss_batch
from gptcore.model import GPTModel, RMSNorm, SquaredReLU, chosen, is_ours
from gptcore.optim import make_optimizer
from gptcore.recipes import PARTS, RECIPES
from gptcore.writing.decoder import Decoder

SEVEN = {
    "vocab_size": 101,
    "context_length": 12,
    "emb_dim": 24,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
EVERY_PART = [{key: value} for key, values in PARTS.items() for value in values]
MODELS = [*EVERY_PART, RECIPES["modern"], {**RECIPES["modern"], "bias": True, "norm": "layer", "init": "gpt2"}]


def model_of(parts: dict, seed: int = 1) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel({**SEVEN, **parts}).eval()
    for parameter in model.parameters():  # also what begins at zero takes part
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 101, (batch, count), generator=torch.Generator().manual_seed(3))


def test_the_first_of_each_part_is_the_seeds_model():
    seeds, named = (dict(made.named_parameters()) for made in (fresh({}), fresh(RECIPES["gpt2"])))
    assert list(seeds) == list(named)
    assert all(torch.equal(seeds[name], named[name]) for name in seeds)
    assert ModelConfig(size="nano").for_vocabulary(5).keys() == SEVEN.keys()


def fresh(parts: dict) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel({**SEVEN, **parts})


def test_rotary_turns_each_plane_of_a_head_by_position_times_its_rate():
    x = torch.randn(1, 1, 5, 6)
    turned = Rotary(6, context_length=9)(x, torch.arange(2, 7)[None])
    for token, plane in itertools.product(range(5), range(3)):
        angle = torch.tensor((token + 2) * 10_000.0 ** (-2 * plane / 6))
        number = torch.complex(x[0, 0, token, plane], x[0, 0, token, plane + 3]) * torch.polar(torch.tensor(1.0), angle)
        found = torch.complex(turned[0, 0, token, plane], turned[0, 0, token, plane + 3])
        assert torch.allclose(found, number, atol=1e-5)


def test_with_rotary_positions_only_distances_count():
    rotary = Rotary(8, context_length=20)
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = [(rotary(query, past + 3) * rotary(key, past)).sum() for past in (0, 5, 16)]
    assert torch.allclose(torch.stack(scores), scores[0].expand(3), atol=1e-5)


def test_normed_queries_and_keys_make_attention_blind_to_their_length():
    torch.manual_seed(1)
    attention = MultiHeadAttention(24, 24, 12, 0.0, 3, qk_norm=True)
    x = torch.randn(1, 6, 24)
    before = attention(x)
    with torch.no_grad():
        attention.W_query.weight *= 7
        attention.W_key.weight *= 0.1
    assert torch.allclose(attention(x), before, atol=1e-4)


def test_rms_norm_and_squared_relu_are_their_formulas():
    x = torch.randn(3, 5)
    assert torch.allclose(RMSNorm()(x), x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt())
    assert torch.equal(SquaredReLU()(x), torch.where(x > 0, x * x, 0.0))


@pytest.mark.parametrize("parts", MODELS, ids=str)
def test_a_model_of_any_parts_generates_the_same_with_its_cache_and_without(parts):
    model = model_of(parts)
    assert is_ours(model)
    prompt, decoder = ids(11), Decoder(model, rows=2)
    with torch.no_grad():
        pieces = [decoder.begin(prompt[:, :4].tolist()), *(decoder.extend(column.tolist()) for column in prompt.T[4:])]
    assert torch.allclose(torch.stack(pieces, dim=1), model(prompt)[:, 3:], atol=1e-4)
    plain = prompt[:, :4]
    for _ in range(14):  # beyond the context
        plain = torch.cat((plain, model(plain[:, -12:])[:, -1].argmax(dim=1, keepdim=True)), dim=1)
    assert torch.equal(generate_text_simple(model, prompt[:, :4], 14, 12), plain)


@pytest.mark.parametrize("parts", MODELS, ids=str)
def test_a_model_of_any_parts_looks_at_nothing_to_come_and_has_the_fused_loss_of_the_plain_one(parts):
    model = model_of(parts)
    inputs, targets = ids(12), ids(12)
    changed = inputs.clone()
    changed[:, 7:] = 5
    assert torch.allclose(model(inputs)[:, :7], model(changed)[:, :7], atol=1e-5)
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert calc_loss_batch(inputs, targets, model, "cpu").item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("init", PARTS["init"])
def test_a_tied_head_is_the_embedding_stored_and_learned_once(init, tmp_path):
    model, other = (fresh({"tied": True, "init": init}) for _ in range(2))
    assert model.is_tied and 0 < model.tok_emb.weight.std() < 0.2
    assert "out_head.weight" not in dict(model.named_parameters())
    with torch.no_grad():
        model.tok_emb.weight.normal_()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(ids(5)), model(ids(5)))
    inputs, targets = ids(12), ids(12)
    calc_loss_batch(inputs, targets, model, "cpu").backward()
    F.cross_entropy(other(inputs).flatten(0, 1), targets.flatten()).backward()
    assert torch.allclose(model.tok_emb.weight.grad, other.tok_emb.weight.grad, atol=1e-5)


def test_a_head_that_is_replaced_is_no_longer_tied():
    model = fresh({"tied": True})
    model.out_head = torch.nn.Linear(24, 101, bias=False)
    assert not model.is_tied and "out_head.weight" in model.state_dict()


@pytest.mark.parametrize("parts", MODELS, ids=str)
def test_the_parameters_of_any_parts_are_counted_right(parts):
    config = ModelConfig(size="nano", **parts)
    made = GPTModel(config.for_vocabulary(101))
    assert memory.num_parameters(config, 101) == sum(parameter.numel() for parameter in made.parameters())


def test_blocks_that_begin_as_the_identity_change_nothing_and_every_token_is_as_likely():
    model = fresh(RECIPES["modern"])
    embedded = F.rms_norm(model.tok_emb(ids(6)), (24,))
    assert torch.equal(model.trf_blocks(embedded), embedded)
    assert torch.equal(model(ids(6)), torch.zeros(2, 6, 101))


def test_gpt2_s_first_weights_have_its_deviations():
    torch.manual_seed(1)
    model = GPTModel({**SEVEN, "emb_dim": 96, "n_layers": 8, "init": "gpt2"})
    block = model.trf_blocks[3]
    assert model.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.att.W_query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.ff.layers[2].weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.ff.layers[0].bias.any()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_modern_recipe_learns(optimizer):
    model = fresh(RECIPES["modern"]).train()
    learns = make_optimizer(model, TrainConfig(optimizer=optimizer, learning_rate=0.02, weight_decay=0.0))
    inputs, targets = ids(12, batch=4), ids(12, batch=4).roll(-1, dims=1)
    losses = []
    for _ in range(30):
        learns.zero_grad()
        loss = calc_loss_batch(inputs, targets, model, "cpu")
        loss.backward()
        learns.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("key", "value"), [("positions", "none"), ("norm", None), ("qk_norm", "yes")])
def test_a_part_that_there_is_not_is_refused_with_those_that_there_are(key, value):
    with pytest.raises(ConfigError, match=f"{key} .*{value}.*must be one of"):
        chosen({key: value})


def test_heads_of_odd_width_cannot_turn():
    with pytest.raises(ConfigError, match="even width, found 5"):
        GPTModel({**SEVEN, "emb_dim": 15, "positions": "rotary"})
    with pytest.raises(ValueError, match="heads 5 wide; rotary positions need an even"):
        ModelConfig(emb_dim=15, n_heads=3, recipe="modern")


def test_a_part_that_is_given_overrides_its_recipe():
    parts = ModelConfig(recipe="modern", norm="layer", bias=True).parts()
    assert parts == {**RECIPES["modern"], "norm": "layer", "bias": True}

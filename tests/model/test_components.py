"""The components of a model: each against its definition, and together in a model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gptcore.components import COMPONENTS, RECIPES
from gptcore.config import ModelConfig, TrainConfig
from gptcore.errors import ConfigError
from gptcore.generation.generate import generate_text_simple
from gptcore.generation.kv_cache import Decoder
from gptcore.model.attention import MultiHeadAttention, Rotary
from gptcore.model.gpt import GPTModel, RMSNorm, SquaredReLU, is_untouched_gpt, read_components
from gptcore.model.loss import calc_loss_batch
from gptcore.training import memory
from gptcore.training.optim import make_optimizer
from tests.tiny import TINY_CFG

SEVEN = {**TINY_CFG, "vocab_size": 101, "context_length": 12, "emb_dim": 24, "n_heads": 3}
EVERY_PART = [{key: value} for key, values in COMPONENTS.items() for value in values]
MODELS = [*EVERY_PART, RECIPES["modern"], {**RECIPES["modern"], "bias": True, "norm": "layer", "init": "gpt2"}]


def model_of(parts: dict, seed: int = 1) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel({**SEVEN, **parts}).eval()
    for parameter in model.parameters():  # so that parameters that start at zero count too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 101, (batch, count), generator=torch.Generator().manual_seed(3))


def test_without_components_a_config_makes_the_books_model():
    seeds, named = (dict(made.named_parameters()) for made in (fresh({}), fresh(RECIPES["gpt2"])))
    assert list(seeds) == list(named)
    assert all(torch.equal(seeds[name], named[name]) for name in seeds)
    assert ModelConfig(size="nano").build_cfg(5).keys() == SEVEN.keys()


def fresh(parts: dict) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel({**SEVEN, **parts})


def test_rotary_rotates_each_plane_of_a_head_by_position_times_its_rate():
    x = torch.randn(1, 1, 5, 6)
    turned = Rotary(6, context_length=9)(x, torch.arange(2, 7)[None])
    for token, plane in itertools.product(range(5), range(3)):
        angle = torch.tensor((token + 2) * 10_000.0 ** (-2 * plane / 6))
        number = torch.complex(x[0, 0, token, plane], x[0, 0, token, plane + 3]) * torch.polar(torch.tensor(1.0), angle)
        found = torch.complex(turned[0, 0, token, plane], turned[0, 0, token, plane + 3])
        assert torch.allclose(found, number, atol=1e-5)


def test_with_rotary_positions_scores_depend_only_on_distances():
    rotary = Rotary(8, context_length=20)
    query, key = torch.randn(2, 1, 1, 1, 8)
    scores = [(rotary(query, past + 3) * rotary(key, past)).sum() for past in (0, 5, 16)]
    assert torch.allclose(torch.stack(scores), scores[0].expand(3), atol=1e-5)


def test_with_qk_norm_attention_does_not_depend_on_the_length_of_queries_and_keys():
    torch.manual_seed(1)
    attention = MultiHeadAttention(24, 24, 12, 0.0, 3, qk_norm=True)
    x = torch.randn(1, 6, 24)
    before = attention(x)
    with torch.no_grad():
        attention.W_query.weight *= 7
        attention.W_key.weight *= 0.1
    assert torch.allclose(attention(x), before, atol=1e-4)


def test_rms_norm_and_squared_relu_match_their_formulas():
    x = torch.randn(3, 5)
    assert torch.allclose(RMSNorm()(x), x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt())
    assert torch.equal(SquaredReLU()(x), torch.where(x > 0, x * x, 0.0))


@pytest.mark.parametrize("parts", MODELS, ids=str)
def test_a_model_of_any_components_generates_the_same_with_and_without_its_cache(parts):
    model = model_of(parts)
    assert is_untouched_gpt(model)
    prompt, decoder = ids(11), Decoder(model, rows=2)
    with torch.no_grad():
        pieces = [
            decoder.prefill(prompt[:, :4].tolist()),
            *(decoder.decode(column.tolist()) for column in prompt.T[4:]),
        ]
    assert torch.allclose(torch.stack(pieces, dim=1), model(prompt)[:, 3:], atol=1e-4)
    plain = prompt[:, :4]
    for _ in range(14):  # beyond the context
        plain = torch.cat((plain, model(plain[:, -12:])[:, -1].argmax(dim=1, keepdim=True)), dim=1)
    assert torch.equal(generate_text_simple(model, prompt[:, :4], 14, 12), plain)


@pytest.mark.parametrize("parts", MODELS, ids=str)
def test_a_model_of_any_components_ignores_later_tokens_and_its_fused_loss_equals_the_plain_loss(parts):
    model = model_of(parts)
    inputs, targets = ids(12), ids(12)
    changed = inputs.clone()
    changed[:, 7:] = 5
    assert torch.allclose(model(inputs)[:, :7], model(changed)[:, :7], atol=1e-5)
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert calc_loss_batch(inputs, targets, model, "cpu").item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("init", COMPONENTS["init"])
def test_a_tied_head_and_the_embedding_are_stored_and_trained_as_one_matrix(init, tmp_path):
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
def test_parameters_of_any_components_are_counted_correctly(parts):
    config = ModelConfig(size="nano", **parts)
    made = GPTModel(config.build_cfg(101))
    assert memory.num_parameters(config, 101) == sum(parameter.numel() for parameter in made.parameters())


def test_an_untrained_modern_model_has_identity_blocks_and_predicts_all_tokens_equally():
    model = fresh(RECIPES["modern"])
    embedded = F.rms_norm(model.tok_emb(ids(6)), (24,))
    assert torch.equal(model.trf_blocks(embedded), embedded)
    assert torch.equal(model(ids(6)), torch.zeros(2, 6, 101))


def test_initial_weights_have_the_standard_deviations_of_gpt2():
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
def test_an_unknown_component_is_refused_with_the_known_ones(key, value):
    with pytest.raises(ConfigError, match=f"{key} .*{value}.*must be one of"):
        read_components({key: value})


def test_rotary_positions_refuse_heads_of_odd_width():
    with pytest.raises(ConfigError, match="even width, found 5"):
        GPTModel({**SEVEN, "emb_dim": 15, "positions": "rotary"})
    with pytest.raises(ValueError, match="heads 5 wide; rotary positions need an even"):
        ModelConfig(emb_dim=15, n_heads=3, recipe="modern")


def test_an_explicit_component_overrides_its_recipe():
    parts = ModelConfig(recipe="modern", norm="layer", bias=True).components()
    assert parts == {**RECIPES["modern"], "norm": "layer", "bias": True}

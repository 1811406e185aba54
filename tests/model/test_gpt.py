"""The model against a plain reimplementation of the book's GPT with only nn.Linear, nn.Embedding and arithmetic."""

import math

import pytest
import torch
from torch import nn

from gptcore.errors import ConfigError
from gptcore.model.attention import MultiHeadAttention
from gptcore.model.gpt import GELU, FeedForward, GPTModel, LayerNorm, TransformerBlock, eval_mode, is_untouched_gpt
from gptcore.model.loss import calc_loss_batch
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "vocab_size": 101, "context_length": 12, "emb_dim": 24, "n_heads": 3}
GPT2_SMALL = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def plain_parameters(cfg: dict) -> dict[str, torch.Tensor]:
    """Return names and initial values in the book's order of creation, drawn from the global random state."""
    made: dict[str, torch.Tensor] = {}

    def linear(name: str, n_in: int, n_out: int, bias: bool) -> None:
        layer = nn.Linear(n_in, n_out, bias=bias)
        made[f"{name}.weight"] = layer.weight
        if bias:
            made[f"{name}.bias"] = layer.bias

    def norm(name: str) -> None:
        made[f"{name}.scale"] = nn.Parameter(torch.ones(width))
        made[f"{name}.shift"] = nn.Parameter(torch.zeros(width))

    width = cfg["emb_dim"]
    made["tok_emb.weight"] = nn.Embedding(cfg["vocab_size"], width).weight
    made["pos_emb.weight"] = nn.Embedding(cfg["context_length"], width).weight
    for i in range(cfg["n_layers"]):
        for part in ("W_query", "W_key", "W_value"):
            linear(f"trf_blocks.{i}.att.{part}", width, width, cfg["qkv_bias"])
        linear(f"trf_blocks.{i}.att.out_proj", width, width, True)
        linear(f"trf_blocks.{i}.ff.layers.0", width, 4 * width, True)
        linear(f"trf_blocks.{i}.ff.layers.2", 4 * width, width, True)
        norm(f"trf_blocks.{i}.norm1")
        norm(f"trf_blocks.{i}.norm2")
    norm("final_norm")
    linear("out_head", width, cfg["vocab_size"], False)
    return made


def plain_logits(p: dict[str, torch.Tensor], cfg: dict, ids: torch.Tensor) -> torch.Tensor:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return p[f"{name}.scale"] * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + p[f"{name}.shift"]

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        outputs = []
        parts = [linear(f"{name}.{part}", x).chunk(cfg["n_heads"], -1) for part in ("W_query", "W_key", "W_value")]
        for query, key, value in zip(*parts):
            scores = (query @ key.transpose(1, 2)).masked_fill(future, -math.inf)
            outputs.append(torch.softmax(scores / key.shape[-1] ** 0.5, -1) @ value)
        return linear(f"{name}.out_proj", torch.cat(outputs, -1))

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = p["tok_emb.weight"][ids] + p["pos_emb.weight"][: ids.shape[1]]
    for i in range(cfg["n_layers"]):
        x = x + attention(f"trf_blocks.{i}.att", norm(f"trf_blocks.{i}.norm1", x))
        inner = gelu(linear(f"trf_blocks.{i}.ff.layers.0", norm(f"trf_blocks.{i}.norm2", x)))
        x = x + linear(f"trf_blocks.{i}.ff.layers.2", inner)
    return linear("out_head", norm("final_norm", x))


def seeded_model(seed: int = 123, **changes: object) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel({**CFG, **changes})


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(CFG["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_random_seed_gives_the_books_parameter_names_order_and_values(qkv_bias):
    cfg = {**CFG, "qkv_bias": qkv_bias}
    torch.manual_seed(123)
    expected = plain_parameters(cfg)
    state_after = torch.get_rng_state()
    model = seeded_model(qkv_bias=qkv_bias)
    assert [name for name, _ in model.named_parameters()] == list(expected)
    assert list(model.state_dict()) == list(expected)
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(torch.get_rng_state(), state_after)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_loss_and_gradients_are_those_of_the_plain_reimplementation(qkv_bias):
    cfg = {**CFG, "qkv_bias": qkv_bias}
    torch.manual_seed(5)
    expected = plain_parameters(cfg)
    model = seeded_model(5, qkv_bias=qkv_bias)
    ids, targets = some_ids(2, 24).chunk(2, -1)
    logits = plain_logits(expected, cfg, ids)
    assert torch.allclose(model(ids), logits, atol=1e-5)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    ours = calc_loss_batch(ids, targets, model, "cpu")
    ours.backward()
    assert abs(ours.item() - loss.item()) < 1e-5
    for name, value in model.named_parameters():
        assert torch.allclose(value.grad, expected[name].grad, atol=1e-5), name


def test_gpt2_small_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPTModel(GPT2_SMALL)
    total = sum(p.numel() for p in model.parameters())
    assert total == 163_009_536
    assert total - model.out_head.weight.numel() == 124_412_160


def test_a_state_dict_of_the_books_code_loads_with_its_masks():
    torch.manual_seed(7)
    saved = {name: value.detach() for name, value in plain_parameters(CFG).items()}
    for i in range(CFG["n_layers"]):
        saved[f"trf_blocks.{i}.att.mask"] = torch.triu(torch.ones(12, 12), diagonal=1)
    before = set(saved)
    model = GPTModel(CFG)
    model.load_state_dict(saved)
    assert set(saved) == before
    assert torch.allclose(model(some_ids(1, 12)), plain_logits(saved, CFG, some_ids(1, 12)), atol=1e-5)


def test_a_single_attention_loads_with_its_mask_and_refuses_other_unknown_keys():
    attention = MultiHeadAttention(8, 8, 4, 0.0, 2)
    state = {**attention.state_dict(), "mask": torch.ones(4, 4)}
    attention.load_state_dict(state)
    with pytest.raises(RuntimeError, match="mask2"):
        attention.load_state_dict({**state, "mask2": torch.ones(1)})


def test_a_sequence_longer_than_the_context_is_refused_with_both_numbers():
    model = seeded_model()
    with pytest.raises(ConfigError, match=r"13 tokens .* 12"):
        model(some_ids(1, 13))
    with pytest.raises(ConfigError, match=r"5 tokens .* 4"):
        MultiHeadAttention(8, 8, 4, 0.0, 2)(torch.zeros(1, 5, 8))


@pytest.mark.parametrize("wrong", [101, 5000, -1])
def test_an_id_outside_the_vocabulary_is_refused_and_named(wrong):
    ids = some_ids(2, 6)
    ids[1, 3] = wrong
    with pytest.raises(ConfigError, match=rf"token id {wrong} .* vocabulary of 101"):
        seeded_model()(ids)


@pytest.mark.parametrize("key", list(CFG))
def test_a_missing_key_is_refused_and_named(key):
    with pytest.raises(ConfigError, match=rf"lacks {key}"):
        GPTModel({name: value for name, value in CFG.items() if name != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "context_length 0"),
        ({"vocab_size": -3}, "vocab_size -3"),
        ({"n_layers": 2.5}, "n_layers 2.5"),
        ({"n_heads": 5}, "emb_dim 24.*n_heads 5"),
        ({"drop_rate": 1.5}, "drop_rate 1.5"),
        ({"emb_dim": True}, "emb_dim True"),
    ],
)
def test_a_wrong_value_is_refused_with_key_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        GPTModel({**CFG, **change})


def test_attention_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ConfigError, match=r"d_out 10 .* num_heads 4"):
        MultiHeadAttention(8, 10, 4, 0.0, 4)


def test_attention_may_change_the_width():
    attention = MultiHeadAttention(d_in=3, d_out=6, context_length=5, dropout=0.0, num_heads=2, qkv_bias=True)
    assert attention(torch.randn(4, 5, 3)).shape == (4, 5, 6)


def test_no_token_sees_a_later_token():
    model = seeded_model().eval()
    ids = some_ids(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 101
    a, b = model(ids), model(changed)
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6)
    assert not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)


def test_dropout_acts_in_training_only_and_keeps_the_expectation():
    model = seeded_model(drop_rate=0.2)
    ids = some_ids(1, 12)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    attention = model.trf_blocks[0].att.train()
    x = torch.randn(1, 12, 24)
    mean = torch.stack([attention(x) for _ in range(3000)]).mean(0)
    assert torch.allclose(mean, attention.eval()(x), atol=0.05)


def test_a_hook_on_the_attention_dropout_sees_the_attention_weights_and_changes_no_result():
    model = seeded_model().eval()
    ids = some_ids(2, 12)
    expected = model(ids)
    seen = []
    model.trf_blocks[1].att.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.allclose(model(ids), expected, atol=1e-5)
    (weights,) = seen
    assert weights.shape == (2, 3, 12, 12)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 12), atol=1e-5)
    assert weights.triu(1).abs().max() == 0


def test_a_replaced_attention_dropout_is_called():
    class Silence(nn.Module):
        def forward(self, x):
            return x * 0

    attention = MultiHeadAttention(8, 8, 4, 0.0, 2)
    attention.dropout = Silence()
    assert torch.allclose(attention(torch.randn(1, 4, 8)), attention.out_proj.bias.expand(1, 4, 8))


def test_norm_gelu_and_feed_forward_agree_with_pytorchs_own():
    x = torch.randn(2, 5, 24)
    assert torch.allclose(LayerNorm(24)(x), nn.LayerNorm(24)(x), atol=1e-6)
    assert torch.allclose(GELU()(x), nn.GELU("tanh")(x), atol=1e-6)
    feed = FeedForward({"emb_dim": 24})
    assert [tuple(p.shape) for p in feed.parameters()] == [(96, 24), (96,), (24, 96), (24,)]
    assert feed(x).shape == x.shape


def test_a_transformer_block_works_alone():
    block = TransformerBlock(CFG)
    assert block(torch.randn(2, 12, 24)).shape == (2, 12, 24)


def test_eval_mode_restores_the_mode_of_every_module():
    model = seeded_model(drop_rate=0.5)
    model.trf_blocks[0].eval()
    before = [part.training for part in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == before
    assert True in before and False in before


def test_a_model_counts_as_untouched_until_it_is_changed():
    assert is_untouched_gpt(seeded_model())

    def hooked(model):
        model.trf_blocks[1].ff.register_forward_hook(lambda *_: None)

    def replaced(model):
        model.trf_blocks[0].norm1 = nn.LayerNorm(24)

    def parametrised(model):
        nn.utils.parametrizations.orthogonal(model.trf_blocks[0].att.W_key)

    def patched(model):
        model.trf_blocks[0].forward = lambda x: x

    for touch in (hooked, replaced, parametrised, patched):
        model = seeded_model()
        touch(model)
        assert not is_untouched_gpt(model), touch.__name__


def test_torch_compile_traces_the_model_as_one_graph():
    model = seeded_model().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = some_ids(2, 12)
    with torch.no_grad():
        assert torch.allclose(compiled(ids), model(ids), atol=1e-6)

"""Text generation, compared with the plain loop that runs the whole window through the model for every token."""

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptcore.components import RECIPES
from gptcore.errors import ConfigError
from gptcore.generation.generate import (
    TextStream,
    generate,
    generate_and_print_sample,
    generate_text_simple,
    stream_text,
    text_to_token_ids,
    token_ids_to_text,
)
from gptcore.model.attention import MultiHeadAttention
from gptcore.model.gpt import GELU, GPTModel, LayerNorm
from gptcore.tokens.tokenizer import get_tokenizer
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "emb_dim": 32, "n_heads": 4}


def seeded_model(**changes: object) -> GPTModel:
    """Return a model with weights so large that no two logits nearly tie."""
    torch.manual_seed(123)
    model = GPTModel({**CFG, **changes})
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("weight") and "emb" not in name:
                value.mul_(4)
    return model.eval()


def plain_loop(model, idx, max_new_tokens, context_size):
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])
        idx = torch.cat((idx, torch.softmax(logits[:, -1], -1).argmax(-1, keepdim=True)), dim=1)
    return idx


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(CFG["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> tiktoken.Encoding:
    special = {"<|endoftext|>": 256}
    return tiktoken.Encoding(
        "some-bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens=special
    )


@pytest.mark.parametrize("context_size", [1, 5, 16])
@pytest.mark.parametrize("prompt", [1, 7, 16, 21])
def test_the_ids_equal_those_of_the_plain_loop_even_past_the_context(context_size, prompt):
    model = seeded_model()
    ids = some_ids(3, prompt)
    assert torch.equal(
        generate_text_simple(model, ids, 24, context_size), plain_loop(model, ids.clone(), 24, context_size)
    )


def test_a_context_size_larger_than_the_models_is_reduced_to_the_models():
    model = seeded_model()
    ids = some_ids(2, 20)
    assert torch.equal(generate_text_simple(model, ids, 8, 1000), plain_loop(model, ids, 8, 16))


def test_with_the_cache_the_model_reads_each_token_once(monkeypatch):
    model = seeded_model()
    widths = []
    embed = GPTModel.embed
    monkeypatch.setattr(GPTModel, "embed", lambda self, ids: widths.append(ids.shape[1]) or embed(self, ids))
    generate_text_simple(model, some_ids(1, 4), 6, 16)
    assert widths == [4, 1, 1, 1, 1, 1]


def test_a_model_with_a_hook_sees_whole_windows_as_in_the_plain_loop():
    model = seeded_model()
    steered = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 3

    def steer_last(module, args, output):
        return torch.cat((output[:, :-1], output[:, -1:] + steered), dim=1)

    untouched = generate_text_simple(model, some_ids(2, 4), 10, 16)
    model.trf_blocks[0].register_forward_hook(steer_last)
    steered_ids = generate_text_simple(model, some_ids(2, 4), 10, 16)
    assert torch.equal(steered_ids, plain_loop(model, some_ids(2, 4), 10, 16))
    assert not torch.equal(steered_ids, untouched)


def test_any_module_that_maps_ids_to_logits_can_generate():
    class Successor(nn.Module):
        def forward(self, ids):
            return nn.functional.one_hot((ids + 1) % 10, 10).float()

    assert generate_text_simple(Successor(), torch.tensor([[7]]), 5, 3).tolist() == [[7, 8, 9, 0, 1, 2]]


class Steered(nn.Module):
    """A module that a student puts around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return 1.7 * self.inner(*args).roll(1, -1)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, module)


RECIPE = {**RECIPES["modern"], "init": "pytorch"}
PARTS = [
    (changes, name) for changes in ({}, RECIPE) for name, _ in GPTModel({**CFG, **changes}).named_modules() if name
]


@pytest.mark.parametrize(("changes", "name"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_that_a_student_replaces_is_used_wherever_it_is(changes, name):
    model = seeded_model(**changes)
    untouched = generate_text_simple(model, some_ids(2, 4), 6, 16)
    replace(model, name, Steered(model.get_submodule(name)))
    model.eval()
    ids = generate_text_simple(model, some_ids(2, 4), 6, 16)
    assert torch.equal(ids, plain_loop(model, some_ids(2, 4), 6, 16))
    assert list(generate(model, some_ids(2, 4)[0].tolist(), 6, temperature=0)) == ids[0, 4:].tolist()
    assert not torch.equal(ids, untouched)


def other_heads(model: nn.Module) -> None:
    block = model.trf_blocks[1]
    other = MultiHeadAttention(32, 32, 16, 0.0, num_heads=2)
    other.load_state_dict(block.att.state_dict())
    block.att = other


CHANGES = {
    "a norm for a dropout": lambda model: setattr(model.trf_blocks[0], "drop_shortcut", LayerNorm(32)),
    "a third layer": lambda model: model.trf_blocks[0].ff.layers.append(nn.Linear(32, 32)),
    "a layer less": lambda model: setattr(model.trf_blocks[0].ff, "layers", nn.Sequential(nn.Linear(32, 32))),
    "other heads in one block": other_heads,
    "no block": lambda model: setattr(model, "trf_blocks", nn.Sequential()),
    "a layer after the blocks": lambda model: model.trf_blocks.append(nn.Linear(32, 32)),
    "a norm as a block": lambda model: model.trf_blocks.insert(1, LayerNorm(32)),
    "an activation for a norm": lambda model: setattr(model.trf_blocks[1], "norm2", GELU()),
    "a head with a hidden layer": lambda m: setattr(m, "out_head", nn.Sequential(nn.Linear(32, 9), nn.Linear(9, 257))),
    "positions of limited length": lambda m: setattr(m, "pos_emb", nn.Embedding(16, 32, max_norm=0.1)),
    "no positions": lambda model: setattr(model, "pos_emb", None),
    "another method": lambda m: setattr(
        m.trf_blocks[0].att, "_attend", lambda queries, keys, values: values.roll(1, 2)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_text_of_a_changed_model_is_that_of_its_own_forward(change):
    model = seeded_model()
    untouched = generate_text_simple(model, some_ids(2, 4), 10, 16)
    CHANGES[change](model)
    ids = generate_text_simple(model.eval(), some_ids(2, 4), 10, 16)
    assert torch.equal(ids, plain_loop(model, some_ids(2, 4), 10, 16)) and not torch.equal(ids, untouched)


def test_a_model_in_training_mode_keeps_its_dropout_and_its_mode():
    model = seeded_model(drop_rate=0.5).train()
    torch.manual_seed(4)
    ours = generate_text_simple(model, some_ids(1, 4), 10, 16)
    torch.manual_seed(4)
    assert torch.equal(ours, plain_loop(model, some_ids(1, 4), 10, 16))
    assert model.training


def test_zero_new_tokens_return_the_prompt_and_wrong_sizes_are_refused():
    model = seeded_model()
    assert torch.equal(generate_text_simple(model, some_ids(2, 4), 0, 16), some_ids(2, 4))
    with pytest.raises(ConfigError, match="prompt is empty"):
        generate_text_simple(model, some_ids(2, 0), 1, 16)
    with pytest.raises(ConfigError, match="context_size is 0"):
        generate_text_simple(model, some_ids(2, 4), 1, 0)


def test_text_and_ids_round_trip_with_raw_encodings_and_our_tokenizers(tokenizer):
    for each in (tokenizer, get_tokenizer("bytes")):
        ids = text_to_token_ids("Tea.", each)
        assert ids.tolist() == [[84, 101, 97, 46]]
        assert ids.dtype == torch.int64
        assert token_ids_to_text(ids, each) == "Tea."
        assert text_to_token_ids("", each).shape == (1, 0)
        assert text_to_token_ids("", each).dtype == torch.int64
        assert token_ids_to_text(torch.tensor([[84]]), each) == "T"


def test_the_end_of_text_string_is_special_in_a_raw_encoding_and_text_in_our_tokenizer(tokenizer):
    assert text_to_token_ids("a<|endoftext|>", tokenizer).tolist() == [[97, 256]]
    ours = text_to_token_ids("a<|endoftext|>", get_tokenizer("bytes"))
    assert ours.tolist() == [list(b"a<|endoftext|>")]


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_is_printed_on_one_line_and_leaves_mode_and_random_state_unchanged(tokenizer, capsys, training):
    model = seeded_model(drop_rate=0.3).train(training)
    state = torch.get_rng_state()
    generate_and_print_sample(model, tokenizer, "cpu", "a\nb")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    expected = plain_loop(model.eval(), text_to_token_ids("a\nb", tokenizer), 50, 16)
    assert capsys.readouterr().out == token_ids_to_text(expected, tokenizer).replace("\n", " ") + "\n"


def test_past_the_context_the_newer_half_of_the_window_is_kept():
    model = seeded_model()
    window, expected = some_ids(9).tolist(), []
    for _ in range(40):
        with torch.no_grad():
            token = int(model(torch.tensor([window]))[0, -1].argmax())
        expected.append(token)
        window.append(token)
        if len(window) > 16:
            window = window[-8:]
    assert list(generate(model, some_ids(9).tolist(), 40, temperature=0)) == expected
    model.final_norm.register_forward_hook(lambda *_: None)
    assert list(generate(model, some_ids(9).tolist(), 40, temperature=0)) == expected


@pytest.mark.parametrize("context", [1, 2, 3])
def test_models_with_the_smallest_contexts_can_generate(context):
    assert len(list(generate(seeded_model(context_length=context), [1, 2, 3, 4], 9, seed=0))) == 9


def test_a_seed_repeats_its_text_and_the_global_random_state_is_unchanged():
    model = seeded_model(drop_rate=0.2).train()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    draws = [list(generate(model, [1, 2], 30, temperature=2.0, seed=seed)) for seed in (1, 1, 2, None, None)]
    assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize(
    ("settings_given", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.7246, 0.1812, 0.0652, 0.029]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.85}, [5 / 9, 5 / 18, 1 / 6, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution_that_the_settings_describe(settings_given, expected):
    model = seeded_model(vocab_size=4, context_length=1)
    with torch.no_grad():
        # The hidden states are constant, so the head alone decides.
        model.final_norm.scale.zero_()
        model.final_norm.shift.copy_(torch.eye(32)[0])
        model.out_head.weight.zero_()
        model.out_head.weight[:, 0] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    draws = torch.tensor(list(generate(model, [0], 2000, seed=5, **settings_given)))
    shares = torch.bincount(draws, minlength=4) / 2000
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float32), atol=0.04)
    assert ((shares > 0) == (torch.tensor(expected) > 0)).all()


def test_between_two_ids_the_model_is_in_its_own_mode():
    model = seeded_model().train()
    stream = generate(model, [3], 20, seed=0)
    for _ in range(3):
        next(stream)
        assert model.training
        assert not torch.is_inference_mode_enabled()
        assert model(some_ids(1, 3)).requires_grad
    stream.close()
    assert model.training


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_streamed_text_never_ends_inside_a_character(text):
    tokenizer = get_tokenizer("bytes")
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert pieces == list(text)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 255), max_size=20))
def test_streamed_text_equals_the_text_decoded_at_once(ids):
    tokenizer = get_tokenizer("bytes")
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_is_streamed_from_a_raw_encoding_character_by_character(tokenizer):
    stream = stream_text(tokenizer, iter([104, 0xC3, 0xA9, 0xE2]))
    assert [next(stream), next(stream), next(stream)] == ["h", "é", "\ufffd"]


@settings(max_examples=100)
@given(st.text("abc€", max_size=20), st.lists(st.text("abc€", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_complete_stop_string_and_shows_no_part_of_it(text, stop):
    tokenizer = get_tokenizer("bytes")
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    shown = ""
    for piece in stream_text(tokenizer, tokenizer.encode(text), stop):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    stream = TextStream(get_tokenizer("bytes"), ["ab!", "x"])
    assert [stream.push(byte) for byte in b"caba"] == ["c", "", "", "ab"]
    assert (stream.finish(), stream.stopped) == ("a", False)
    stream = TextStream(get_tokenizer("bytes"), ["ab!", "x"])
    assert [stream.push(byte) for byte in b"yab!z"] == ["y", "", "", "", ""]
    assert (stream.finish(), stream.stopped) == ("", True)
    with pytest.raises(ConfigError, match="stop string is empty"):
        TextStream(get_tokenizer("bytes"), [""])

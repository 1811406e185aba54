"""Several texts at once, each against the same text written alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptcore.errors import CheckpointError, ConfigError
from gptcore.generate import generate, generate_batch
from gptcore.recipes import RECIPES
from gptcore.writing import quantize as quantize_room
from gptcore.writing.batch import Batch
from gptcore.writing.decoder import Decoder, WholeWindows
from gptcore.writing.quantize import Int8Linear, quantize
from gptcore.writing.sampling import Sampling
from tests.gptcore.test_generate import plain_loop, seeded_model, some_ids

PROMPTS = [some_ids(7).tolist(), [5], some_ids(30)[9:].tolist(), [1, 2, 3], some_ids(16).tolist(), [200] * 4]
"""One of them longer than the context of 16."""


@pytest.mark.parametrize("parts", [{}, RECIPES["modern"]], ids=["gpt2", "modern"])
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_prompts_of_unequal_length_written_side_by_side_are_each_as_alone(parts, rows):
    model = seeded_model(**parts)
    if parts:
        torch.manual_seed(8)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    for sampling in (Sampling(0), Sampling(1.5, top_k=40, repetition_penalty=1.2)):
        alone = [generate(model, p, 40, **vars(sampling), seed=3 + i) for i, p in enumerate(PROMPTS)]
        assert generate_batch(model, PROMPTS, 40, sampling, seed=3, rows=rows) == [list(text) for text in alone]


def test_every_row_ends_by_itself_where_its_end_of_text_comes():
    model = seeded_model()
    endless = generate_batch(model, PROMPTS, 30, Sampling(2.0), seed=1)
    ends = {endless[0][4], endless[1][9]}
    ended = generate_batch(model, PROMPTS, 30, Sampling(2.0), seed=1, eos_id=ends)
    for whole, text in zip(endless, ended):
        first = next((i for i, token in enumerate(whole) if token in ends), None)
        assert text == whole[:first]


def test_what_a_row_has_not_read_yet_counts_for_nothing():
    model = seeded_model()
    decoder = Decoder(model, rows=2)
    decoder._store.fill_(1e4)
    decoder.begin([PROMPTS[0], PROMPTS[1]])
    with torch.no_grad():
        logits = decoder.extend([3, 4])
        assert torch.allclose(logits[1], model(torch.tensor([[*PROMPTS[1], 4]]))[0, -1], atol=1e-4)


def test_memory_that_nobody_wrote_to_counts_for_nothing():
    expected = generate_batch(seeded_model(), PROMPTS, 12, Sampling(0))
    torch.use_deterministic_algorithms(True)  # fills what is left uninitialised with what is no number
    try:
        assert generate_batch(seeded_model(), PROMPTS, 12, Sampling(0)) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_texts_join_and_leave_while_others_are_written():
    model = seeded_model()
    alone = [list(generate(model, p, 25, temperature=0)) for p in PROMPTS]
    batch = Batch(model, rows=3)
    first, second = (batch.add(p, 25, Sampling(0)) for p in PROMPTS[:2])
    for _ in range(4):
        batch.step()
    third = batch.add(PROMPTS[2], 25, Sampling(0))
    assert batch.free == 0
    batch.step()
    batch.drop(first)  # the last row takes its place
    fourth = batch.add(PROMPTS[3], 25, Sampling(0))
    while fourth.finish_reason is None:
        assert fourth in batch.step()
    assert (first.ids, first.finish_reason) == (alone[0][:5], None)
    assert [second.ids, third.ids, fourth.ids] == alone[1:4]
    assert (second.finish_reason, batch.free) == ("length", 3)
    batch.drop(fourth)  # is gone already


def test_a_prompt_is_not_padded_to_more_than_twice_its_length(monkeypatch):
    read = []
    begin = Decoder.begin
    monkeypatch.setattr(Decoder, "begin", lambda self, p: read.append(sorted(map(len, p))) or begin(self, p))
    generate_batch(seeded_model(), [[1] * length for length in (16, 3, 9, 8, 2, 1)], 1)
    assert read == [[9, 16], [8], [2, 3], [1]]


def test_a_model_with_a_hook_is_called_on_whole_windows_row_by_row():
    model = seeded_model()
    model.trf_blocks[0].register_forward_hook(lambda *_: None)
    assert type(Batch(model, 2)._decoder) is WholeWindows
    hooked = generate_batch(model, PROMPTS, 20, Sampling(0), rows=4)
    assert hooked == generate_batch(seeded_model(), PROMPTS, 20, Sampling(0), rows=4)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([257], {}, "token id 257 .* vocabulary of 257"),
        ([-1], {}, "token id -1"),
        ([[1], [2]], {}, "generate_batch"),
        ([1.5], {}, "whole numbers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_continued_is_refused_when_it_is_added(prompt, settings, message):
    batch = Batch(seeded_model(), 1)
    with pytest.raises(ConfigError, match=message):
        batch.add(prompt, **{"max_new_tokens": 5, **settings})
    assert batch.free == 1


def test_weights_that_are_no_numbers_are_named_when_the_first_token_is_drawn():
    model = seeded_model()
    with torch.no_grad():
        model.out_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="damaged"):
        next(generate(model, [1], 3, seed=0))
    with pytest.raises(CheckpointError, match="no number"):
        quantize(model)


@pytest.fixture
def int8_model():
    torch.manual_seed(2)
    model = seeded_model(tied=True, qkv_bias=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    quantize(model)
    return model


def test_an_int8_layer_is_the_layer_but_for_its_rounding():
    torch.manual_seed(1)
    linear, x = nn.Linear(64, 48), torch.randn(5, 3, 64)
    model = nn.Sequential(linear)
    expected = model(x)
    quantize(model)
    assert type(model[0]) is Int8Linear
    rounded = x.div(x.abs().max() / 63).round().mul(x.abs().max() / 63)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    assert torch.allclose(model(x), expected, atol=0.1)
    assert not torch.equal(model(x), expected)
    assert torch.allclose(model(x), F.linear(rounded, (linear.weight / scale).round() * scale, linear.bias), atol=0.05)


def test_an_int8_model_generates_the_same_with_its_cache_and_without(int8_model):
    decoder = Decoder(int8_model, 1)
    window = some_ids(9)
    with torch.no_grad():
        pieces = [decoder.begin([window[:4].tolist()]), *(decoder.extend([int(token)]) for token in window[4:])]
        whole = int8_model(window[None])[0, 3:]
    assert torch.allclose(torch.cat(pieces), whole, atol=0.02 * float(whole.abs().max()))  # inputs are rounded together
    assert len(generate_batch(int8_model, PROMPTS, 20, Sampling(0))) == len(PROMPTS)
    assert plain_loop(int8_model, some_ids(1, 4), 2, 16).shape == (1, 6)


def test_what_cannot_be_rounded_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"'int3'.* int8"):
        quantize(seeded_model(), "int3")
    with pytest.raises(ConfigError, match="on meta"):
        quantize(seeded_model().to("meta"))
    monkeypatch.setattr(quantize_room, "_ENGINE", "an engine of another processor")
    with pytest.raises(ConfigError, match=r"FBGEMM.* leave --quantize out"):
        quantize(seeded_model())

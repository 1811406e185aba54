"""Batched generation: each text must equal the text that its prompt gets alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptcore.components import RECIPES
from gptcore.errors import CheckpointError, ConfigError
from gptcore.generation import quantize as quantize_room
from gptcore.generation.batch import Batch
from gptcore.generation.generate import generate, generate_batch
from gptcore.generation.kv_cache import Decoder, UncachedDecoder
from gptcore.generation.quantize import Int8Linear, quantize
from gptcore.generation.sampling import Sampling
from tests.generation.test_generate import plain_loop, seeded_model, some_ids

PROMPTS = [some_ids(7).tolist(), [5], some_ids(30)[9:].tolist(), [1, 2, 3], some_ids(16).tolist(), [200] * 4]
"""One prompt is longer than the context of 16 tokens."""


@pytest.mark.parametrize("parts", [{}, RECIPES["modern"]], ids=["gpt2", "modern"])
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_a_batch_of_prompts_of_unequal_length_gives_each_the_text_it_gets_alone(parts, rows):
    model = seeded_model(**parts)
    if parts:
        torch.manual_seed(8)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    for sampling in (Sampling(0), Sampling(1.5, top_k=40, repetition_penalty=1.2)):
        alone = [generate(model, p, 40, **vars(sampling), seed=3 + i) for i, p in enumerate(PROMPTS)]
        assert generate_batch(model, PROMPTS, 40, sampling, seed=3, rows=rows) == [list(text) for text in alone]


def test_the_end_of_text_id_that_ends_a_request_has_a_log_probability_too():
    model = seeded_model()
    batch = Batch(model, 2)
    free = batch.add([1, 2, 3], 5, Sampling(temperature=0), top_logprobs=2)
    batch.step()
    ended = batch.add([1, 2, 3], 5, Sampling(temperature=0), eos_id=free.ids[0], top_logprobs=0)
    while free.finish_reason is None:
        batch.step()
    assert (ended.finish_reason, ended.ids) == ("stop", [])
    assert [score.token for score in ended.scores] == free.ids[:1]
    assert [score.top[0] for score in free.scores] == [(score.token, score.logprob) for score in free.scores]
    assert ended.scores[0].logprob == pytest.approx(free.scores[0].logprob)


def test_each_row_ends_at_its_own_end_of_text_id():
    model = seeded_model()
    endless = generate_batch(model, PROMPTS, 30, Sampling(2.0), seed=1)
    ends = {endless[0][4], endless[1][9]}
    ended = generate_batch(model, PROMPTS, 30, Sampling(2.0), seed=1, eos_id=ends)
    for whole, text in zip(endless, ended):
        first = next((i for i, token in enumerate(whole) if token in ends), None)
        assert text == whole[:first]


def test_old_values_in_the_cache_do_not_change_the_logits():
    model = seeded_model()
    decoder = Decoder(model, rows=2)
    decoder._cache.fill_(1e4)
    decoder.prefill([PROMPTS[0], PROMPTS[1]])
    with torch.no_grad():
        logits = decoder.decode([3, 4])
        assert torch.allclose(logits[1], model(torch.tensor([[*PROMPTS[1], 4]]))[0, -1], atol=1e-4)


def test_uninitialised_memory_does_not_change_the_generated_text():
    expected = generate_batch(seeded_model(), PROMPTS, 12, Sampling(0))
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert generate_batch(seeded_model(), PROMPTS, 12, Sampling(0)) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_requests_join_and_leave_a_batch_while_others_are_generated():
    model = seeded_model()
    alone = [list(generate(model, p, 25, temperature=0)) for p in PROMPTS]
    batch = Batch(model, rows=3)
    first, second = (batch.add(p, 25, Sampling(0)) for p in PROMPTS[:2])
    for _ in range(4):
        batch.step()
    third = batch.add(PROMPTS[2], 25, Sampling(0))
    assert batch.free == 0
    batch.step()
    batch.drop(first)  # the last row moves into the freed row
    fourth = batch.add(PROMPTS[3], 25, Sampling(0))
    while fourth.finish_reason is None:
        assert fourth in batch.step()
    assert (first.ids, first.finish_reason) == (alone[0][:5], None)
    assert [second.ids, third.ids, fourth.ids] == alone[1:4]
    assert (second.finish_reason, batch.free) == ("length", 3)
    batch.drop(fourth)  # has left the batch already


def test_a_draw_that_fails_ends_its_own_request_alone(monkeypatch):
    alone = list(generate(seeded_model(), PROMPTS[0], 10, temperature=0))
    batch = Batch(seeded_model(), rows=3)
    bad = Sampling(0.5)
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda self, *given: 1 / 0 if self is bad else draw(self, *given))
    first, failing, last = (batch.add(PROMPTS[0], 10, sampling) for sampling in (Sampling(0), bad, Sampling(0)))
    assert batch.step() == [first, failing, last]
    assert (failing.finish_reason, type(failing.error), batch.free) == ("error", ZeroDivisionError, 1)
    while first.finish_reason is None:
        batch.step()
    assert first.ids == last.ids == alone and first.error is None
    with pytest.raises(ZeroDivisionError):
        generate_batch(seeded_model(), PROMPTS, 3, bad)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_prompt_that_cannot_be_read_leaves_the_texts_under_way_as_they_are(monkeypatch, is_cached):
    model = seeded_model()
    if not is_cached:
        model.trf_blocks[0].register_forward_hook(lambda *_: None)
    alone = list(generate(model, PROMPTS[0], 10, temperature=0))
    batch = Batch(model, rows=2)
    first = batch.add(PROMPTS[0], 10, Sampling(0))
    batch.step()
    failing = batch.add([1, 2, 3], 10, Sampling(0))
    with monkeypatch.context() as patched:
        kind, name = (Decoder, "_read") if is_cached else (UncachedDecoder, "_predict")
        read = getattr(kind, name)

        def fail_at_prompts(self, ids, *more, **named):
            length = ids.shape[1] if is_cached else len(ids[0])
            if length == 3:
                raise MemoryError
            return read(self, ids, *more, **named)

        patched.setattr(kind, name, fail_at_prompts)
        assert batch.step() == [first, failing]
    assert isinstance(failing.error, MemoryError) and batch.free == 1
    while first.finish_reason is None:
        batch.step()
    assert first.ids == alone


def test_a_prompt_is_not_padded_to_more_than_twice_its_length(monkeypatch):
    read = []
    begin = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, p: read.append(sorted(map(len, p))) or begin(self, p))
    generate_batch(seeded_model(), [[1] * length for length in (16, 3, 9, 8, 2, 1)], 1)
    assert read == [[9, 16], [8], [2, 3], [1]]


def test_a_model_with_a_hook_is_called_on_whole_windows_row_by_row():
    model = seeded_model()
    model.trf_blocks[0].register_forward_hook(lambda *_: None)
    assert type(Batch(model, 2)._decoder) is UncachedDecoder
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
def test_an_invalid_request_is_refused_when_it_is_added(prompt, settings, message):
    batch = Batch(seeded_model(), 1)
    with pytest.raises(ConfigError, match=message):
        batch.add(prompt, **{"max_new_tokens": 5, **settings})
    assert batch.free == 1


def test_nan_weights_are_refused_at_the_first_token_and_by_quantize():
    model = seeded_model()
    with torch.no_grad():
        model.out_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="damaged"):
        next(generate(model, [1], 3, seed=0))
    with pytest.raises(CheckpointError, match="not a number"):
        quantize(model)


@pytest.fixture
def int8_model():
    torch.manual_seed(2)
    model = seeded_model(tied=True, qkv_bias=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    quantize(model)
    return model


def test_an_int8_layer_differs_from_the_original_only_by_rounding():
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


def test_an_int8_model_has_the_same_logits_with_and_without_its_cache(int8_model):
    decoder = Decoder(int8_model, 1)
    window = some_ids(9)
    with torch.no_grad():
        pieces = [decoder.prefill([window[:4].tolist()]), *(decoder.decode([int(token)]) for token in window[4:])]
        whole = int8_model(window[None])[0, 3:]
    assert torch.allclose(torch.cat(pieces), whole, atol=0.02 * float(whole.abs().max()))  # one scale per call
    assert len(generate_batch(int8_model, PROMPTS, 20, Sampling(0))) == len(PROMPTS)
    assert plain_loop(int8_model, some_ids(1, 4), 2, 16).shape == (1, 6)


def test_quantize_refuses_an_unknown_mode_a_model_off_the_cpu_and_a_missing_engine(monkeypatch):
    with pytest.raises(ConfigError, match=r"'int3'.* int8"):
        quantize(seeded_model(), "int3")
    with pytest.raises(ConfigError, match="on meta"):
        quantize(seeded_model().to("meta"))
    monkeypatch.setattr(quantize_room, "_ENGINE", "an engine of another processor")
    with pytest.raises(ConfigError, match=r"FBGEMM.* Leave --quantize out"):
        quantize(seeded_model())

"""Sampling: which tokens may be drawn, and how likely. Filters are compared with Hugging Face's on the same logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import ConfigError
from gptcore.generation.sampling import Sampling

SEEN = [3, 3, 8, 0, 150]


def their_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    theirs = pytest.importorskip("transformers.generation.logits_process")
    steps = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps += [theirs.TemperatureLogitsWarper(sampling.temperature)]
    steps += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = logits[None].clone()
    for step in steps:
        scores = step(torch.tensor([SEEN]), scores)
    return torch.softmax(scores[0], dim=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_k=7),
        Sampling(top_k=10**6),
        Sampling(top_p=0.8),
        Sampling(top_p=0.999),
        Sampling(top_p=1e-9),
        Sampling(min_p=0.2),
        Sampling(min_p=1.0),
        Sampling(repetition_penalty=1.7),
        Sampling(repetition_penalty=0.6),
        Sampling(temperature=1.4, top_k=90, top_p=0.7, min_p=0.05, repetition_penalty=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [200, 50257])
def test_a_filter_keeps_the_same_tokens_as_hugging_faces_filter(sampling, vocab_size):
    for seed, width in enumerate((0.2, 3.0)):  # the flat distribution needs more than the first 1,024 tokens
        logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * width
        weights, expected = sampling.weights(logits, SEEN), their_probabilities(logits, sampling)
        own = weights / weights.sum()
        differ = (own > 0) != (expected > 0)
        assert (own + expected)[differ].sum() < 1e-4, "tokens differ only at the cut-off, where a long sum is rounded"
        assert torch.allclose(own[~differ], expected[~differ], atol=1e-6)


@settings(max_examples=60)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 5e-324, 1e-39, 1e-30, 0.7, 50.0, 1e300]),
        top_k=st.none() | st.integers(1, 50) | st.just(2**70),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
    ),
)
def test_any_valid_settings_draw_an_id_with_a_positive_weight(logits, sampling):
    scores = torch.tensor(logits)
    seen = [0, len(logits) - 1]
    weights = sampling.weights(scores, seen)
    assert 0 < float(weights.sum()) < math.inf
    assert weights[sampling.draw(scores, seen, torch.Generator().manual_seed(1))] > 0
    assert torch.equal(scores, torch.tensor(logits)), "the logits are unchanged"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -1}, "min_p is -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty is 1e-39; it must lie between 0.01 and 100"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e"),
    ],
)
def test_a_setting_out_of_range_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)

"""How much a model has memorized: text that it saw often is completed, and the count equals that of real decoding."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from gptcore.evaluation import memorization as module
from gptcore.evaluation.memorization import Completions, Memorization, measure_memorization, pick_passages
from gptcore.generation.generate import generate_text_simple
from gptcore.model.gpt import GPTModel
from tests.tiny import TINY_CFG

EOT = 256
LENGTH = 16


@pytest.fixture(scope="module")
def tokens():
    """Random tokens with one passage of 40 that is there 60 times, between end-of-text ids."""
    draw = np.random.default_rng(0)
    often, once = draw.integers(0, 256, 40), draw.integers(0, 256, (60, 40))
    return np.concatenate([[*own, EOT, *often, EOT] for own in once]).astype(np.uint16)


@pytest.fixture(scope="module")
def model(tokens):
    """A model that has learned the repeated passage, and no other one, by heart."""
    torch.manual_seed(3)
    model, ids = GPTModel(TINY_CFG), torch.from_numpy(tokens.astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        windows = ids[torch.randint(0, len(ids) - 17, (32, 1)) + torch.arange(17)]  # (32, 17)
        loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def cut(tokens, starts, length=LENGTH):
    return np.array([tokens[start : start + length] for start in starts], np.int64)


def test_repeated_text_is_completed_and_text_that_was_there_once_is_not(model, tokens):
    model.train()
    found = measure_memorization(model, tokens, EOT, "cpu")
    assert found.prefix_tokens == 8, "half of the context of 16"
    assert found.repeated.sampled == 25 and found.repeated.share >= 0.9, "the 25 passages of 16 tokens in 40"
    assert found.once.sampled == 200 and found.once.share < 0.05 < found.repeated.low
    assert model.training and measure_memorization(model, tokens, EOT, "cpu") == found
    assert Memorization.from_json(asdict(found)) == found


def test_the_count_is_that_of_greedy_decoding(model, tokens):
    once, repeated = pick_passages(tokens, EOT, LENGTH)
    model.eval()
    for starts, expected in ((once, 0), (repeated, 1)):
        passages = torch.from_numpy(cut(tokens, starts))  # (passages, 16)
        decoded = generate_text_simple(model, passages[:, :8], max_new_tokens=8, context_size=16)
        completed = int((decoded == passages).all(dim=1).sum())
        assert module._count_completed(model, passages.numpy(), "cpu") == completed
        assert (completed > 0) == expected


def test_passages_are_counted_exactly_and_lie_inside_one_document(tokens, monkeypatch):
    once, repeated = pick_passages(tokens, EOT, LENGTH)
    text = tokens.astype(">u2").tobytes()
    for starts, expected in ((once, {1}), (repeated, {60})):
        passages = cut(tokens, starts)
        assert len(np.unique(passages, axis=0)) == len(starts) and EOT not in passages
        found = {
            sum(text[at : at + 32] == row.tobytes() for at in range(0, len(text), 2))
            for row in passages[:20].astype(">u2")
        }
        assert found == expected
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 37)
    for whole, in_chunks in zip((once, repeated), pick_passages(tokens, EOT, LENGTH)):
        assert np.array_equal(cut(tokens, whole), cut(tokens, in_chunks))


def test_of_a_long_text_a_part_of_the_passages_is_counted_as_exactly(tokens, monkeypatch):
    monkeypatch.setattr(module, "_CANDIDATES", 800)
    once, repeated = pick_passages(tokens, EOT, LENGTH)
    assert 100 < len(once) <= 200 and 0 < len(repeated) < 15
    monkeypatch.setattr(module, "_CANDIDATES", 2**20)
    monkeypatch.setattr(module, "SAMPLES", 10_000)
    for some, every in zip((once, repeated), pick_passages(tokens, EOT, LENGTH)):
        assert {tuple(row) for row in cut(tokens, some)} <= {tuple(row) for row in cut(tokens, every)}


@pytest.mark.parametrize("count", [0, 15])
def test_a_text_without_a_passage_of_that_length_is_not_measured(model, count):
    found = measure_memorization(model, np.arange(count, dtype=np.uint16), EOT, "cpu")
    assert found.once == found.repeated == Completions(0, 0, None, None, None)


def test_a_model_whose_numbers_are_not_finite_completes_nothing(tokens):
    broken = GPTModel(TINY_CFG)
    torch.nn.init.constant_(broken.out_head.weight, float("nan"))
    found = measure_memorization(broken, tokens, EOT, "cpu")
    assert found.once.completed == found.repeated.completed == 0


@pytest.mark.parametrize(
    ("completed", "sampled", "low", "high"),
    # by scipy.stats.binomtest(completed, sampled).proportion_ci(method="wilson")
    [(0, 10, 0.0, 0.277533), (1, 200, 0.000883, 0.027774), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168)],
)
def test_the_interval_is_wilsons(completed, sampled, low, high):
    found = Completions.count(sampled, completed)
    assert found.share == completed / sampled
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-6), pytest.approx(high, abs=2e-6))

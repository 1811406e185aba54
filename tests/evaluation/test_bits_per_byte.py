"""Losses and scores: they equal an exhaustive computation, and evaluating does not change the training state."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gptcore.corpus.snapshot import Block
from gptcore.errors import CorpusError
from gptcore.evaluation import bits_per_byte as module
from gptcore.evaluation.bits_per_byte import Evaluation, evaluate_blocks, evaluate_model, plan_windows, score_blocks
from gptcore.generation.quantize import quantize
from gptcore.model.gpt import GPTModel
from gptcore.model.loss import calc_loss_loader
from gptcore.training.preserve import preserve_training_state
from tests.tiny import TINY_CFG

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße, 世界!",
    "x",
    "a somewhat longer text, so that several windows are needed to see it all " * 2,
]


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = GPTModel({**TINY_CFG, "drop_rate": 0.5})
    with torch.no_grad():
        model.out_head.weight *= 5  # far from uniform, so that a wrong window changes the score
    return model


def blocks(texts):
    return [Block(document=index, sha256=f"{index:064x}", text=text) for index, text in enumerate(texts)]


def exhaustive(model, tokenizer, text):
    """Return nats, rank and position of each token, each from its own forward pass, following the definition."""
    context, half = model.context_length, model.context_length // 2
    sequence = [tokenizer.eot, *tokenizer.encode(text)]
    model.eval()
    found = []
    for target in range(1, len(sequence)):
        begin = 0
        while begin + context < target:
            begin += half
        with torch.no_grad():
            logits = model(torch.tensor([sequence[begin:target]]))[0, -1].double()
        nats = -torch.log_softmax(logits, 0)[sequence[target]].item()
        found.append((nats, int((logits > logits[sequence[target]]).sum()), target - 1 - begin))
    return found


def test_every_token_is_scored_as_by_its_own_forward_pass(model, tokenizer):
    for text, score in zip(TEXTS, score_blocks(model, tokenizer, TEXTS, "cpu")):
        nats, ranks, positions = zip(*exhaustive(model, tokenizer, text))
        np.testing.assert_allclose(score.nats, nats, atol=1e-4)
        assert score.ranks.tolist() == list(ranks)
        assert score.positions.tolist() == list(positions)
        assert score.num_bytes == len(text.encode())


def test_a_model_with_another_head_is_scored_by_its_logits(model, tokenizer):
    expected = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    model.out_head = nn.Sequential(model.out_head)
    found = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert (found.top1, found.top5) == (expected.top1, expected.top5)
    with torch.no_grad():
        model.out_head[0].weight.fill_(math.nan)
    assert evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu").top5 == 0


def test_quantized_weights_get_their_own_score(model, tokenizer):
    plain = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu").bits_per_byte
    quantize(model)
    assert 0 < abs(evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu").bits_per_byte - plain) < 0.05


def test_bits_per_byte_is_the_sum_of_nats_divided_by_ln_2_and_by_the_utf8_bytes(model, tokenizer):
    evaluation = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    each = [exhaustive(model, tokenizer, text) for text in TEXTS]
    every = [entry for block in each for entry in block]
    nats = sum(entry[0] for entry in every)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert evaluation.loss == pytest.approx(nats / len(every), rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(nats / len(every)), rel=1e-4)
    assert evaluation.top1 == pytest.approx(np.mean([rank < 1 for _, rank, _ in every]))
    assert evaluation.top5 == pytest.approx(np.mean([rank < 5 for _, rank, _ in every]))
    for position, loss in enumerate(evaluation.loss_by_position):
        assert loss == pytest.approx(np.mean([nats for nats, _, at in every if at == position]), rel=1e-4)
    totals = [sum(entry[0] for entry in block) for block in each]
    assert [block["nats"] for block in evaluation.per_block] == pytest.approx(totals, rel=1e-5)
    assert (evaluation.blocks, evaluation.bytes, evaluation.tokens) == (len(TEXTS), num_bytes, len(every))


@pytest.mark.parametrize("context", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 40])
def test_windows_predict_every_token_once_and_advance_by_half_a_context(tokens, context):
    found = list(plan_windows(tokens, context))
    assert [token for _, first, end in found for token in range(first, end)] == list(range(tokens))
    assert [begin for begin, _, _ in found] == [index * max(1, context // 2) for index in range(len(found))]
    assert all(begin <= first < end <= begin + context for begin, first, end in found)


@pytest.mark.parametrize(("batch_tokens", "logit_rows", "group"), [(1, 1, 1), (40, 3, 2), (10**6, 10**6, 10**6)])
def test_a_score_does_not_depend_on_how_texts_are_batched(
    model, tokenizer, monkeypatch, batch_tokens, logit_rows, group
):
    before = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr("gptcore.model.loss._ROWS", logit_rows)
    monkeypatch.setattr(module, "GROUP_BLOCKS", group)
    after = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    alone = [evaluate_blocks(model, tokenizer, [block], "cpu") for block in blocks(TEXTS)]
    nats = [block["nats"] for block in before.per_block]
    assert [block["nats"] for block in after.per_block] == pytest.approx(nats, rel=1e-5)
    assert [block.per_block[0]["nats"] for block in alone] == pytest.approx(nats, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token_and_has_no_hits(model, tokenizer):
    torch.nn.init.zeros_(model.out_head.weight)
    evaluation = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    expected = math.log2(tokenizer.n_vocab) * evaluation.tokens / evaluation.bytes
    assert evaluation.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert evaluation.perplexity == pytest.approx(tokenizer.n_vocab, rel=1e-5)
    assert evaluation.top1 == evaluation.top5 == 0.0


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_the_score_of_a_broken_model_is_not_finite_and_null_in_json(model, tokenizer, weight):
    torch.nn.init.constant_(model.out_head.weight, weight)
    evaluation = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    assert not math.isfinite(evaluation.bits_per_byte)
    assert evaluation.top1 == evaluation.top5 == 0.0
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert data["bits_per_byte"] is data["loss"] is data["perplexity"] is None
    assert math.isnan(Evaluation.from_json(data).bits_per_byte)
    assert math.isnan(Evaluation.from_json(data).per_block[0]["nats"])


def test_an_evaluation_is_unchanged_by_a_round_trip_through_json(model, tokenizer):
    evaluation = evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu")
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json(), allow_nan=False))) == evaluation
    short = evaluate_blocks(model, tokenizer, blocks(["ab"]), "cpu")
    assert Evaluation.from_json(short.to_json()).to_json() == short.to_json()
    assert short.to_json()["loss_by_position"][2:] == [None] * 14


def test_a_score_on_val_is_marked_as_also_used_for_selection(model, tokenizer):
    assert evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu", side="val").also_used_for_selection
    assert not evaluate_blocks(model, tokenizer, blocks(TEXTS), "cpu").also_used_for_selection


@pytest.mark.parametrize("texts", [[], [""]])
def test_a_side_without_text_is_refused_by_name(model, tokenizer, texts):
    with pytest.raises(CorpusError, match=f"holdout side has no text to score \\({len(texts)} blocks\\)"):
        evaluate_blocks(model, tokenizer, blocks(texts), "cpu")


def loader(seed=None, **options):
    ids = torch.arange(16 * 8).view(16, 8) % 256
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(ids, ids.roll(-1, 1)), batch_size=4, generator=generator, **options)


def test_evaluate_model_returns_the_mean_loss_of_the_first_batches_without_dropout(model):
    train, val = evaluate_model(model, loader(), loader(), "cpu", 2)
    model.eval()
    assert train == val == pytest.approx(calc_loss_loader(loader(), model, "cpu", num_batches=2), rel=1e-6)


def test_the_training_state_is_restored_when_an_evaluation_fails(model):
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserve_training_state(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise ZeroDivisionError
    assert model.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)

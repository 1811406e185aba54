"""Baselines, compared with the command they are named after and with counting by hand."""

import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest

from gptcore.corpus.snapshot import Block
from gptcore.errors import CorpusError
from gptcore.evaluation import baselines as module
from gptcore.evaluation.baselines import count_tokens, measure_compressed_size, score_baselines, sum_unigram_nats
from tests.tiny import prose


def blocks(*texts):
    return [Block(document=0, sha256=str(index), text=text) for index, text in enumerate(texts)]


def scored(tokenizer, tmp_path, train, *held_out):
    path = tmp_path / "train.txt"
    path.write_bytes(train.encode())
    tokens = np.asarray([*tokenizer.encode(train), tokenizer.eot], dtype=np.uint16)
    return score_baselines(tokens, tokenizer, tokenizer.n_vocab, blocks(*held_out), path)


def test_the_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer, tmp_path):
    found = scored(tokenizer, tmp_path, prose(1, 50), "Grüße", prose(2, 20))
    assert found.uniform_bits_per_byte == pytest.approx(math.log2(tokenizer.n_vocab))  # a byte is a token
    assert found.uniform_loss == pytest.approx(math.log(tokenizer.n_vocab))


def test_the_unigram_model_adds_one_to_every_count(tokenizer, tmp_path):
    train, held_out = prose(1, 300), "Zürich " + prose(2, 40)
    found = scored(tokenizer, tmp_path, train, held_out)
    counts, total = Counter([*tokenizer.encode(train), tokenizer.eot]), len(tokenizer.encode(train)) + 1
    bits = sum(-math.log2((counts[token] + 1) / (total + tokenizer.n_vocab)) for token in tokenizer.encode(held_out))
    assert found.unigram_bits_per_byte == pytest.approx(bits / len(held_out.encode()))
    assert found.unigram_loss == pytest.approx(bits * math.log(2) / len(tokenizer.encode(held_out)))


def test_the_unigram_probabilities_add_up_to_one():
    counts = np.array([0, 5, 1, 0])
    nats = [sum_unigram_nats(counts, row) for row in np.eye(4, dtype=int)]
    assert sum(math.exp(-value) for value in nats) == pytest.approx(1)


def test_counting_in_chunks_gives_the_same_counts(monkeypatch):
    stream = np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint16)
    whole = count_tokens([stream], 9)
    monkeypatch.setattr(module, "_COUNT_CHUNK", 13)
    assert count_tokens([stream, stream[:0]], 9).tolist() == whole.tolist() == np.bincount(stream, minlength=9).tolist()


def test_the_xz_size_equals_that_of_xz_9e_except_for_the_container(tokenizer, tmp_path):
    held_out = [prose(seed, 400) for seed in range(3)]
    joined = "".join(held_out).encode()
    reference = len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_NONE))
    size = round(scored(tokenizer, tmp_path, prose(9, 10), *held_out).xz_bits_per_byte * len(joined) / 8)
    assert reference - 80 <= size <= reference


def test_priming_makes_text_from_the_training_text_nearly_free(tokenizer, tmp_path):
    train = random.Random(0).randbytes(3000).hex()
    found = scored(tokenizer, tmp_path, train, train[1000:3000])
    assert found.xz_bits_per_byte > 4
    assert found.xz_primed_bits_per_byte < 0.1
    assert found.primed_bytes == len(train)


def test_text_can_be_restored_from_about_as_many_bytes_as_are_measured():
    pieces = [prose(1, 2000).encode(), b"", prose(2, 100).encode()]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**16}]
    packed = lzma.compress(b"".join(pieces), lzma.FORMAT_RAW, filters=filters)
    assert abs(measure_compressed_size(pieces) - len(packed)) <= 16
    assert lzma.decompress(packed, lzma.FORMAT_RAW, filters=filters) == b"".join(pieces)


def test_only_the_end_of_a_large_training_text_is_used_for_priming_and_the_result_says_so(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "PRIME_BYTES", 500)
    train = prose(1, 300)
    found = scored(tokenizer, tmp_path, train, train[-300:])
    assert found.primed_bytes == 500
    assert found.xz_primed_bits_per_byte < found.xz_bits_per_byte / 4


def test_scoring_baselines_without_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match=r"no text to score baselines on \(1 blocks\)"):
        scored(tokenizer, tmp_path, "some text", "")

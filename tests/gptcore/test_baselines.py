"""Baselines: against the command they are named after, and against counting by hand."""

import lzma
import math
import random
from collections import Counter

import numpy as np
import pytest

from gptcore.corpus import Block
from gptcore.errors import CorpusError
from gptcore.judging import baselines as module
from gptcore.judging.baselines import baselines, compressed_size, token_counts, unigram_nats
from gptcore.tokenizer import get_tokenizer

WORDS = ["the", "of", "and", "model", "text", "token", "holdout", "loss", "gradient", "champion", "registry", "epoch"]


def prose(seed, words):
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words))


def blocks(*texts):
    return [Block(document=0, sha256=str(index), text=text) for index, text in enumerate(texts)]


@pytest.fixture
def tokenizer():
    return get_tokenizer("bytes")


def scored(tokenizer, tmp_path, train, *held_out):
    path = tmp_path / "train.txt"
    path.write_bytes(train.encode())
    tokens = np.asarray([*tokenizer.encode(train), tokenizer.eot], dtype=np.uint16)
    return baselines(tokens, tokenizer, tokenizer.n_vocab, blocks(*held_out), path)


def test_the_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer, tmp_path):
    found = scored(tokenizer, tmp_path, prose(1, 50), "Grüße", prose(2, 20))
    assert found.uniform_bits_per_byte == pytest.approx(math.log2(tokenizer.n_vocab))  # a byte is a token
    assert found.uniform_loss == pytest.approx(math.log(tokenizer.n_vocab))


def test_the_unigram_model_is_that_of_counting_with_one_added_to_every_count(tokenizer, tmp_path):
    train, held_out = prose(1, 300), "Zürich " + prose(2, 40)
    found = scored(tokenizer, tmp_path, train, held_out)
    counts, total = Counter([*tokenizer.encode(train), tokenizer.eot]), len(tokenizer.encode(train)) + 1
    bits = sum(-math.log2((counts[token] + 1) / (total + tokenizer.n_vocab)) for token in tokenizer.encode(held_out))
    assert found.unigram_bits_per_byte == pytest.approx(bits / len(held_out.encode()))
    assert found.unigram_loss == pytest.approx(bits * math.log(2) / len(tokenizer.encode(held_out)))


def test_the_unigram_probabilities_add_up_to_one():
    counts = np.array([0, 5, 1, 0])
    nats = [unigram_nats(counts, row) for row in np.eye(4, dtype=int)]
    assert sum(math.exp(-value) for value in nats) == pytest.approx(1)


def test_counting_in_pieces_gives_the_same_counts(monkeypatch):
    stream = np.random.default_rng(0).integers(0, 7, 1000).astype(np.uint16)
    whole = token_counts([stream], 9)
    monkeypatch.setattr(module, "_COUNT_CHUNK", 13)
    assert token_counts([stream, stream[:0]], 9).tolist() == whole.tolist() == np.bincount(stream, minlength=9).tolist()


def test_xz_comes_within_the_container_of_what_xz_9e_writes(tokenizer, tmp_path):
    held_out = [prose(seed, 400) for seed in range(3)]
    joined = "".join(held_out).encode()
    reference = len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_NONE))
    size = round(scored(tokenizer, tmp_path, prose(9, 10), *held_out).xz_bits_per_byte * len(joined) / 8)
    assert reference - 80 <= size <= reference


def test_priming_makes_text_that_stands_in_the_training_text_nearly_free(tokenizer, tmp_path):
    train = random.Random(0).randbytes(3000).hex()
    found = scored(tokenizer, tmp_path, train, train[1000:3000])
    assert found.xz_bits_per_byte > 4
    assert found.xz_primed_bits_per_byte < 0.1
    assert found.primed_bytes == len(train)


def test_what_was_compressed_can_be_restored_from_as_many_bytes():
    pieces = [prose(1, 2000).encode(), b"", prose(2, 100).encode()]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**16}]
    packed = lzma.compress(b"".join(pieces), lzma.FORMAT_RAW, filters=filters)
    assert abs(compressed_size(pieces) - len(packed)) <= 16
    assert lzma.decompress(packed, lzma.FORMAT_RAW, filters=filters) == b"".join(pieces)


def test_only_the_end_of_a_large_training_text_primes_and_the_result_says_so(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PRIME_BYTES", 500)
    train = prose(1, 300)
    found = scored(tokenizer, tmp_path, train, train[-300:])
    assert found.primed_bytes == 500
    assert found.xz_primed_bits_per_byte < found.xz_bits_per_byte / 4


def test_no_text_to_score_is_refused(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match=r"no text to score baselines on \(1 blocks\)"):
        scored(tokenizer, tmp_path, "some text", "")

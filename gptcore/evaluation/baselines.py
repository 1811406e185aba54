"""Scores that need no neural network, in bits per byte on the same blocks of text: what a trained model has to beat.

A uniform and a unigram model over the trained model's own vocabulary show two limits: the score of a model that knows
nothing, and of one that knows only how frequent each token is. The compressor xz shows what remembering strings is
worth. It compresses the blocks twice: alone, and primed (the training text comes first). The primed score is the honest
yardstick for a small model on a small text. The scores of trained models are in bits_per_byte.py.
"""

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.corpus.snapshot import Block
from gptcore.errors import CorpusError
from gptcore.tokens.tokenizer import Tokenizer

PRIME_BYTES = 8 * 2**20
"""Most bytes of training text, taken from its end, that prime the compressor: as many as xz reads in ten seconds."""
_MAX_DICTIONARY = 64 * 2**20
_COUNT_CHUNK = 2**22
_READ_CHUNK = 2**20


@dataclass(frozen=True)
class Baselines:
    """Scores of models that know little: bits per byte and, for the two token models, nats per token."""

    uniform_bits_per_byte: float
    """Every entry of the vocabulary is equally likely: tokens x log2(vocabulary) / bytes."""
    uniform_loss: float
    """Nats per token of the uniform model: ln(vocabulary)."""
    unigram_bits_per_byte: float
    """Token t has probability (n_t + 1) / (N + V). n_t is its count in the N training tokens, V the vocabulary size."""
    unigram_loss: float
    """Nats per token of the unigram model."""
    xz_bits_per_byte: float
    """Size of the joined blocks, compressed as by `xz -9e`."""
    xz_primed_bits_per_byte: float
    """What the blocks add to the compressed size of the training text."""
    primed_bytes: int
    """Bytes of training text that came before the blocks: its end alone if the corpus is large."""


def score_baselines(
    train_tokens: np.ndarray, tokenizer: Tokenizer, n_vocab: int, blocks: Iterable[Block], train_text: Path
) -> Baselines:
    """Score the simple models on `blocks`.

    `train_tokens` (tokens,) may be a memmap, which is read in chunks. `n_vocab` is the width of the model's output.

    Costs one pass over the tokens, and xz at about 1 MB/s: once over the blocks, twice over the priming text. xz needs
    about 11 times the text in memory, at most 700 MB. Raises CorpusError if the blocks hold no text.
    """
    texts = [block.text for block in blocks]
    held_out = "".join(texts).encode()
    if not held_out:
        raise CorpusError(
            f"There is no text to score baselines on ({len(texts)} blocks). Add text or raise the side's fraction."
        )
    counts = count_tokens((np.asarray(tokenizer.encode(text), np.int64) for text in texts), n_vocab)  # (n_vocab,)
    uniform = float(counts.sum()) * math.log(n_vocab)
    unigram = sum_unigram_nats(count_tokens([train_tokens], n_vocab), counts)
    primer = _read_tail(train_text, PRIME_BYTES)
    primed_size = measure_compressed_size([primer, held_out]) - measure_compressed_size([primer])
    tokens, bits = int(counts.sum()), 1 / (math.log(2) * len(held_out))
    return Baselines(
        uniform_bits_per_byte=uniform * bits,
        uniform_loss=uniform / tokens,
        unigram_bits_per_byte=unigram * bits,
        unigram_loss=unigram / tokens,
        xz_bits_per_byte=8 * measure_compressed_size([held_out]) / len(held_out),
        xz_primed_bits_per_byte=8 * primed_size / len(held_out),
        primed_bytes=len(primer),
    )


def count_tokens(streams: Iterable[np.ndarray], n_vocab: int) -> np.ndarray:
    """Return (n_vocab,) how often each id occurs in the streams, each (tokens,)."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for stream in streams:
        for begin in range(0, len(stream), _COUNT_CHUNK):
            counts += np.bincount(stream[begin : begin + _COUNT_CHUNK], minlength=n_vocab)
    return counts


def sum_unigram_nats(train_counts: np.ndarray, counts: np.ndarray) -> float:
    """Return the total nats of tokens with these `counts` under add-one smoothed frequencies of the training tokens.

    Both arguments are (n_vocab,) counts.
    """
    log_probability = np.log(train_counts + 1) - math.log(int(train_counts.sum()) + len(train_counts))  # (n_vocab,)
    return float(-(counts * log_probability).sum())


def measure_compressed_size(pieces: Sequence[bytes]) -> int:
    """Return how many bytes `xz -9e` makes of the joined pieces, without the container's header and checksums.

    The dictionary spans up to 64 MiB of the pieces, so the last piece may refer to the first.
    """
    span = sum(len(piece) for piece in pieces)
    dictionary = min(max(4096, span), _MAX_DICTIONARY)
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    size = sum(len(compressor.compress(chunk)) for piece in pieces for chunk in _split_into_chunks(piece))
    return size + len(compressor.flush())


def _split_into_chunks(piece: bytes) -> Iterator[bytes]:
    return (piece[begin : begin + _READ_CHUNK] for begin in range(0, len(piece), _READ_CHUNK))


def _read_tail(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read()

"""What a release has to beat: scores in bits per byte that need no neural network, on the same blocks of text.

A uniform and a unigram model over the release's own vocabulary say what knowing nothing, and knowing only how frequent
each token is, are worth. The compressor xz says what remembering strings is worth, once without and once with the
training text before it; it is the honest yardstick for a small model on a small text.
"""

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.corpus import Block
from gptcore.errors import CorpusError
from gptcore.tokenizer import Tokenizer

PRIME_BYTES = 32 * 2**20
"""At most this much training text, its end, is put before the blocks for the primed score."""
_MAX_DICTIONARY = 64 * 2**20
_COUNT_CHUNK = 2**22
_READ_CHUNK = 2**20


@dataclass(frozen=True)
class Baselines:
    """Bits per byte, and where it makes sense nats per token, of models that know little."""

    uniform_bits_per_byte: float
    """Every entry of the vocabulary is equally likely: tokens x log2(vocabulary) / bytes."""
    uniform_loss: float
    """Nats per token: ln(vocabulary)."""
    unigram_bits_per_byte: float
    """Token t has probability (n_t + 1) / (N + V): its count in the training tokens, their number, the vocabulary."""
    unigram_loss: float
    """Nats per token of the same."""
    xz_bits_per_byte: float
    """The blocks, joined, compressed as by `xz -9e`."""
    xz_primed_bits_per_byte: float
    """What the blocks add to the compressed size of the training text."""
    primed_bytes: int
    """How much training text, its end, stood before the blocks; less than all of it in a large corpus."""


def baselines(
    train_tokens: np.ndarray, tokenizer: Tokenizer, n_vocab: int, blocks: Iterable[Block], train_text: Path
) -> Baselines:
    """Scores the simple models on `blocks`. `train_tokens` (tokens,) may be a memmap; it is read in pieces.

    `n_vocab` is the width of the model's output. Costs a pass over the tokens, and xz at about 1 MB/s over the blocks
    and twice over the priming text, with memory of some 11 times the text, at most 700 MB. Raises CorpusError where
    the blocks hold no text.
    """
    texts = [block.text for block in blocks]
    held_out = "".join(texts).encode()
    if not held_out:
        raise CorpusError(
            f"There is no text to score baselines on ({len(texts)} blocks); add text or raise a fraction."
        )
    counts = token_counts((np.asarray(tokenizer.encode(text), np.int64) for text in texts), n_vocab)
    uniform = float(counts.sum()) * math.log(n_vocab)
    unigram = unigram_nats(token_counts([train_tokens], n_vocab), counts)
    primer = _tail(train_text, PRIME_BYTES)
    tokens, bits = int(counts.sum()), 1 / (math.log(2) * len(held_out))
    return Baselines(
        uniform_bits_per_byte=uniform * bits,
        uniform_loss=uniform / tokens,
        unigram_bits_per_byte=unigram * bits,
        unigram_loss=unigram / tokens,
        xz_bits_per_byte=8 * compressed_size([held_out]) / len(held_out),
        xz_primed_bits_per_byte=8 * (compressed_size([primer, held_out]) - compressed_size([primer])) / len(held_out),
        primed_bytes=len(primer),
    )


def token_counts(streams: Iterable[np.ndarray], n_vocab: int) -> np.ndarray:
    """(n_vocab,) how often each id stands in the streams, each (tokens,)."""
    counts = np.zeros(n_vocab, dtype=np.int64)
    for stream in streams:
        for begin in range(0, len(stream), _COUNT_CHUNK):
            counts += np.bincount(stream[begin : begin + _COUNT_CHUNK], minlength=n_vocab)
    return counts


def unigram_nats(train_counts: np.ndarray, counts: np.ndarray) -> float:
    """Nats of tokens with these `counts` under add-one smoothed frequencies of the training tokens; both (n_vocab,)."""
    log_probability = np.log(train_counts + 1) - math.log(int(train_counts.sum()) + len(train_counts))
    return float(-(counts * log_probability).sum())


def compressed_size(pieces: Sequence[bytes]) -> int:
    """Bytes that the pieces, joined, take after `xz -9e`, without the container's header and checksums.

    The dictionary spans all of them, up to 64 MiB, so that the last piece may refer to the first.
    """
    span = sum(len(piece) for piece in pieces)
    dictionary = min(max(4096, span), _MAX_DICTIONARY)
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    return sum(len(compressor.compress(part)) for piece in pieces for part in _parts(piece)) + len(compressor.flush())


def _parts(piece: bytes) -> Iterator[bytes]:
    return (piece[begin : begin + _READ_CHUNK] for begin in range(0, len(piece), _READ_CHUNK))


def _tail(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read()

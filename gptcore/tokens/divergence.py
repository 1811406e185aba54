"""How differently two texts use a vocabulary: the divergence of their token distributions.

The flow compares a new corpus with the corpus of the champion this way. Nothing here reads a model.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptcore.tokens.directory import Tokens
from gptcore.tokens.encode import encode_side

_CHUNK_TOKENS = 1 << 20


def compute_token_divergence(old: Iterable[np.ndarray], new: Iterable[np.ndarray], n_vocab: int) -> float:
    """Return the Jensen-Shannon divergence, in bits, between the token distributions of two texts.

    The result is 0 for equal distributions and 1 for disjoint ones. `old` and `new` are the arrays of ids of each text,
    (tokens,) each; one tokenizer of `n_vocab` entries must have encoded both. The formula is that of Lin 1991,
    "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Inf. Theory 37(1), with equal weights.
    """
    p, q = (_compute_frequencies(arrays, n_vocab) for arrays in (old, new))  # (n_vocab,) each
    middle = (p + q) / 2  # (n_vocab,)
    divergence = (_compute_relative_entropy(p, middle) + _compute_relative_entropy(q, middle)) / 2
    return min(max(divergence, 0.0), 1.0)


def compute_train_divergence(old: Tokens, new: Tokens, new_snapshot: Path) -> float:
    """Return the token divergence between the train sides of two token directories, under the old tokenizer.

    If the new directory has another vocabulary, as with bpe:N, its ids cannot be compared. Then the text of
    `new_snapshot`, from which `new` was made, is encoded again with the old tokenizer; the ids are not kept.
    """
    same = old.tokenizer_sha256 == new.tokenizer_sha256
    new_ids = _read_chunks(new) if same else encode_side(new_snapshot, "train", old.path / "tokenizer")
    return compute_token_divergence(_read_chunks(old), new_ids, old.n_vocab)


def _compute_frequencies(arrays: Iterable[np.ndarray], n_vocab: int) -> npt.NDArray[np.float64]:
    """Return the relative frequency of each id: (n_vocab,)."""
    counts = np.zeros(n_vocab, np.int64)
    for ids in arrays:
        counts += np.bincount(ids, minlength=n_vocab)
    assert counts.sum(), "a text without tokens has no distribution"
    return counts / counts.sum()


def _compute_relative_entropy(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Return the Kullback-Leibler divergence of `p` from `q` in bits. `q` must be positive wherever `p` is."""
    used = p > 0  # (n_vocab,) bool
    return float(np.sum(p[used] * np.log2(p[used] / q[used])))


def _read_chunks(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield the train ids in chunks: (at most `_CHUNK_TOKENS`,) each."""
    ids = tokens.side("train")
    for start in range(0, len(ids), _CHUNK_TOKENS):
        yield ids[start : start + _CHUNK_TOKENS]

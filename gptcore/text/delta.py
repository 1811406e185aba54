"""What changed from one snapshot to the next: documents, blocks, and how differently the new text uses the vocabulary.

A retraining has to have a reason, and this is where it is measured. Documents and blocks are known by the hash of their
content, so a renamed, copied or reordered file is no change, and one edit in a long document makes only the blocks
around it new. Each block is held as a row of arrays and never as an object, so that large corpora can be compared.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptcore.corpus import DOCUMENTS, Block, block_entries
from gptcore.text.split import SIDES
from gptcore.text.tokens import Tokens, encode_side

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Delta:
    """What happened between two snapshots. Bytes are those of whole blocks, as they were before the guard."""

    documents_added: int
    documents_removed: int
    documents_changed: int
    """Other content under the same name."""
    documents_kept: int
    """The same content, under whatever name."""
    bytes: int
    """Text of the new snapshot."""
    new_bytes: int
    """Of its blocks that the old one does not hold, on no side."""
    removed_bytes: int
    """Of the old snapshot's blocks that the new one does not hold."""

    @property
    def new_share(self) -> float:
        """Share of the new snapshot's text that is new."""
        return self.new_bytes / self.bytes


def compare_snapshots(old: Path, new: Path) -> Delta:
    """Compares two committed snapshots. Raises CheckpointError if one of them is of an earlier release."""
    before, after = _Contents.of(old), _Contents.of(new)
    gone, come = before.names_outside(after), after.names_outside(before)
    changed = (gone & come).total()
    return Delta(
        documents_added=come.total() - changed,
        documents_removed=gone.total() - changed,
        documents_changed=changed,
        documents_kept=len(after.documents) - come.total(),
        bytes=int(after.bytes.sum()),
        new_bytes=int(after.bytes[after.is_outside(before)].sum()),
        removed_bytes=int(before.bytes[before.is_outside(after)].sum()),
    )


def new_blocks(old: Path, new: Path, max_bytes: int) -> list[Block]:
    """Blocks of `new` that `old` holds on no side, in order: text that no model trained on `old` has seen.

    Those of train are among them where the guard left them whole. If there are more than `max_bytes`, some are chosen
    by their hash, at least one: the same ones each time, and from all sides alike. Raises CheckpointError if one of the
    snapshots is of an earlier release.
    """
    before, after = _Contents.of(old), _Contents.of(new)
    rows = np.flatnonzero(after.is_outside(before) & (after.offsets >= 0))
    # The first digits of the hash have decided the side, so the choice is by the last ones.
    rows = rows[np.argsort(_reversed(after.digests[rows]), kind="stable")]
    count = max(1, int(np.searchsorted(np.cumsum(after.bytes[rows]), max_bytes, side="right")))
    return list(after.read(np.sort(rows[:count])))


def token_divergence(old: Iterable[np.ndarray], new: Iterable[np.ndarray], n_vocab: int) -> float:
    """Jensen-Shannon divergence, in bits, between the token distributions of two texts: 0 if equal, 1 if disjoint.

    Both texts come as arrays of ids, in parts, and must have been encoded by one tokenizer of `n_vocab` entries. After
    Lin 1991, "Divergence Measures Based on the Shannon Entropy", IEEE Trans. Inf. Theory 37(1), with equal weights.
    """
    p, q = (_frequencies(parts, n_vocab) for parts in (old, new))
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return min(max(divergence, 0.0), 1.0)


def train_divergence(old: Tokens, new: Tokens, new_snapshot: Path) -> float:
    """`token_divergence` between the train sides of two token directories, under the tokenizer of the old one.

    Where the new directory has a vocabulary of its own, as bpe:N has on every corpus, ids cannot be compared: then the
    text of `new_snapshot`, from which `new` was made, is encoded again, and nothing of that is kept.
    """
    same = old.tokenizer_sha256 == new.tokenizer_sha256
    parts = _chunks(new) if same else encode_side(new_snapshot, "train", old.path / "tokenizer")
    return token_divergence(_chunks(old), parts, old.n_vocab)


@dataclass(frozen=True)
class _Contents:
    """A snapshot's documents and the blocks of all its sides: an array holds one entry per block."""

    path: Path
    documents: dict[str, str]
    """Names by sha256, in the order of documents.jsonl."""
    sides: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    """Which document a block belongs to."""
    offsets: npt.NDArray[np.int64]
    """-1 for a block that is not whole."""
    bytes: npt.NDArray[np.int64]
    digests: npt.NDArray[np.bytes_]
    """sha256, 32 bytes each."""

    @classmethod
    def of(cls, path: Path) -> "_Contents":
        with (path / DOCUMENTS).open() as lines:
            documents = {entry["sha256"]: entry["name"] for entry in map(json.loads, lines)}
        rows, digests = array("q"), bytearray()
        for number, side in enumerate(SIDES):
            for entry in block_entries(path, side):
                rows.extend((number, entry.document, -1 if entry.offset is None else entry.offset, entry.bytes))
                digests += bytes.fromhex(entry.sha256)
        sides, numbers, offsets, sizes = np.frombuffer(rows, np.int64).reshape(-1, 4).T
        return cls(path, documents, sides, numbers, offsets, sizes, np.frombuffer(digests, "S32"))

    def names_outside(self, other: "_Contents") -> Counter[str]:
        """Names of the documents whose content the other has under no name."""
        return Counter(name for sha256, name in self.documents.items() if sha256 not in other.documents)

    def is_outside(self, other: "_Contents") -> npt.NDArray[np.bool_]:
        """Which blocks the other does not hold.

        It holds every block of a document that it holds, also where its own split cuts that document otherwise.
        """
        is_known = np.fromiter((sha256 in other.documents for sha256 in self.documents), np.bool_, len(self.documents))
        return ~is_known[self.numbers] & ~np.isin(self.digests, other.digests)

    def read(self, rows: npt.NDArray[np.int64]) -> Iterator[Block]:
        """The blocks in these rows, whose offsets must be known."""
        for row in rows.tolist():
            with (self.path / f"{SIDES[self.sides[row]]}.txt").open("rb") as file:
                file.seek(int(self.offsets[row]))
                text = file.read(int(self.bytes[row])).decode()
            yield Block(int(self.numbers[row]), self.digests[row].ljust(32, b"\0").hex(), text)


def _reversed(digests: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    backwards = digests.view(np.uint8).reshape(-1, 32)[:, ::-1]
    return np.ascontiguousarray(backwards).view("S32").ravel()


def _frequencies(parts: Iterable[np.ndarray], n_vocab: int) -> npt.NDArray[np.float64]:
    counts = np.zeros(n_vocab, np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=n_vocab)
    assert counts.sum(), "a text without tokens has no distribution"
    return counts / counts.sum()


def _relative_entropy(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Bits; `q` must be positive wherever `p` is."""
    used = p > 0
    return float(np.sum(p[used] * np.log2(p[used] / q[used])))


def _chunks(tokens: Tokens) -> Iterator[np.ndarray]:
    ids = tokens.side("train")
    for start in range(0, len(ids), _CHUNK_TOKENS):
        yield ids[start : start + _CHUNK_TOKENS]

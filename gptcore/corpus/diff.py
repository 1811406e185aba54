"""Compare two snapshots: the documents and blocks that were added, removed and changed.

A retraining needs a reason, and this module measures how much text is new. Documents and blocks are identified by the
hash of their content. So a renamed, copied or reordered file is not a change, and one edit in a long document makes
only the blocks around it new. Each block is held as a row of arrays and never as an object, so that large corpora can
be compared. The policy for a retraining is in flows/retrain/policy.py.
"""

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptcore.corpus.contamination import Hashes, contains, sample_short_runs
from gptcore.corpus.normalize import normalize_file
from gptcore.corpus.snapshot import Block, BlockEntry, read_block_entries, read_document_list, side_text
from gptcore.corpus.split import SIDES
from gptcore.manifest import TEMPORARY

_SAMPLED_RUNS = 1 << 17
"""About as many short runs represent a text."""


@dataclass(frozen=True)
class Delta:
    """The changes between two snapshots. Bytes are those of whole blocks, before contamination was removed."""

    documents_added: int
    documents_removed: int
    documents_changed: int
    """Other content under the same name."""
    documents_kept: int
    """The same content, under any name."""
    bytes: int
    """Text of the new snapshot."""
    new_bytes: int
    """Bytes of the blocks that the old snapshot does not hold on any side."""
    old_bytes: int
    """Text of the old snapshot."""
    removed_bytes: int
    """Bytes of the old snapshot's blocks that the new one does not hold."""
    has_same_documents: bool
    """Whether both hold the same documents. The snapshots may still differ in what was removed as contamination."""

    @property
    def new_share(self) -> float:
        """Share of the new snapshot's text that is new."""
        return self.new_bytes / self.bytes

    @property
    def removed_share(self) -> float:
        """Share of the old snapshot's text whose blocks are gone, at least the share that `measure_lost_share` finds.

        A block counts as gone if any of its bytes changed, or if other settings cut the text differently.
        """
        return self.removed_bytes / self.old_bytes


def compare_snapshots(old: Path, new: Path) -> Delta:
    """Compare two committed snapshots. Raises CheckpointError if an earlier release made one of them."""
    before, after = _Contents.of(old), _Contents.of(new)
    removed, added = before.names_missing_from(after), after.names_missing_from(before)
    changed = (removed & added).total()
    return Delta(
        documents_added=added.total() - changed,
        documents_removed=removed.total() - changed,
        documents_changed=changed,
        documents_kept=len(after.documents) - added.total(),
        bytes=int(after.bytes.sum()),
        new_bytes=int(after.bytes[after.are_missing_from(before)].sum()),
        old_bytes=int(before.bytes.sum()),
        removed_bytes=int(before.bytes[before.are_missing_from(after)].sum()),
        has_same_documents=sorted(_read_documents(old)) == sorted(_read_documents(new)),
    )


def measure_lost_share(old: Path, new: Path) -> float:
    """Measure which share of the old snapshot's text is nowhere in the new one, in any form.

    The texts' views (normalize.py) are compared by a sample of their short runs. So text that was edited, reformatted,
    moved to another document or cut into other blocks is not lost, apart from the words around each edit. The memory
    does not depend on the size of the text.
    """
    size = sum((old / f"{side}.txt").stat().st_size for side in SIDES)
    before, after = (_sample_runs(path, one_in=max(1, size // _SAMPLED_RUNS)) for path in (old, new))
    return float(np.mean(~contains(np.sort(after), before))) if len(before) else 0.0


def _sample_runs(path: Path, one_in: int) -> Hashes:
    """Return the hashes of about one in `one_in` of the short runs of a snapshot's text, one per occurrence."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as views:
        sides = (normalize_file(side_text(path, side), Path(views) / side).view for side in SIDES)
        sampled = [hashes for view in sides for hashes in sample_short_runs(view, one_in)]
    return np.concatenate(sampled) if sampled else np.empty(0, np.uint64)


def pick_new_blocks(old: Path, new: Path, max_bytes: int) -> list[Block]:
    """Return the blocks of `new` that `old` does not hold on any side, in order.

    A model that was trained on `old` has not seen their text. Blocks of train are included if they are whole in
    train.txt. If the blocks have more than `max_bytes`, some are chosen by their hash, at least one: the same blocks
    each time, and from all sides alike. Raises CheckpointError if an earlier release made one of the snapshots.
    """
    before, after = _Contents.of(old), _Contents.of(new)
    rows = np.flatnonzero(after.are_missing_from(before) & (after.offsets >= 0))  # (rows,)
    # The first digits of the hash have decided the side, so the choice is by the last digits.
    rows = rows[np.argsort(_reverse_bytes(after.digests[rows]), kind="stable")]  # (rows,)
    count = max(1, int(np.searchsorted(np.cumsum(after.bytes[rows]), max_bytes, side="right")))
    return list(after.read_blocks(np.sort(rows[:count])))


def find_old_blocks(old: Path, new: Path, blocks: Sequence[Block | BlockEntry]) -> list[bool]:
    """Return (blocks,): whether each of these held-out blocks of `new` was in the snapshot `old` already.

    A block was there if `old` holds its document, even if the split of `old` cuts that document differently, or if val
    or holdout of `old` holds the block. The train side of `old` is not searched, because no block that shares text with
    that side is scored (clean_blocks.py).
    """
    held_out = {entry.sha256 for side in SIDES if side != "train" for entry in read_block_entries(old, side)}
    documents, known = _read_documents(new), set(_read_documents(old))
    return [block.sha256 in held_out or documents[block.document] in known for block in blocks]


def count_documents(path: Path) -> Counter[str]:
    """Count the documents of a snapshot by their source, an entry of corpus.sources."""
    return Counter(document.source for document in read_document_list(path))


def _read_documents(path: Path) -> list[str]:
    """Return (documents,): the hash of each document, in the order of documents.jsonl."""
    return [document.sha256 for document in read_document_list(path)]


@dataclass(frozen=True)
class _Contents:
    """A snapshot's documents, and the blocks of all its sides: each array holds one entry per block."""

    path: Path
    documents: dict[str, str]
    """Names by sha256, in the order of documents.jsonl."""
    hashes: list[str]
    """sha256 of each line of documents.jsonl. Exact copies that are kept have lines of their own."""
    sides: npt.NDArray[np.int64]
    """Indices into SIDES."""
    numbers: npt.NDArray[np.int64]
    """The number of the document that a block belongs to."""
    offsets: npt.NDArray[np.int64]
    """-1 for a block that is not whole."""
    bytes: npt.NDArray[np.int64]
    digests: npt.NDArray[np.bytes_]
    """sha256, 32 bytes each."""

    @classmethod
    def of(cls, path: Path) -> "_Contents":
        listed = list(read_document_list(path))
        documents = {document.sha256: document.name for document in listed}
        rows, digests = array("q"), bytearray()
        for number, side in enumerate(SIDES):
            for entry in read_block_entries(path, side):
                rows.extend((number, entry.document, -1 if entry.offset is None else entry.offset, entry.bytes))
                digests += bytes.fromhex(entry.sha256)
        sides, numbers, offsets, sizes = np.frombuffer(rows, np.int64).reshape(-1, 4).T  # (blocks,) each
        hashes = [document.sha256 for document in listed]
        return cls(path, documents, hashes, sides, numbers, offsets, sizes, np.frombuffer(digests, "S32"))

    def names_missing_from(self, other: "_Contents") -> Counter[str]:
        """Count the names of the documents whose content the other does not hold, under any name."""
        return Counter(name for sha256, name in self.documents.items() if sha256 not in other.documents)

    def are_missing_from(self, other: "_Contents") -> npt.NDArray[np.bool_]:
        """Return (blocks,): whether the other does not hold the block.

        The other holds every block of a document that it holds, even if its own split cuts that document differently.
        """
        is_known = np.fromiter((sha256 in other.documents for sha256 in self.hashes), np.bool_, len(self.hashes))
        return ~is_known[self.numbers] & ~np.isin(self.digests, other.digests)

    def read_blocks(self, rows: npt.NDArray[np.int64]) -> Iterator[Block]:
        """Read the blocks in these rows, (rows,). Their offsets must be known."""
        for row in rows.tolist():
            with (self.path / f"{SIDES[self.sides[row]]}.txt").open("rb") as file:
                file.seek(int(self.offsets[row]))
                text = file.read(int(self.bytes[row])).decode()
            yield Block(int(self.numbers[row]), self.digests[row].ljust(32, b"\0").hex(), text)


def _reverse_bytes(digests: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    backwards = digests.view(np.uint8).reshape(-1, 32)[:, ::-1]  # (digests, 32)
    return np.ascontiguousarray(backwards).view("S32").ravel()  # (digests,)

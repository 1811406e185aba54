"""Read snapshots. A snapshot is a committed directory with the text of train, val and holdout, named by its content.

ingest.py writes snapshots.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptcore import manifest
from gptcore.corpus.contamination import Positions
from gptcore.corpus.normalize import PassageFile
from gptcore.corpus.reading import Reading
from gptcore.errors import CheckpointError

MIN_SAMPLED_BLOCKS = 25
"""Fewest blocks of a sample, whatever their size, because the gate needs 20 (compare.MIN_BLOCKS)."""
DOCUMENTS = "documents.jsonl"
"""The list of a snapshot's documents: name, source, sha256 and bytes of each."""
TRAIN_BLOCKS = "train-blocks.jsonl"


@dataclass(frozen=True)
class Snapshot:
    """A committed directory: {train,val,holdout}.txt, their indexes, documents.jsonl, manifest.json.

    The index {side}.jsonl of val and holdout lists their blocks. train.jsonl lists the passages that are left after
    contamination was removed. train-blocks.jsonl lists the blocks that train was made of.
    """

    path: Path
    sha256: str
    """Hash of the documents and the split settings. The hashes of the files themselves are in the manifest."""
    documents: int
    blocks: dict[str, int]
    """Number of blocks per side; for train, before contamination was removed."""
    bytes: dict[str, int]
    """Size of each side's file."""
    dropped: dict[str, int]
    """empty_documents, duplicate_documents, duplicate_blocks, duplicate_bytes, guard_runs, guard_bytes, val_guard_runs,
    val_guard_bytes. The guard_ counts are the runs and bytes of contamination that were removed from train, and the
    val_guard_ counts those that were removed from val."""
    split: dict[str, Any]
    """Settings of the split: split, block_bytes, val_fraction, holdout_fraction, and duplicates if they are kept."""
    reading: Reading = field(compare=False)
    """What became of the files and documents of the sources: in this ingest, else in the one that made the snapshot.
    Empty for a snapshot of an earlier release. Equal snapshots may come from other files."""


class ListedDocument(NamedTuple):
    """A line of documents.jsonl."""

    name: str
    source: str
    """The entry of corpus.sources that it came from."""
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Block:
    """The text of one block: the unit that is scored."""

    document: int
    """Line of documents.jsonl, from 0."""
    sha256: str
    text: str


class BlockEntry(NamedTuple):
    """The place of a block in a side's file."""

    document: int
    """Line of documents.jsonl, from 0."""
    offset: int | None
    """Byte of {side}.txt at which the block begins. None for a train block that lost contamination."""
    bytes: int
    """Length of the block; for train, before contamination was removed."""
    sha256: str

    @classmethod
    def from_json(cls, line: str) -> "BlockEntry":
        """Read a line of a side's list of blocks."""
        return cls(**json.loads(line))

    def to_json(self) -> str:
        """Return the line of a side's list of blocks."""
        return json.dumps(self._asdict())


def load_snapshot(path: Path) -> Snapshot:
    """Load the snapshot in a committed directory. Raises CheckpointError if the directory holds none."""
    about = manifest.read_about(path)
    reading = Reading.from_json(about["reading"]) if "reading" in about else Reading()
    keys = ("sha256", "documents", "blocks", "bytes", "dropped", "split")
    return Snapshot(path, **{key: about[key] for key in keys}, reading=reading)


def write_document_list(path: Path, documents: Iterable[ListedDocument]) -> None:
    """Write documents.jsonl into the directory of a snapshot."""
    with (path / DOCUMENTS).open("w") as lines:
        lines.writelines(json.dumps(document._asdict()) + "\n" for document in documents)


def read_document_list(path: Path) -> Iterator[ListedDocument]:
    """Yield the documents of a snapshot, in order."""
    with (path / DOCUMENTS).open() as lines:
        for line in lines:
            yield ListedDocument(**json.loads(line))


def read_blocks(path: Path, side: str) -> Iterator[Block]:
    """Yield the blocks of val or holdout, in order."""
    assert side != "train", "a block of train may have lost contamination"
    with (path / f"{side}.txt").open("rb") as file:
        for entry in read_block_entries(path, side):
            yield Block(entry.document, entry.sha256, file.read(entry.bytes).decode())


def sample_blocks(path: Path, side: str, max_bytes: int | None) -> list[Block]:
    """Return the blocks of val or holdout that are scored, in order: all of them, or at most about `max_bytes`.

    A sample holds the blocks with the lowest hashes. The hash of a block depends on its text alone, so the sample of a
    corpus that grows is nearly the same each time: a few new blocks replace those with the highest hashes.
    """
    entries = list(read_block_entries(path, side))
    chosen = order_by_hash(entries)
    chosen = chosen[: count_sampled([entries[number].bytes for number in chosen], max_bytes)]
    return list(read_chosen_blocks(path, side, [entries[number] for number in sorted(chosen)]))


def order_by_hash(entries: Sequence[BlockEntry]) -> list[int]:
    """Return (entries,) the positions of the entries in the order of their hashes."""
    return sorted(range(len(entries)), key=lambda number: entries[number].sha256)


def count_sampled(sizes: Sequence[int], max_bytes: int | None) -> int:
    """Return how many of the blocks of these `sizes`, the first ones, have at most `max_bytes` together.

    Returns at least `MIN_SAMPLED_BLOCKS`, if there are as many. None stands for any number of bytes.
    """
    if max_bytes is None:
        return len(sizes)
    fitting = int(np.searchsorted(np.cumsum(np.asarray(sizes, np.int64)), max_bytes, side="right"))
    return min(len(sizes), max(fitting, MIN_SAMPLED_BLOCKS))


def read_chosen_blocks(path: Path, side: str, entries: Iterable[BlockEntry]) -> Iterator[Block]:
    """Yield the blocks of val or holdout that `entries` list."""
    assert side != "train", "a block of train may have lost contamination"
    with (path / f"{side}.txt").open("rb") as file:
        for entry in entries:
            assert entry.offset is not None
            file.seek(entry.offset)
            yield Block(entry.document, entry.sha256, file.read(entry.bytes).decode())


def read_block_entries(path: Path, side: str) -> Iterator[BlockEntry]:
    """Yield the blocks of any side without their text, in order; those of train as before contamination was removed.

    Raises CheckpointError for train if an earlier release, which kept no list of train blocks, made the snapshot.
    """
    index = path / (TRAIN_BLOCKS if side == "train" else f"{side}.jsonl")
    if not index.is_file():
        raise CheckpointError(
            f"{index} is missing: an earlier release made this snapshot, without a list of its train blocks. "
            "Start a new run: it reads the sources again."
        )
    with index.open() as lines:
        yield from map(BlockEntry.from_json, lines)


def side_text(path: Path, side: str) -> PassageFile:
    """Return one side of a snapshot with the bounds of its passages (contiguous text).

    A passage of train is a sequence of neighbouring blocks of one document. It ends where contamination was removed or
    where a block of another side came between. In val and holdout each block is a passage. If corpus.split is
    contiguous, the neighbouring blocks of a document are one passage there too.
    """
    is_joined = side != "train" and manifest.read_about(path)["split"]["split"] == "contiguous"
    lengths = _join_lengths(_read_index(path, side), is_joined)
    return PassageFile(path / f"{side}.txt", passage_bounds(list(lengths)))


def passage_bounds(lengths: Sequence[int]) -> Positions:
    """Return (passages + 1,): the offsets at which passages of these lengths begin, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def _read_index(path: Path, side: str) -> Iterator[dict[str, Any]]:
    with (path / f"{side}.jsonl").open() as lines:
        yield from map(json.loads, lines)


def _join_lengths(index: Iterable[dict[str, Any]], is_joined: bool) -> Iterator[int]:
    """Yield the length of each entry of the index or, if `is_joined`, of the neighbouring entries of each document."""
    document, length = None, 0
    for entry in index:
        if length and not (is_joined and entry["document"] == document):
            yield length
            length = 0
        document, length = entry["document"], length + entry["bytes"]
    if length:
        yield length

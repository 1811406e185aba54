"""From sources to a snapshot: a directory that holds the text of train, val and holdout and is named by its content.

All documents are first written one after another into a temporary file, so that what is hashed is what is used and a
corpus need not fit into memory; those of a large corpus in shards, wherever they are worked on (parts.py, workers.py).
They are cut into blocks, the blocks go to their sides, and the guard removes from train what also stands in val or
holdout. Which text belongs to which side is decided in split.py.
"""

import contextlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gptcore import manifest
from gptcore.config import CorpusConfig
from gptcore.errors import CheckpointError, CorpusError
from gptcore.progress import Progress
from gptcore.text import guard, parts, sources, split
from gptcore.text.parts import Parts
from gptcore.text.split import SIDES
from gptcore.text.spool import Documents, Spool, pieces
from gptcore.text.workers import WHOLE_BYTES, Map, by_processes

CORPUS_VERSION = 2
"""Raised when equal documents would give other blocks, sides or files."""

_DROPPED = (
    "empty_documents",
    "duplicate_documents",
    "duplicate_blocks",
    "duplicate_bytes",
    "guard_runs",
    "guard_bytes",
)
DOCUMENTS = "documents.jsonl"
"""The list of a snapshot's documents: name, source, sha256 and bytes of each."""
_TRAIN_BLOCKS = "train-blocks.jsonl"
_RAW_TRAIN, _RAW_TRAIN_BLOCKS = "train.raw", "train-blocks.raw"


@dataclass(frozen=True)
class Snapshot:
    """A committed directory: {train,val,holdout}.txt, their indexes, documents.jsonl, manifest.json.

    The index {side}.jsonl of val and holdout lists their blocks. train.jsonl lists the stretches that the guard left,
    train-blocks.jsonl the blocks that train was made of.
    """

    path: Path
    sha256: str
    """Of the documents and the split: what the snapshot is about. The files' own hashes stand in the manifest."""
    documents: int
    blocks: dict[str, int]
    """Per side; for train as they were before the guard."""
    bytes: dict[str, int]
    """Per side, as the files are."""
    dropped: dict[str, int]
    """empty_documents, duplicate_documents, duplicate_blocks, duplicate_bytes, guard_runs, guard_bytes."""


@dataclass(frozen=True)
class Block:
    """A unit of scoring."""

    document: int
    """Line of documents.jsonl, from 0."""
    sha256: str
    text: str


class BlockEntry(NamedTuple):
    """Where a block stands."""

    document: int
    """Line of documents.jsonl, from 0."""
    offset: int | None
    """Byte of {side}.txt at which it begins. None for a train block that the guard took something from."""
    bytes: int
    """Its length, before the guard."""
    sha256: str


def ingest(cfg: CorpusConfig, corpora: Path, base: Path, mapped: Map = by_processes) -> Snapshot:
    """Reads all sources and publishes `corpora`/<sha256[:16]>, or finds that this snapshot exists already.

    Relative sources start at `base`; downloads are kept in `downloads` beside `corpora`. A large corpus is read, cut
    and guarded in shards, which `mapped` distributes; the snapshot is the same however it does that. Raises CorpusError
    where the text cannot be used or a side stays empty, SourceUnavailable where a remote source does not answer.
    """
    sources.check(cfg.sources, base)
    corpora.mkdir(parents=True, exist_ok=True)
    manifest.sweep(corpora)
    files = list(sources.files(cfg.sources, base, corpora.parent / "downloads"))
    key = manifest.sha256_of([*cfg.sources, str(base), cfg.errors, cfg.block_bytes])
    if sum(file.num_bytes for file in files) <= WHOLE_BYTES or len(files) == 1:
        with tempfile.TemporaryFile(dir=corpora) as file:
            read = sources.documents_of(files, corpora.parent / "downloads", cfg.errors)
            return _snapshot_of(cfg, Spool(file, read), corpora, mapped)
    with parts.workplace(corpora.absolute(), key) as directory:
        shards = parts.plan(files, cfg.errors, cfg.block_bytes, directory)
        with contextlib.closing(Parts(mapped("ingest", "read", parts.read, shards))) as documents:
            return _snapshot_of(cfg, documents, corpora, mapped)


def _snapshot_of(cfg: CorpusConfig, read: Documents, corpora: Path, mapped: Map) -> Snapshot:
    if not read.documents:
        raise CorpusError(
            f"corpus.sources {list(cfg.sources)} hold no text: {read.dropped['empty_documents']} documents were "
            "read, all of them empty or whitespace. Name a source with text."
        )
    if cfg.split == "hash":
        read.documents.sort(key=lambda document: document.sha256)
    settings = _split_settings(cfg)
    hashes = [document.sha256 for document in read.documents]
    sha256 = manifest.sha256_of({"version": CORPUS_VERSION, "split": settings, "documents": hashes})
    goal = corpora / sha256[:16]
    if not manifest.is_committed(goal):
        about = {"kind": "corpus", "sha256": sha256, "split": settings, "sources": read.per_source}
        _publish(cfg, read, goal, about, mapped)
    return load_snapshot(goal)


def load_snapshot(path: Path) -> Snapshot:
    """The snapshot in a committed directory. Raises CheckpointError where there is none."""
    about = manifest.about(path)
    return Snapshot(path, *(about[key] for key in ("sha256", "documents", "blocks", "bytes", "dropped")))


def passages(path: Path, side: str) -> Iterator[str]:
    """The contiguous stretches of text of one side, in order.

    In train these are neighbouring blocks of one document, joined up to where the guard removed something or a block
    of another side stood between. In val and holdout they are the blocks; with split contiguous, all of a document.
    """
    is_joined = side != "train" and manifest.about(path)["split"]["split"] == "contiguous"
    with (path / f"{side}.txt").open("rb") as file:
        for length in _passage_lengths(_index(path, side), is_joined):
            yield file.read(length).decode()


def blocks(path: Path, side: str) -> Iterator[Block]:
    """The blocks of val or holdout, in order."""
    assert side != "train", "the guard may have taken something from a block of train"
    with (path / f"{side}.txt").open("rb") as file:
        for entry in block_entries(path, side):
            yield Block(entry.document, entry.sha256, file.read(entry.bytes).decode())


def block_entries(path: Path, side: str) -> Iterator[BlockEntry]:
    """The blocks of any side without their text, in order, as they were cut and before the guard.

    Raises CheckpointError for train of a snapshot of an earlier release, which kept no list of its blocks.
    """
    index = path / (_TRAIN_BLOCKS if side == "train" else f"{side}.jsonl")
    if not index.is_file():
        raise CheckpointError(
            f"{index} is missing: an earlier release made this snapshot, without a list of its train blocks. "
            "Read the sources anew: the next run does."
        )
    with index.open() as lines:
        yield from (BlockEntry(**json.loads(line)) for line in lines)


def side_text(path: Path, side: str) -> guard.Text:
    """One side of a snapshot as the guard takes it, its passages apart: to compare snapshots with each other."""
    is_joined = side != "train" and manifest.about(path)["split"]["split"] == "contiguous"
    return guard.Text(path / f"{side}.txt", _bounds(list(_passage_lengths(_index(path, side), is_joined))))


def _bounds(lengths: Sequence[int]) -> guard.Positions:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def _index(path: Path, side: str) -> Iterator[dict[str, Any]]:
    with (path / f"{side}.jsonl").open() as lines:
        yield from map(json.loads, lines)


def _passage_lengths(index: Iterable[dict[str, Any]], is_joined: bool) -> Iterator[int]:
    document, length = None, 0
    for entry in index:
        if length and not (is_joined and entry["document"] == document):
            yield length
            length = 0
        document, length = entry["document"], length + entry["bytes"]
    if length:
        yield length


def _split_settings(cfg: CorpusConfig) -> dict[str, Any]:
    keys = ("split", "block_bytes", "val_fraction", "holdout_fraction")
    return {key: getattr(cfg, key) for key in keys}


@dataclass
class _Side:
    """One side while it is written: its file and index, and its stretches of neighbouring blocks."""

    text: IO[bytes]
    index: IO[str]
    offset: int = 0
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    """Bytes of each block."""
    documents: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, placed: split.Placed, is_neighbour: bool) -> None:
        """Writes a block; one that follows its neighbour lengthens the stretch."""
        size = len(placed.data)
        self.text.write(placed.data)
        # As json.dumps of a BlockEntry writes it, at a tenth of the time.
        entry = f'"document": {placed.document}, "offset": {self.offset}, "bytes": {size}, "sha256": "{placed.sha256}"'
        self.index.write(f"{{{entry}}}\n")
        self.sizes.append(size)
        self.offset += size
        if is_neighbour:
            self.lengths[-1] += size
        else:
            self.documents.append(placed.document)
            self.lengths.append(size)


def _publish(cfg: CorpusConfig, read: Documents, goal: Path, about: dict[str, Any], mapped: Map) -> None:
    dropped = Counter(dict.fromkeys(_DROPPED, 0))
    dropped.update(read.dropped)
    with manifest.staging(goal.parent) as staged:
        written = _write_sides(cfg, read, staged, dropped)
        removed = _apply_guard(staged, written, mapped)
        dropped.update(guard_runs=len(removed), guard_bytes=int(np.diff(removed).sum()))
        _write_train_blocks(staged, written["train"], removed)
        for raw in (_RAW_TRAIN, _RAW_TRAIN_BLOCKS):
            (staged / raw).unlink(missing_ok=True)
        counts = {name: len(written[name].sizes) for name in SIDES}
        sizes = {name: (staged / f"{name}.txt").stat().st_size for name in SIDES}
        _check_sides(cfg, counts, sizes, dropped)
        read.write_list(staged / DOCUMENTS)
        totals = {"documents": len(read.documents), "blocks": counts, "bytes": sizes, "dropped": dict(dropped)}
        manifest.commit(staged, goal, {**about, **totals})


def _write_sides(cfg: CorpusConfig, read: Documents, staged: Path, dropped: Counter[str]) -> dict[str, _Side]:
    """Writes all sides with the lists of their blocks, train as it is before the guard.

    Counts duplicate blocks in `dropped`.
    """
    files = {name: (f"{name}.txt", f"{name}.jsonl") for name in SIDES} | {"train": (_RAW_TRAIN, _RAW_TRAIN_BLOCKS)}
    written = {
        name: _Side((staged / text).open("wb"), (staged / index).open("w")) for name, (text, index) in files.items()
    }
    last: tuple[int, str] | None = None
    progress = Progress("ingest", "split", sum(document.bytes for document in read.documents))
    for placed in split.placed(cfg, read):
        progress.add(len(placed.data))
        here = (placed.document, placed.side)
        if placed.side in written:
            is_joined = placed.side == "train" or cfg.split == "contiguous"
            written[placed.side].add(placed, is_neighbour=is_joined and here == last)
        else:
            dropped.update(duplicate_blocks=1, duplicate_bytes=len(placed.data))
        last = here
    for one in written.values():
        one.text.close()
        one.index.close()
    return written


def _apply_guard(staged: Path, written: dict[str, _Side], mapped: Map) -> guard.Positions:
    """Writes train.txt and its index without the runs that val or holdout hold too. Returns (runs, 2) what went."""
    texts = {
        name: guard.Text(staged / (_RAW_TRAIN if name == "train" else f"{name}.txt"), _bounds(one.lengths))
        for name, one in written.items()
    }
    removed = guard.shared_runs(texts["train"], [texts["val"], texts["holdout"]], mapped)
    kept = _kept(written["train"].documents, texts["train"].bounds, removed)
    offset = 0
    with (staged / "train.jsonl").open("w") as index:
        for document, start, end in kept:
            index.write(f'{{"document": {document}, "offset": {offset}, "bytes": {end - start}}}\n')
            offset += end - start
    if not len(removed):
        texts["train"].path.rename(staged / "train.txt")
        return removed
    with texts["train"].path.open("rb") as raw, (staged / "train.txt").open("wb") as text:
        for _, start, end in kept:
            for piece in pieces(raw, start, end):
                text.write(piece)
    return removed


def _write_train_blocks(staged: Path, train: _Side, removed: guard.Positions) -> None:
    """Turns the offsets of train before the guard into those of train.txt, None for blocks that are not whole."""
    ends, total = removed[:, 1], np.concatenate([[0], np.cumsum(np.diff(removed).ravel())])
    sizes = np.array(train.sizes)
    starts = np.cumsum(sizes) - sizes
    before = np.searchsorted(ends, starts, side="right")
    firsts = np.append(removed[:, 0], np.iinfo(np.int64).max)[before]
    is_whole, offsets = firsts >= starts + sizes, starts - total[before]
    with (staged / _RAW_TRAIN_BLOCKS).open() as raw, (staged / _TRAIN_BLOCKS).open("w") as index:
        for line, is_kept, offset in zip(raw, is_whole.tolist(), offsets.tolist()):
            document, _, rest = line.split(", ", 2)
            index.write(f'{document}, "offset": {offset if is_kept else "null"}, {rest}')


def _kept(documents: Sequence[int], bounds: guard.Positions, removed: guard.Positions) -> list[tuple[int, int, int]]:
    """(document, start, end) of what is left of each stretch."""
    starts = np.unique(np.concatenate([bounds[:-1], removed[:, 1]]))
    starts = starts[starts < bounds[-1]]
    stretches = np.searchsorted(bounds, starts, side="right") - 1
    runs = np.searchsorted(removed[:, 1], starts, side="right")
    ends = np.minimum(bounds[stretches + 1], np.append(removed[:, 0], np.iinfo(np.int64).max)[runs])
    is_left = starts < ends
    chosen = np.asarray(documents, np.int64)[stretches[is_left]]
    return list(zip(chosen.tolist(), starts[is_left].tolist(), ends[is_left].tolist()))


def _check_sides(cfg: CorpusConfig, counts: dict[str, int], sizes: dict[str, int], dropped: Counter[str]) -> None:
    needed = [name for name in SIDES if name != "holdout" or cfg.holdout_fraction > 0]
    empty = [name for name in needed if not sizes[name]]
    if not empty:
        return
    found = ", ".join(f"{name} {sizes[name]} bytes in {counts[name]} blocks" for name in SIDES)
    by_chance = (
        "Blocks fall to a side by the hash of their content, so with few blocks a side can stay empty by chance. "
        "Lower corpus.block_bytes, give more text, raise the side's fraction, or set corpus.split: contiguous."
    )
    cure = by_chance if cfg.split == "hash" else "Give more text or raise the side's fraction."
    raise CorpusError(
        f"corpus: nothing is left for {' and '.join(empty)}, where at least 1 block is needed: {found}; removed from "
        f"train by the guard: {dropped['guard_bytes']} bytes (split {cfg.split}, val_fraction {cfg.val_fraction}, "
        f"holdout_fraction {cfg.holdout_fraction}, block_bytes {cfg.block_bytes}). {cure}"
    )

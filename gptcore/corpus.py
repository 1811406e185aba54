"""From sources to a snapshot: a directory that holds the text of train, val and holdout and is named by its content.

All documents are first written one after another into a temporary file, so that what is hashed is what is used and a
corpus need not fit into memory. Then they are cut into blocks, the blocks go to their sides, and the guard removes from
train what also stands in val or holdout. Which text belongs to which side is decided in split.py.
"""

import hashlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gptcore import guard, manifest, sources
from gptcore.config import CorpusConfig
from gptcore.errors import CorpusError
from gptcore.split import SIDES, cut, side
from gptcore.spool import Spool, pieces

CORPUS_VERSION = 1
"""Raised when equal documents would give other blocks or sides."""

_DROPPED = (
    "empty_documents",
    "duplicate_documents",
    "duplicate_blocks",
    "duplicate_bytes",
    "guard_runs",
    "guard_bytes",
)
_RAW_TRAIN = "train.raw"
DOCUMENTS = "documents.jsonl"
"""The list of a snapshot's documents: name, source, sha256 and bytes of each."""


@dataclass(frozen=True)
class Snapshot:
    """A committed directory: {train,val,holdout}.txt, their indexes {side}.jsonl, documents.jsonl, manifest.json."""

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


class _Placed(NamedTuple):
    document: int
    side: str
    sha256: str
    data: bytes


def ingest(cfg: CorpusConfig, corpora: Path, base: Path) -> Snapshot:
    """Reads all sources and publishes `corpora`/<sha256[:16]>, or finds that this snapshot exists already.

    Relative sources start at `base`; downloads are kept in `downloads` beside `corpora`. Raises CorpusError where the
    text cannot be used or a side stays empty, SourceUnavailable where a remote source does not answer.
    """
    sources.check(cfg.sources, base)
    corpora.mkdir(parents=True, exist_ok=True)
    manifest.sweep(corpora)
    with tempfile.TemporaryFile(dir=corpora) as file:
        spool = Spool(file, sources.documents(cfg.sources, base, corpora.parent / "downloads", cfg.errors))
        if not spool.documents:
            raise CorpusError(
                f"corpus.sources {list(cfg.sources)} hold no text: {spool.dropped['empty_documents']} documents were "
                "read, all of them empty or whitespace. Name a source with text."
            )
        if cfg.split == "hash":
            spool.documents.sort(key=lambda document: document.sha256)
        settings = _split_settings(cfg)
        hashes = [document.sha256 for document in spool.documents]
        sha256 = manifest.sha256_of({"version": CORPUS_VERSION, "split": settings, "documents": hashes})
        goal = corpora / sha256[:16]
        if not manifest.is_committed(goal):
            about = {"kind": "corpus", "sha256": sha256, "split": settings, "sources": spool.per_source}
            _publish(cfg, spool, goal, about)
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
    assert side != "train", "train is kept as passages"
    with (path / f"{side}.txt").open("rb") as file:
        for entry in _index(path, side):
            yield Block(entry["document"], entry["sha256"], file.read(entry["bytes"]).decode())


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
    index: IO[str] | None
    """None for train, whose index can only be written after the guard."""
    blocks: int = 0
    offset: int = 0
    documents: "array[int]" = field(default_factory=lambda: array("q"))
    lengths: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, placed: _Placed, is_neighbour: bool) -> None:
        """Writes a block; one that follows its neighbour lengthens the stretch."""
        size = len(placed.data)
        self.text.write(placed.data)
        if self.index:
            entry = {"document": placed.document, "offset": self.offset, "bytes": size, "sha256": placed.sha256}
            self.index.write(json.dumps(entry) + "\n")
        self.blocks += 1
        self.offset += size
        if is_neighbour:
            self.lengths[-1] += size
        else:
            self.documents.append(placed.document)
            self.lengths.append(size)


def _publish(cfg: CorpusConfig, spool: Spool, goal: Path, about: dict[str, Any]) -> None:
    dropped = Counter(dict.fromkeys(_DROPPED, 0))
    dropped.update(spool.dropped)
    with manifest.staging(goal.parent) as staged:
        written = _write_sides(cfg, spool, staged, dropped)
        removed = _apply_guard(staged, written)
        dropped.update(guard_runs=len(removed), guard_bytes=int(np.diff(removed).sum()))
        (staged / _RAW_TRAIN).unlink()
        counts = {name: written[name].blocks for name in SIDES}
        sizes = {name: (staged / f"{name}.txt").stat().st_size for name in SIDES}
        _check_sides(cfg, counts, sizes, dropped)
        spool.write_list(staged / DOCUMENTS)
        totals = {"documents": len(spool.documents), "blocks": counts, "bytes": sizes, "dropped": dict(dropped)}
        manifest.commit(staged, goal, {**about, **totals})


def _write_sides(cfg: CorpusConfig, spool: Spool, staged: Path, dropped: Counter[str]) -> dict[str, _Side]:
    """Writes val and holdout with their indexes, and train without one. Counts duplicate blocks in `dropped`."""
    place = _by_hash if cfg.split == "hash" else _by_position
    files = {name: staged / (_RAW_TRAIN if name == "train" else f"{name}.txt") for name in SIDES}
    written = {
        name: _Side(path.open("wb"), None if name == "train" else (staged / f"{name}.jsonl").open("w"))
        for name, path in files.items()
    }
    last: tuple[int, str] | None = None
    for placed in place(cfg, spool):
        here = (placed.document, placed.side)
        if placed.side in written:
            is_joined = placed.side == "train" or cfg.split == "contiguous"
            written[placed.side].add(placed, is_neighbour=is_joined and here == last)
        else:
            dropped.update(duplicate_blocks=1, duplicate_bytes=len(placed.data))
        last = here
    for one in written.values():
        one.text.close()
        if one.index:
            one.index.close()
    return written


def _by_hash(cfg: CorpusConfig, spool: Spool) -> Iterator[_Placed]:
    """All blocks with the side of their hash; the side of one that was met before is `duplicate`."""
    seen: set[bytes] = set()
    for number, document in enumerate(spool.documents):
        for data in cut(spool.pieces(document.offset, document.offset + document.bytes), cfg.block_bytes):
            digest = hashlib.sha256(data)
            where = side(digest.hexdigest(), cfg.val_fraction, cfg.holdout_fraction)
            yield _Placed(number, "duplicate" if digest.digest() in seen else where, digest.hexdigest(), data)
            seen.add(digest.digest())


def _by_position(cfg: CorpusConfig, spool: Spool) -> Iterator[_Placed]:
    """The first characters to train, the next to val, the last to holdout, as the seed split them; in blocks."""
    total = sum(document.chars for document in spool.documents)
    ends = _side_ends(cfg, total)
    first = 0
    for number, document in enumerate(spool.documents):
        borders = [min(max(end - first, 0), document.chars) for end in ends.values()]
        offsets = [document.offset, *(spool.byte_offset(document, border) for border in borders)]
        for name, start, end in zip(ends, offsets, offsets[1:]):
            for data in cut(spool.pieces(start, end), cfg.block_bytes):
                yield _Placed(number, name, hashlib.sha256(data).hexdigest(), data)
        first += document.chars


def _side_ends(cfg: CorpusConfig, total_chars: int) -> dict[str, int]:
    """Where each side ends, in characters. Rounded, for 1 - 0.05 - 0.05 is a little less than 0.9."""
    train = int(round(1 - cfg.val_fraction - cfg.holdout_fraction, 12) * total_chars)
    val = int(round(1 - cfg.holdout_fraction, 12) * total_chars)
    return {"train": train, "val": val, "holdout": total_chars}


def _apply_guard(staged: Path, written: dict[str, _Side]) -> guard.Positions:
    """Writes train.txt and its index without the runs that val or holdout hold too. Returns (runs, 2) what went."""
    texts = {
        name: guard.Text(staged / (_RAW_TRAIN if name == "train" else f"{name}.txt"), _bounds(one.lengths))
        for name, one in written.items()
    }
    removed = guard.shared_runs(texts["train"], [texts["val"], texts["holdout"]])
    offset = 0
    with (
        texts["train"].path.open("rb") as raw,
        (staged / "train.txt").open("wb") as text,
        (staged / "train.jsonl").open("w") as index,
    ):
        for document, start, end in _kept(written["train"].documents, texts["train"].bounds, removed):
            for piece in pieces(raw, start, end):
                text.write(piece)
            index.write(json.dumps({"document": document, "offset": offset, "bytes": end - start}) + "\n")
            offset += end - start
    return removed


def _kept(
    documents: Sequence[int], bounds: guard.Positions, removed: guard.Positions
) -> Iterator[tuple[int, int, int]]:
    """(document, start, end) of what is left of each stretch."""
    starts = np.unique(np.concatenate([bounds[:-1], removed[:, 1]]))
    for start in starts[starts < bounds[-1]].tolist():
        stretch = int(np.searchsorted(bounds, start, side="right")) - 1
        run = int(np.searchsorted(removed[:, 1], start, side="right"))
        end = int(bounds[stretch + 1])
        if run < len(removed):
            end = min(end, int(removed[run, 0]))
        if start < end:
            yield documents[stretch], start, end


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

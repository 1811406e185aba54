"""Make a snapshot from sources: a directory that holds the text of train, val and holdout and is named by its content.

All documents are first written one after another into a temporary file. So the bytes that are hashed are the bytes that
are used, and a corpus need not fit into memory. The documents of a large corpus are written in shards, by several
processes (shards.py). The documents are cut into blocks, and split.py assigns the blocks to their sides. Then
contamination is removed (contamination.py): text of val and holdout from train, and text of holdout from val.

snapshot.py reads snapshots.
"""

import contextlib
import functools
import hashlib
import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gptcore import manifest
from gptcore.config import CorpusConfig
from gptcore.corpus import contamination, shards, sources, split
from gptcore.corpus.contamination import Positions
from gptcore.corpus.documents import DocumentStore, Spool, read_chunks
from gptcore.corpus.formats import ReadOptions
from gptcore.corpus.normalize import PassageFile, normalize, normalize_file
from gptcore.corpus.reading import Reading
from gptcore.corpus.shards import WHOLE_BYTES, ShardDocuments
from gptcore.corpus.snapshot import (
    TRAIN_BLOCKS,
    BlockEntry,
    ListedDocument,
    Snapshot,
    load_snapshot,
    passage_bounds,
    read_document_list,
    write_document_list,
)
from gptcore.corpus.split import SIDES, SplitSettings
from gptcore.errors import CorpusError
from gptcore.processes import MapShards, map_in_processes
from gptcore.progress import Progress

CORPUS_VERSION = 3
"""Raised when a change of gptcore/corpus gives equal documents other blocks, sides or files."""

_DROPPED = (
    "empty_documents",
    "duplicate_documents",
    "duplicate_blocks",
    "duplicate_bytes",
    "guard_runs",
    "guard_bytes",
    "val_guard_runs",
    "val_guard_bytes",
)
_EMPTY_CHANCE = 1e-4  # of an empty side, at the size of text that an error asks for
_RAW = {"train": ("train.raw", "train-blocks.raw"), "val": ("val.raw", "val-blocks.raw")}
"""The text and the list of blocks of a side before contamination is removed."""


def ingest(
    cfg: CorpusConfig,
    corpora: Path,
    base: Path,
    map_shards: MapShards = map_in_processes,
    previous: Path | None = None,
) -> Snapshot:
    """Read all sources and publish `corpora`/<sha256[:16]>, unless this snapshot exists already.

    Relative sources start at `base`; downloads are kept in `downloads` beside `corpora`. A large corpus is read, cut
    and searched for contamination in shards, which `map_shards` distributes; the snapshot does not depend on how.
    `previous` is an earlier snapshot: of several copies of a text, the one that is in it stays.
    The snapshot's `reading` says what became of every file, also if this snapshot exists already. Raises CorpusError
    if text cannot be used or a side stays empty, SourceUnavailable if a remote source does not answer.

    For example, `ingest(CorpusConfig(sources=("notes",)), Path("state/corpora"), Path("."))`.
    """
    corpora.mkdir(parents=True, exist_ok=True)
    manifest.sweep(corpora)
    downloads = corpora.parent / "downloads"
    files, found = sources.find_files(cfg.sources, base, downloads, cfg.exclude, cfg.formats)
    options = ReadOptions("replace" if cfg.errors == "replace" else "strict", cfg.text, cfg.formats, cfg.encoding)
    keeps_copies = cfg.duplicates == "keep"
    if sum(file.num_bytes for file in files) <= WHOLE_BYTES or len(files) == 1:
        with tempfile.TemporaryFile(dir=corpora) as text:
            documents = Spool(text, files, options, downloads, keeps_copies)
            return _make_snapshot(cfg, documents, found, corpora, map_shards, previous)
    settings = split.settings_of_large_text(cfg)  # the blocks are cut while the text is read
    cfg = cfg.model_copy(update=settings.to_record())
    key = manifest.sha256_of([*cfg.sources, str(base), cfg.errors, cfg.text, settings.block_bytes])
    with shards.lock_work_directory(corpora.absolute(), key) as directory:
        planned = shards.plan_shards(files, options, settings.block_bytes, directory)
        shard_directories = map_shards("ingest", "read", shards.read_shard, planned)
        with contextlib.closing(ShardDocuments(shard_directories, keeps_copies)) as shard_documents:
            return _make_snapshot(cfg, shard_documents, found, corpora, map_shards, previous)


def _make_snapshot(
    cfg: CorpusConfig,
    documents: DocumentStore,
    found: Reading,
    corpora: Path,
    map_shards: MapShards,
    previous: Path | None,
) -> Snapshot:
    """Make a snapshot of the documents. `found` says what was left out before they were read."""
    documents.drop_or_mark_copies({document.sha256 for document in read_document_list(previous)} if previous else ())
    reading = found
    reading.merge(documents.reading)
    if cfg.errors != "skip":
        reading.check()
    if not documents.entries:
        problem = (
            f"corpus.sources {list(cfg.sources)!r:.400} hold no text: {documents.dropped['empty_documents']} documents "
            "were read, all of them empty or whitespace. Name a source with text."
        )
        raise CorpusError("\n".join([problem, *reading.describe()]))
    settings = split.choose_settings(cfg, documents)
    if settings.split == "hash":
        documents.entries.sort(key=lambda document: document.sha256)
    record = settings.to_record()
    hashes = [document.sha256 for document in documents.entries]
    sha256 = manifest.sha256_of({"version": CORPUS_VERSION, "split": record, "documents": hashes})
    about = {"kind": "corpus", "sha256": sha256, "split": record, "sources": documents.per_source}
    about["reading"] = reading.to_json()
    fill = functools.partial(_write_snapshot, settings, documents, about, map_shards)
    snapshot = load_snapshot(manifest.make_once(corpora / sha256[:16], fill))
    return replace(snapshot, reading=reading)  # an existing snapshot may have been made from other files


@dataclass
class _SideWriter:
    """Writes the blocks of one side to its file and index. Neighbouring blocks of one document form a passage."""

    text: IO[bytes]
    index: IO[str]
    offset: int = 0
    block_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    """Length of each block."""
    passage_documents: "array[int]" = field(default_factory=lambda: array("q"))
    """Number of the document of each passage."""
    passage_bytes: "array[int]" = field(default_factory=lambda: array("q"))
    """Length of each passage."""

    def add(self, block: split.BlockWithSide, extends_passage: bool) -> None:
        """Write a block. It extends the last passage or begins a new one."""
        size = len(block.data)
        self.text.write(block.data)
        # As json.dumps of a BlockEntry writes it, in a tenth of the time.
        entry = f'"document": {block.document}, "offset": {self.offset}, "bytes": {size}, "sha256": "{block.sha256}"'
        self.index.write(f"{{{entry}}}\n")
        self.block_bytes.append(size)
        self.offset += size
        if extends_passage:
            self.passage_bytes[-1] += size
        else:
            self.passage_documents.append(block.document)
            self.passage_bytes.append(size)

    def close(self) -> None:
        """Close both files."""
        self.text.close()
        self.index.close()


def _write_snapshot(
    settings: SplitSettings, documents: DocumentStore, about: dict[str, Any], map_shards: MapShards, staged: Path
) -> dict[str, Any]:
    """Write the files of a snapshot. Return `about` with the totals."""
    dropped = Counter(dict.fromkeys(_DROPPED, 0))
    dropped.update(documents.dropped)
    sides = _write_sides(settings, documents, staged, dropped)
    runs = _find_contamination(staged, sides, map_shards)
    _cut_train(staged, sides["train"], runs["train"])
    counts = {name: len(sides[name].block_bytes) for name in SIDES} | {"val": _cut_val(staged, runs["val"])}
    for raw in (name for names in _RAW.values() for name in names):
        (staged / raw).unlink(missing_ok=True)
    sizes = {name: (staged / f"{name}.txt").stat().st_size for name in SIDES}
    dropped.update(guard_runs=len(runs["train"]), guard_bytes=int(np.diff(runs["train"]).sum()))
    dropped.update(val_guard_runs=len(runs["val"]), val_guard_bytes=sum(sides["val"].block_bytes) - sizes["val"])
    _check_sides(settings, counts, sizes, dropped)
    listed = (ListedDocument(entry.name, entry.source, entry.sha256, entry.bytes) for entry in documents.entries)
    write_document_list(staged, listed)
    totals = {"documents": len(documents.entries), "blocks": counts, "bytes": sizes, "dropped": dict(dropped)}
    return {**about, **totals}


def _write_sides(
    settings: SplitSettings, documents: DocumentStore, staged: Path, dropped: Counter[str]
) -> dict[str, _SideWriter]:
    """Write all sides with the lists of their blocks, train and val as they are before contamination is removed.

    Counts duplicate blocks in `dropped`.
    """
    files = {name: (f"{name}.txt", f"{name}.jsonl") for name in SIDES} | _RAW
    sides = {
        name: _SideWriter((staged / text).open("wb"), (staged / index).open("w"))
        for name, (text, index) in files.items()
    }
    last: tuple[int, str] | None = None
    progress = Progress("ingest", "split", sum(document.bytes for document in documents.entries))
    for block in split.assign_blocks(settings, documents):
        progress.add(len(block.data))
        place = (block.document, block.side)
        if block.side in sides:
            sides[block.side].add(block, extends_passage=place == last)
        else:
            dropped.update(duplicate_blocks=1, duplicate_bytes=len(block.data))
        last = place
    for side in sides.values():
        side.close()
    return sides


def _find_contamination(staged: Path, sides: dict[str, _SideWriter], map_shards: MapShards) -> dict[str, Positions]:
    """Find the runs of train that are also in val or holdout, and the runs of val that are also in holdout.

    Returns (runs, 2) for both sides: the start and end of each run in the file as it is before they are removed.
    """
    with tempfile.TemporaryDirectory(prefix="views-", dir=staged) as views:
        train, val, holdout = (
            normalize_file(
                PassageFile(staged / file, passage_bounds(sides[name].passage_bytes)), Path(views).absolute() / name
            )
            for name, file in (("train", _RAW["train"][0]), ("val", _RAW["val"][0]), ("holdout", "holdout.txt"))
        )
        return {
            "train": contamination.find_shared_runs(train, [val, holdout], map_shards),
            "val": contamination.find_shared_runs(val, [holdout], map_shards),
        }


def _cut_train(staged: Path, train: _SideWriter, removed: Positions) -> None:
    """Write train.txt, its index and the list of its blocks without the runs `removed`, (runs, 2)."""
    raw_text = staged / _RAW["train"][0]
    passages = _list_clean_passages(train.passage_documents, passage_bounds(train.passage_bytes), removed)
    offset = 0
    with (staged / "train.jsonl").open("w") as index:
        for document, start, end in passages:
            index.write(f'{{"document": {document}, "offset": {offset}, "bytes": {end - start}}}\n')
            offset += end - start
    _write_train_blocks(staged, train, removed)
    if not len(removed):
        raw_text.rename(staged / "train.txt")
        return
    with raw_text.open("rb") as raw, (staged / "train.txt").open("wb") as text:
        for _, start, end in passages:
            for chunk in read_chunks(raw, start, end):
                text.write(chunk)


def _cut_val(staged: Path, removed: Positions) -> int:
    """Write val.txt and the list of its blocks without the runs `removed`, (runs, 2). Return the number of blocks.

    Each piece that is left of a block becomes a block of its own, unless the piece holds no letter, digit or symbol.
    """
    raw_text, raw_blocks = (staged / name for name in _RAW["val"])
    count = offset = 0
    with (
        raw_text.open("rb") as raw,
        raw_blocks.open() as lines,
        (staged / "val.txt").open("wb") as text,
        (staged / "val.jsonl").open("w") as index,
    ):
        for entry in map(BlockEntry.from_json, lines):
            for data in _cut_block(raw.read(entry.bytes), entry, removed):
                sha256 = hashlib.sha256(data).hexdigest()
                index.write(BlockEntry(entry.document, offset, len(data), sha256).to_json() + "\n")
                text.write(data)
                offset, count = offset + len(data), count + 1
    return count


def _cut_block(data: bytes, entry: BlockEntry, removed: Positions) -> list[bytes]:
    """Return the pieces of a block that the runs `removed`, (runs, 2), leave. A block without a run is one piece."""
    assert entry.offset is not None
    low, high = (
        np.searchsorted(removed[:, 1], entry.offset, side="right"),
        np.searchsorted(removed[:, 0], entry.offset + entry.bytes),
    )
    if low >= high:
        return [data]
    borders = [0, *(removed[low:high].ravel() - entry.offset).clip(0, entry.bytes).tolist(), entry.bytes]
    pieces = [data[start:end] for start, end in zip(borders[::2], borders[1::2])]
    return [piece for piece in pieces if normalize(piece)]


def _write_train_blocks(staged: Path, train: _SideWriter, removed: Positions) -> None:
    """Write the list of train's blocks with their offsets in train.txt, None for blocks that are not whole."""
    # total[n] is the number of bytes in the first n removed runs.
    ends, total = removed[:, 1], np.concatenate([[0], np.cumsum(np.diff(removed).ravel())])  # (runs,), (runs + 1,)
    sizes = np.array(train.block_bytes)  # (blocks,)
    starts = np.cumsum(sizes) - sizes  # (blocks,)
    before = np.searchsorted(ends, starts, side="right")  # (blocks,) number of runs before each block
    firsts = np.append(removed[:, 0], np.iinfo(np.int64).max)[before]  # (blocks,) start of the next run
    is_whole, offsets = firsts >= starts + sizes, starts - total[before]  # (blocks,) each
    with (staged / _RAW["train"][1]).open() as raw, (staged / TRAIN_BLOCKS).open("w") as index:
        for line, is_kept, offset in zip(raw, is_whole.tolist(), offsets.tolist()):
            document, _, rest = line.split(", ", 2)
            index.write(f'{document}, "offset": {offset if is_kept else "null"}, {rest}')


class _Passage(NamedTuple):
    document: int
    start: int
    end: int


def _list_clean_passages(documents: Sequence[int], bounds: Positions, removed: Positions) -> list[_Passage]:
    """List what is left of each passage when the removed runs, (runs, 2), are cut out.

    `documents` and `bounds` are those of the passages before.
    """
    starts = np.unique(np.concatenate([bounds[:-1], removed[:, 1]]))  # (candidates,)
    starts = starts[starts < bounds[-1]]
    passages = np.searchsorted(bounds, starts, side="right") - 1  # (candidates,) the passage that each is in
    runs = np.searchsorted(removed[:, 1], starts, side="right")  # (candidates,) the run that follows each
    ends = np.minimum(bounds[passages + 1], np.append(removed[:, 0], np.iinfo(np.int64).max)[runs])  # (candidates,)
    is_left = starts < ends
    chosen = np.asarray(documents, np.int64)[passages[is_left]]  # (clean passages,)
    return list(map(_Passage, chosen.tolist(), starts[is_left].tolist(), ends[is_left].tolist()))


def _check_sides(settings: SplitSettings, counts: dict[str, int], sizes: dict[str, int], dropped: Counter[str]) -> None:
    """Raise CorpusError if a side that is needed has no text. With holdout_fraction 0, holdout is not needed."""
    needed = [name for name in SIDES if name != "holdout" or settings.holdout_fraction > 0]
    empty = [name for name in needed if not sizes[name]]
    if not empty:
        return
    listed = ", ".join(f"{name} {sizes[name]} bytes in {counts[name]} blocks" for name in SIDES)
    raise CorpusError(
        f"corpus: nothing is left for {' and '.join(empty)} (each side needs at least 1 block): {listed}. "
        f"Contamination removed from train: {dropped['guard_bytes']} bytes. Settings: split {settings.split}, "
        f"val_fraction {settings.val_fraction}, holdout_fraction {settings.holdout_fraction}, "
        f"block_bytes {settings.block_bytes}. {_explain_empty_side(settings, counts, sizes)}"
    )


def _explain_empty_side(settings: SplitSettings, counts: dict[str, int], sizes: dict[str, int]) -> str:
    """Return why a side is empty, how much text would fill it, and which keys to set."""
    if settings.split == "contiguous":
        return "Give more text or raise the side's fraction."
    fractions = [share for share in (settings.val_fraction, settings.holdout_fraction) if share > 0]
    # (1 - share) ** blocks is the chance that no block is on a side.
    blocks = math.log(_EMPTY_CHANCE / len(fractions)) / math.log1p(-min(fractions))
    num_bytes = math.ceil(blocks * sum(sizes.values()) / max(1, sum(counts.values())) / 1000) * 1000
    return (
        "Blocks are assigned to a side by the hash of their content, so with few blocks a side can stay empty by "
        f"chance. That is unlikely from about {num_bytes / 1000:,.0f} kB of such text on, or from 10 kB on if "
        "corpus.block_bytes, val_fraction and holdout_fraction are empty when the pipeline first runs. Give more text, "
        "lower corpus.block_bytes, raise the side's fraction, or set corpus.split: contiguous."
    )

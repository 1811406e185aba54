"""Find contamination: runs of 128 bytes or more that the views of two texts share.

A view holds the letters, digits and symbols of a text, so a copy with other line ends, indents or quoting marks is
found too (normalize.py). ingest.py removes the runs from the text, and clean_blocks.py excludes the blocks that hold
one from a comparison of models. This module only finds the runs.

The method is exact up to collisions of 64-bit hashes, and needs memory for an eighth of the other view only. Every run
of 128 bytes holds one whole 65-byte gram that starts at a multiple of 64 in the other view. So only these grams are
indexed. The view is then read once in chunks with a rolling hash. Where a gram of the view is in the index, all windows
of 128 bytes around the gram are compared. Hashes are polynomials modulo 2^64 in an odd base, computed as differences of
prefix sums, over bytes that are first mapped to random 64-bit numbers.

A short text, such as a sample of held-out text, is indexed itself, at every byte. The other views are then only read,
without an index in memory.
"""

import functools
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gptcore.corpus.normalize import MIN_VIEW_BYTES, NormalizedFile, PassageFile
from gptcore.corpus.shards import SHARD_BYTES, WHOLE_BYTES
from gptcore.processes import MapShards

RUN_BYTES = MIN_VIEW_BYTES
"""The shortest run of a view that counts as shared."""

Positions = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
R = TypeVar("R")

_GRAM_BYTES = 65
_GRID_BYTES = 64  # _GRID_BYTES - 1 + _GRAM_BYTES == RUN_BYTES
_SHORT_RUN_BYTES = 48
"""In prose about ten words. Short enough that most runs of an edited text survive, and long enough that the lines of a
log or a table, which are alike, differ within it."""
_CHUNK_BYTES = 1 << 19
_FILTER_BITS = 23
_NEEDLE_CELLS = (48, 24, 16, 8)
_MOST_PAIRS = 20_000
_SHORT_TEXT_BYTES = 1 << 24
_SHORT_TEXT_RATIO = 4
_SEED = 0x6770_7466_6C6F_77


@dataclass(frozen=True)
class SearchShard:
    """A range of bytes of a text, searched as one shard, with the arrays that the search needs."""

    path: Path
    arrays: "Path | dict[str, npt.NDArray[Any]]"
    """Arrays by name, or the directory in which they are saved."""
    start: int
    end: int
    """A gram or window that begins before `end` may reach beyond it."""

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.end - self.start

    def load_array(self, name: str) -> npt.NDArray[Any]:
        """Return one of the arrays, mapped from disk if it is saved."""
        if isinstance(self.arrays, dict):
            return self.arrays[name]
        saved: npt.NDArray[Any] = np.load(self.arrays / f"{name}.npy", mmap_mode="r")
        return saved


def find_shared_runs(
    text: NormalizedFile, others: Sequence[NormalizedFile], map_shards: MapShards | None = None
) -> Positions:
    """Return (runs, 2): start and end, in the text, of each run whose view is also in a passage of one of `others`.

    The view of a run is at least RUN_BYTES long and lies within one passage. The runs are in order, end at whole
    characters, and are joined where they overlap or touch. A long text is searched in shards, which `map_shards`
    distributes. The arrays that the shards need are saved in a temporary directory beside the view.
    """
    views = [other.view for other in others]
    if _is_short(text.view, views):
        wanted = np.sort(np.concatenate([_hash_cells(chunk, 1) for _, chunk in _read_grams(text.view)]))
        grams = [_find_grid_grams(view, wanted) for view in views]
    else:
        grams = [_hash_grid_grams(view) for view in views]
    index = np.unique(np.concatenate([hashes for _, hashes in grams])) if grams else np.empty(0, np.uint64)  # (grams,)
    if not len(index):
        return np.empty((0, 2), np.int64)
    occurrences = _search(text.view, _find_indexed_grams, {"index": index}, map_shards)
    ranges = np.concatenate([starts for starts, _ in occurrences])  # (ranges, 2)
    starts = _merge_ranges(ranges[:, 0], ranges[:, 1])  # (ranges, 2) in which the windows to compare start
    hits = np.unique(np.concatenate([hashes for _, hashes in occurrences]))  # (hits,) hashes of grams that both hold
    shared = _hash_windows_around(
        views, [positions[np.isin(hashes, hits)] for positions, hashes in grams]
    )  # (windows,)
    runs = [np.empty((0, 2), np.int64)]
    if len(shared):
        arrays = {"bounds": text.view.bounds, "starts": starts, "shared": shared}
        runs += _search(text.view, _find_shared_windows, arrays, map_shards)
    joined = np.concatenate(runs)  # (runs, 2)
    in_text = text.find_in_text(_merge_ranges(joined[:, 0], joined[:, 1]))  # (runs, 2)
    return _merge_ranges(in_text[:, 0], in_text[:, 1])


def _search(
    text: PassageFile,
    search: Callable[[SearchShard], R],
    arrays: dict[str, npt.NDArray[Any]],
    map_shards: MapShards | None,
) -> list[R]:
    """Return the results of `search` for the shards of the text, in order."""
    size = text.path.stat().st_size
    if map_shards is None or size <= WHOLE_BYTES:
        return [search(SearchShard(text.path, arrays, 0, size))]
    path = text.path.absolute()
    with tempfile.TemporaryDirectory(prefix="guard-", dir=path.parent) as name:
        for array, values in arrays.items():
            np.save(Path(name) / array, values)
        starts = range(0, size, SHARD_BYTES)
        shards = [SearchShard(path, Path(name), start, min(start + SHARD_BYTES, size)) for start in starts]
        return map_shards("ingest", "decontaminated", search, shards)


def find_contained(needles: Collection[bytes], path: Path) -> set[bytes]:
    """Return the needles, each at most RUN_BYTES long, that the file contains as a whole. Passages do not matter.

    A chunk is divided into cells of 48, 24, 16 or 8 bytes. A needle of at least 2 * 48 - 1 bytes that is in the chunk
    holds one whole cell of 48, and so on. So a needle is compared only where it has a cell in common with the chunk.
    """
    by_cell: dict[int, list[bytes]] = {cell: [] for cell in (*_NEEDLE_CELLS, 0)}
    for needle in needles:
        by_cell[next((cell for cell in _NEEDLE_CELLS if len(needle) >= 2 * cell - 1), 0)].append(needle)
    indexes = [_NeedleIndex.of(by_cell[cell], cell) for cell in _NEEDLE_CELLS if by_cell[cell]]
    contained: set[bytes] = set()
    for _, chunk in _read_chunks(path, RUN_BYTES) if needles else ():
        data = chunk.tobytes()
        contained |= {needle for needle in by_cell[0] if needle not in contained and needle in data}
        contained.update(*(index.find_in(chunk, data) for index in indexes))
    return contained


@dataclass(frozen=True)
class _NeedleIndex:
    """Needles by the hashes of their cells, at every place where a cell of a text may begin in them."""

    needles: list[bytes]
    cell: int
    hashes: Hashes
    """(needles x cell,) in order."""
    windows: Positions
    """(needles x cell,) where each hash is from: the number of its needle times `cell`, plus the place in it."""
    is_likely: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, needles: list[bytes], cell: int) -> "_NeedleIndex":
        """Index needles that have at least 2 * `cell` - 1 bytes."""
        windows = b"".join(needle[start : start + cell] for needle in needles for start in range(cell))
        hashes = _hash_words(np.frombuffer(windows, np.uint8), cell)  # (needles x cell,)
        order = np.argsort(hashes)
        return cls(needles, cell, hashes[order], order, _make_filter(hashes))

    def find_in(self, chunk: npt.NDArray[np.uint8], data: bytes) -> set[bytes]:
        """Return the needles that the chunk contains. `data` holds the same bytes."""
        cells = _hash_words(chunk, self.cell)  # (cells,)
        likely = np.flatnonzero(self.is_likely[_bucket_of(cells)])  # (likely,)
        hits = likely[contains(self.hashes, cells[likely])]  # (hits,)
        lows = np.searchsorted(self.hashes, cells[hits])  # (hits,)
        highs = np.searchsorted(self.hashes, cells[hits], side="right")  # (hits,)
        if (highs - lows).sum() > _MOST_PAIRS:  # the same few bytes again and again
            windows = [self.windows[low:high] for low, high in set(zip(lows.tolist(), highs.tolist()))]
            numbers = np.unique(np.concatenate(windows) // self.cell).tolist()
            return {self.needles[number] for number in numbers if self.needles[number] in data}
        found = set()
        for hit, low, high in zip(hits.tolist(), lows.tolist(), highs.tolist()):
            for window in self.windows[low:high].tolist():
                needle, start = self.needles[window // self.cell], hit * self.cell - window % self.cell
                if start >= 0 and data.startswith(needle, start):
                    found.add(needle)
        return found


def _hash_words(data: npt.NDArray[np.uint8], size: int) -> Hashes:
    """Return (cells,): hashes of the cells of `size` bytes, a multiple of 8, one after another, without the rest.

    They are sums of eight-byte words, each times a number of its own: many times as fast as `_hash_grams`. Different
    cells may have equal hashes more often, so this only finds what is then compared.
    """
    factors = _make_hash_tables()[0][: size // 8] | np.uint64(1)  # (words of a cell,) odd
    words = data[: len(data) // size * size].view(np.uint64).reshape(-1, size // 8)  # (cells, words)
    return np.asarray((words * factors).sum(axis=1), np.uint64)


def _hash_grid_grams(text: PassageFile) -> tuple[Positions, Hashes]:
    """Return positions and hashes, (grams,) each, of the grams at every hundredth byte of every passage."""
    lengths = np.diff(text.bounds)  # (passages,)
    counts = np.where(lengths >= RUN_BYTES, (lengths - _GRAM_BYTES) // _GRID_BYTES + 1, 0)  # (passages,)
    firsts = np.cumsum(counts) - counts  # (passages,) number of the first gram of each passage
    positions = np.repeat(text.bounds[:-1] - firsts * _GRID_BYTES, counts) + np.arange(counts.sum()) * _GRID_BYTES
    hashes = np.empty(len(positions), np.uint64)  # (grams,)
    for offset, chunk in _read_chunks(text.path, _GRAM_BYTES):
        low, high = np.searchsorted(positions, [offset, offset + max(len(chunk) - _GRAM_BYTES + 1, 0)])
        if low < high:
            hashes[low:high] = _hash_grams(chunk, _GRAM_BYTES)[positions[low:high] - offset]
    return positions, hashes


def _is_short(text: PassageFile, others: Sequence[PassageFile]) -> bool:
    """Whether the text is so short, also beside the others, that an index of all its grams costs little."""
    size, total = text.path.stat().st_size, sum(other.path.stat().st_size for other in others)
    return _GRAM_BYTES <= size <= min(_SHORT_TEXT_BYTES, total // _SHORT_TEXT_RATIO)


def _find_grid_grams(text: PassageFile, wanted: Hashes) -> tuple[Positions, Hashes]:
    """Return positions and hashes, (grams,) each, of the grams at multiples of `_GRID_BYTES` that are in `wanted`.

    `wanted` is the result of `_hash_cells` for the other text, sorted. A run of a passage holds one whole gram of this
    grid too; a gram that reaches into another passage does no harm, because windows are compared within passages.
    """
    is_likely = _make_filter(wanted)
    positions, found = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for offset, chunk in _read_grams(text):
        cells = _hash_cells(chunk, _GRID_BYTES)[: (len(chunk) - _GRAM_BYTES) // _GRID_BYTES + 1]  # (grams,)
        likely = np.flatnonzero(is_likely[_bucket_of(cells)])  # (likely,)
        hits = likely[contains(wanted, cells[likely])]  # (hits,)
        if len(hits):
            positions.append(offset + hits * _GRID_BYTES)
            grams = np.lib.stride_tricks.sliding_window_view(chunk, _GRAM_BYTES)[hits * _GRID_BYTES]  # (hits, 65)
            letters, powers, inverses = _make_hash_tables()
            found.append((letters[grams] * (powers[:_GRAM_BYTES] * inverses[0])).sum(axis=1))  # as _hash_grams
    return np.concatenate(positions), np.concatenate(found)


def _hash_cells(data: npt.NDArray[np.uint8], step: int) -> Hashes:
    """Return hashes of the windows of `_GRID_BYTES` bytes that start at multiples of `step`, 64 or (in any order) 1.

    They are equal to those of `_hash_words`.
    """
    if step == _GRID_BYTES:
        return _hash_words(data, _GRID_BYTES)
    factors = _make_hash_tables()[0][:8] | np.uint64(1)  # (8,) odd
    hashes = [np.empty(0, np.uint64)]
    for first in range(8):
        words = np.frombuffer(data[first : first + (len(data) - first) // 8 * 8].tobytes(), np.uint64)  # (words,)
        count = max(0, len(words) - 7)
        total = np.zeros(count, np.uint64)
        for number, factor in enumerate(factors):
            total += words[number : number + count] * factor
        hashes.append(total)
    return np.concatenate(hashes)


def _find_indexed_grams(shard: SearchShard) -> tuple[Positions, Hashes]:
    """Find the grams of the shard that are in the index.

    Returns (ranges, 2), the ranges in which windows around these grams start, and the grams' distinct hashes. The
    ranges may begin before the shard.
    """
    index = shard.load_array("index")  # (indexed,)
    is_likely = _make_filter(index)
    ranges, hit_hashes = [np.empty((0, 2), np.int64)], [np.empty(0, np.uint64)]
    for offset, chunk in _read_chunks(shard.path, _GRAM_BYTES, np.array([[shard.start, shard.end]])):
        hashes = _hash_grams(chunk, _GRAM_BYTES)  # (bytes - gram + 1,)
        likely = np.flatnonzero(is_likely[_bucket_of(hashes)])  # (likely,)
        hits = likely[contains(index, hashes[likely])]  # (hits,)
        if len(hits):
            ranges.append(_find_window_starts(hits + offset))
            hit_hashes.append(np.unique(hashes[hits]))
    joined = np.concatenate(ranges)  # (ranges, 2)
    return _merge_ranges(joined[:, 0], joined[:, 1]), np.unique(np.concatenate(hit_hashes))


def _find_shared_windows(shard: SearchShard) -> Positions:
    """Return (runs, 2): the shared windows that start in the shard, joined where they overlap."""
    starts, shared = np.clip(shard.load_array("starts"), shard.start, shard.end), shard.load_array("shared")
    starts = starts[starts[:, 0] < starts[:, 1]]  # (ranges, 2)
    runs = [np.empty((0, 2), np.int64)]
    for positions, hashes in _hash_windows(PassageFile(shard.path, shard.load_array("bounds")), starts):
        hits = positions[contains(shared, hashes)]  # (hits,)
        runs.append(_merge_ranges(hits, hits + RUN_BYTES))
    return np.concatenate(runs)


def sample_short_runs(text: PassageFile, one_in: int) -> Iterator[Hashes]:
    """Yield the hashes of about one in `one_in` of the short runs that lie within one passage of a view.

    The hash of a run decides whether it is in the sample, so samples of two texts can be compared.
    """
    limit = np.uint64(2**64 // one_in - 1)
    for offset, chunk in _read_chunks(text.path, _SHORT_RUN_BYTES):
        if len(chunk) < _SHORT_RUN_BYTES:
            continue
        hashes = _hash_grams(chunk, _SHORT_RUN_BYTES)
        inside = np.flatnonzero(hashes <= limit)  # (runs,)
        ends = text.bounds[np.searchsorted(text.bounds, inside + offset, side="right")]  # (runs,) of their passages
        yield hashes[inside[inside + offset + _SHORT_RUN_BYTES <= ends]]


def _find_window_starts(grams: Positions) -> Positions:
    """Return (ranges, 2): the ranges in which all windows start that hold one of the grams."""
    return _merge_ranges(np.maximum(grams - (RUN_BYTES - _GRAM_BYTES), 0), grams + 1)


def _hash_windows_around(texts: Sequence[PassageFile], grams: Sequence[Positions]) -> Hashes:
    """Return the sorted hashes of all windows of the texts that hold one of the grams."""
    gathered = bytearray()  # grown and then sorted in place: it can be as large as eight times the shared bytes
    for text, positions in zip(texts, grams):
        for _, hashes in _hash_windows(text, _find_window_starts(positions)):
            gathered += hashes.tobytes()
    shared = np.frombuffer(gathered, np.uint64)
    shared.sort()
    return shared


def _hash_windows(text: PassageFile, starts: Positions) -> Iterator[tuple[Positions, Hashes]]:
    """Yield positions and hashes of the windows that start in the ranges `starts` and lie within one passage."""
    for offset, chunk in _read_chunks(text.path, RUN_BYTES, starts):
        count = len(chunk) - RUN_BYTES + 1
        low = np.searchsorted(starts[:, 1], offset, side="right")
        high = np.searchsorted(starts[:, 0], offset + count)
        if low >= high or count <= 0:
            continue
        edges = np.zeros(count + 1, np.int64)  # (count + 1,) +1 where a range begins, -1 where it ends
        np.add.at(edges, np.clip(starts[low:high, 0] - offset, 0, count), 1)
        np.add.at(edges, np.clip(starts[low:high, 1] - offset, 0, count), -1)
        inside = np.flatnonzero(np.cumsum(edges[:-1]))  # (windows,)
        ends = text.bounds[np.searchsorted(text.bounds, inside + offset, side="right")]  # (windows,) of their passages
        inside = inside[inside + offset + RUN_BYTES <= ends]
        yield inside + offset, _hash_grams(chunk, RUN_BYTES)[inside]


def _read_chunks(path: Path, gram: int, ranges: Positions | None = None) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (offset, bytes) of chunks that overlap so that every gram is whole in exactly one chunk.

    With `ranges`, (n, 2), chunks that meet none of the ranges are skipped.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for offset in range(0, size, _CHUNK_BYTES):
            if ranges is not None:
                following = np.searchsorted(ranges[:, 1], offset, side="right")
                if following == len(ranges) or ranges[following, 0] >= offset + _CHUNK_BYTES:
                    continue
            file.seek(offset)
            yield offset, np.frombuffer(file.read(_CHUNK_BYTES + gram - 1), np.uint8)


@functools.cache
def _make_hash_tables() -> tuple[Hashes, Hashes, Hashes]:
    """Return a random number per byte, the powers of the base, and their inverses modulo 2^64."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    letters = random.integers(0, 2**64, 256, np.uint64)
    base = int(random.integers(0, 2**64, dtype=np.uint64)) | 5
    powers, inverses = (_compute_powers(factor) for factor in (base, pow(base, -1, 2**64)))
    return letters, powers, inverses


def _compute_powers(factor: int) -> Hashes:
    return np.cumprod(np.full(_CHUNK_BYTES + RUN_BYTES, factor, np.uint64), dtype=np.uint64)


def _hash_grams(data: npt.NDArray[np.uint8], gram: int) -> Hashes:
    """Return (len(data) - gram + 1,): the hashes of all windows of `gram` bytes."""
    letters, powers, inverses = _make_hash_tables()
    sums = np.zeros(len(data) + 1, np.uint64)  # (bytes + 1,) prefix sums
    np.cumsum(letters[data] * powers[: len(data)], out=sums[1:])
    hashes = sums[gram:] - sums[:-gram]  # (bytes - gram + 1,)
    hashes *= inverses[: len(hashes)]
    return hashes


def _make_filter(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Return (buckets,): whether any of the hashes is in the bucket."""
    is_likely = np.zeros(1 << _FILTER_BITS, np.bool_)
    is_likely[_bucket_of(hashes)] = True
    return is_likely


def _read_grams(text: PassageFile) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (offset, bytes) of chunks in one of which every gram is whole, without those too short for a gram."""
    return ((offset, chunk) for offset, chunk in _read_chunks(text.path, _GRAM_BYTES) if len(chunk) >= _GRAM_BYTES)


def _bucket_of(hashes: Hashes) -> Positions:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).view(np.int64)


def contains(ordered: Hashes, hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Return (hashes,): whether each of the hashes is in the sorted array `ordered`."""
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    order = np.argsort(hashes)  # neighbouring look-ups in order are many times faster than scattered ones
    wanted = hashes[order]
    answers = np.empty(len(hashes), np.bool_)
    answers[order] = ordered[np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)] == wanted
    return answers


def _merge_ranges(starts: Positions, ends: Positions) -> Positions:
    """Return (n, 2): the union of ranges whose starts are in order; ranges that touch are joined."""
    if not len(starts):
        return np.empty((0, 2), np.int64)
    reach = np.maximum.accumulate(ends)  # (ranges,)
    is_first = np.concatenate([[True], starts[1:] > reach[:-1]])  # (ranges,)
    is_last = np.concatenate([is_first[1:], [True]])  # (ranges,)
    return np.stack([starts[is_first], reach[is_last]], axis=1)

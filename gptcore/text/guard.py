"""Which runs of 200 bytes or more two texts share: what is removed from train, what the gate excludes.

The method is exact up to collisions of 64-bit hashes and needs memory for a hundredth of the other text only. Every
run of 200 bytes holds one whole 101-byte gram that starts at a multiple of 100 in the other text, so only those are
indexed. The text is then read once in chunks with a rolling hash; where a gram of it is in the index, all windows of
200 bytes around are compared. Hashes are polynomials modulo 2^64 in an odd base, taken as differences of prefix sums,
over bytes that are first mapped to random 64-bit numbers.
"""

import functools
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gptcore.text.workers import SHARD_BYTES, WHOLE_BYTES, Map

RUN_BYTES = 200
"""The shortest run that counts as shared."""

Positions = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
R = TypeVar("R")

_GRAM_BYTES = 101
_GRID_BYTES = 100  # _GRID_BYTES - 1 + _GRAM_BYTES == RUN_BYTES
_CHUNK_BYTES = 1 << 19
_FILTER_BITS = 23
_NEEDLE_GRAMS = (96, 48, 24, 12)
_SEED = 0x6770_7466_6C6F_77


@dataclass(frozen=True)
class Text:
    """A file whose bytes are several passages without gaps. A run counts only within one passage."""

    path: Path
    bounds: Positions
    """(passages + 1,) where the passages begin, from 0, and where the last one ends."""


@dataclass(frozen=True)
class Stretch:
    """A part of a text, which is searched for what others hold."""

    path: Path
    tables: "Path | dict[str, npt.NDArray[Any]]"
    """Arrays by name, or the directory in which they are saved."""
    start: int
    end: int
    """A gram or window that begins before it may reach beyond."""

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    def table(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays."""
        if isinstance(self.tables, dict):
            return self.tables[name]
        saved: npt.NDArray[Any] = np.load(self.tables / f"{name}.npy", mmap_mode="r")
        return saved


def shared_runs(text: Text, others: Sequence[Text], mapped: Map | None = None) -> Positions:
    """(runs, 2) where in `text` runs of at least RUN_BYTES begin and end that a passage of `others` holds too.

    Overlapping and touching runs are joined; they are in order and extended outward to whole UTF-8 characters. A long
    text is searched in stretches, which `mapped` distributes; what they need is left beside the text meanwhile.
    """
    grams = [_grid_grams(other) for other in others]
    index = np.unique(np.concatenate([hashes for _, hashes in grams])) if grams else np.empty(0, np.uint64)
    if not len(index):
        return np.empty((0, 2), np.int64)
    occurrences = _searched(text, _occurrences, {"index": index}, mapped)
    joined = np.concatenate([ranges for ranges, _ in occurrences])
    starts, found = _merged(joined[:, 0], joined[:, 1]), np.unique(np.concatenate([hits for _, hits in occurrences]))
    shared = _window_hashes(others, [positions[np.isin(hashes, found)] for positions, hashes in grams])
    tables = {"bounds": text.bounds, "starts": starts, "shared": shared}
    runs = [np.empty((0, 2), np.int64)]
    if len(shared):
        runs += _searched(text, _matches, tables, mapped)
    joined = _whole_characters(text.path, np.concatenate(runs))
    return _merged(joined[:, 0], joined[:, 1])


def _searched(
    text: Text, search: Callable[[Stretch], R], tables: dict[str, npt.NDArray[Any]], mapped: Map | None
) -> list[R]:
    """What `search` finds in the stretches of the text, in order."""
    size = text.path.stat().st_size
    if mapped is None or size <= WHOLE_BYTES:
        return [search(Stretch(text.path, tables, 0, size))]
    path = text.path.absolute()
    with tempfile.TemporaryDirectory(prefix="guard-", dir=path.parent) as name:
        for table, values in tables.items():
            np.save(Path(name) / table, values)
        starts = range(0, size, SHARD_BYTES)
        stretches = [Stretch(path, Path(name), start, min(start + SHARD_BYTES, size)) for start in starts]
        return mapped("ingest", "guarded", search, stretches)


def contained(needles: Collection[bytes], path: Path) -> set[bytes]:
    """Which of the needles, each at most RUN_BYTES long, stand in the file as a whole. Passages do not matter.

    The first 96, 48, 24 or 12 bytes of each are looked up in a chunk by hash; only what may be there is searched for.
    """
    waiting: dict[int, dict[bytes, int]] = {gram: {} for gram in (*_NEEDLE_GRAMS, 0)}
    for needle in needles:
        gram = next((gram for gram in _NEEDLE_GRAMS if gram <= len(needle)), 0)
        head = np.frombuffer(needle[:gram], np.uint8)
        waiting[gram][needle] = int(_gram_hashes(head, gram)[0]) if gram else 0
    found: set[bytes] = set()
    for _, chunk in _chunks(path, RUN_BYTES) if needles else ():
        data = chunk.tobytes()
        for gram, hashes in waiting.items():
            here = {needle for needle in _likely(hashes, chunk, gram) if needle in data}
            found |= here
            waiting[gram] = {needle: value for needle, value in hashes.items() if needle not in here}
    return found


def _likely(needles: dict[bytes, int], chunk: npt.NDArray[np.uint8], gram: int) -> list[bytes]:
    """Needles whose first `gram` bytes may stand in the chunk; without a gram, all of them."""
    if not needles or not gram:
        return list(needles)
    wanted = np.fromiter(needles.values(), np.uint64, len(needles))
    is_likely = np.zeros(1 << _FILTER_BITS, np.bool_)
    is_likely[_bucket(wanted)] = True
    hashes = _gram_hashes(chunk, gram)
    is_there = np.isin(wanted, hashes[is_likely[_bucket(hashes)]])
    return [needle for needle, is_found in zip(needles, is_there) if is_found]


def _grid_grams(text: Text) -> tuple[Positions, Hashes]:
    """Positions and hashes of the grams at every hundredth byte of every passage."""
    lengths = np.diff(text.bounds)
    counts = np.where(lengths >= RUN_BYTES, (lengths - _GRAM_BYTES) // _GRID_BYTES + 1, 0)
    firsts = np.cumsum(counts) - counts
    positions = np.repeat(text.bounds[:-1] - firsts * _GRID_BYTES, counts) + np.arange(counts.sum()) * _GRID_BYTES
    hashes = np.empty(len(positions), np.uint64)
    for offset, chunk in _chunks(text.path, _GRAM_BYTES):
        low, high = np.searchsorted(positions, [offset, offset + max(len(chunk) - _GRAM_BYTES + 1, 0)])
        if low < high:
            hashes[low:high] = _gram_hashes(chunk, _GRAM_BYTES)[positions[low:high] - offset]
    return positions, hashes


def _occurrences(stretch: Stretch) -> tuple[Positions, Hashes]:
    """Where windows around grams of the stretch that are indexed may start, as (n, 2) ranges; and those grams' hashes.

    They may start before the stretch.
    """
    index = stretch.table("index")
    is_likely = np.zeros(1 << _FILTER_BITS, np.bool_)
    is_likely[_bucket(index)] = True
    ranges, found = [np.empty((0, 2), np.int64)], [np.empty(0, np.uint64)]
    for offset, chunk in _chunks(stretch.path, _GRAM_BYTES, np.array([[stretch.start, stretch.end]])):
        hashes = _gram_hashes(chunk, _GRAM_BYTES)
        likely = np.flatnonzero(is_likely[_bucket(hashes)])
        hits = likely[_contains(index, hashes[likely])]
        if len(hits):
            ranges.append(_starts_around(hits + offset))
            found.append(np.unique(hashes[hits]))
    joined = np.concatenate(ranges)
    return _merged(joined[:, 0], joined[:, 1]), np.unique(np.concatenate(found))


def _matches(stretch: Stretch) -> Positions:
    """(n, 2) the windows that start in the stretch and are shared, joined."""
    starts, shared = np.clip(stretch.table("starts"), stretch.start, stretch.end), stretch.table("shared")
    starts = starts[starts[:, 0] < starts[:, 1]]
    runs = [np.empty((0, 2), np.int64)]
    for positions, hashes in _windows(Text(stretch.path, stretch.table("bounds")), starts):
        hits = positions[_contains(shared, hashes)]
        runs.append(_merged(hits, hits + RUN_BYTES))
    return np.concatenate(runs)


def _starts_around(grams: Positions) -> Positions:
    """(n, 2) ranges of the starts of all windows that hold one of the grams."""
    return _merged(np.maximum(grams - (RUN_BYTES - _GRAM_BYTES), 0), grams + 1)


def _window_hashes(texts: Sequence[Text], grams: Sequence[Positions]) -> Hashes:
    """Sorted hashes of all windows of the texts that hold one of the grams."""
    gathered = bytearray()  # grown and then sorted in place: it can be as large as eight times the shared bytes
    for text, positions in zip(texts, grams):
        for _, hashes in _windows(text, _starts_around(positions)):
            gathered += hashes.tobytes()
    shared = np.frombuffer(gathered, np.uint64)
    shared.sort()
    return shared


def _windows(text: Text, starts: Positions) -> Iterator[tuple[Positions, Hashes]]:
    """Positions and hashes of the windows that start in the ranges `starts` and lie within one passage."""
    for offset, chunk in _chunks(text.path, RUN_BYTES, starts):
        count = len(chunk) - RUN_BYTES + 1
        low = np.searchsorted(starts[:, 1], offset, side="right")
        high = np.searchsorted(starts[:, 0], offset + count)
        if low >= high or count <= 0:
            continue
        edges = np.zeros(count + 1, np.int64)
        np.add.at(edges, np.clip(starts[low:high, 0] - offset, 0, count), 1)
        np.add.at(edges, np.clip(starts[low:high, 1] - offset, 0, count), -1)
        inside = np.flatnonzero(np.cumsum(edges[:-1]))
        ends = text.bounds[np.searchsorted(text.bounds, inside + offset, side="right")]
        inside = inside[inside + offset + RUN_BYTES <= ends]
        yield inside + offset, _gram_hashes(chunk, RUN_BYTES)[inside]


def _chunks(path: Path, gram: int, ranges: Positions | None = None) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(offset, bytes) that overlap so that every gram is whole in exactly one chunk; only those that meet `ranges`."""
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
def _tables() -> tuple[Hashes, Hashes, Hashes]:
    """A random number per byte, the powers of the base, and their inverses modulo 2^64."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    letters = random.integers(0, 2**64, 256, np.uint64)
    base = int(random.integers(0, 2**64, dtype=np.uint64)) | 5
    powers, inverses = (_powers(factor) for factor in (base, pow(base, -1, 2**64)))
    return letters, powers, inverses


def _powers(factor: int) -> Hashes:
    return np.cumprod(np.full(_CHUNK_BYTES + RUN_BYTES, factor, np.uint64), dtype=np.uint64)


def _gram_hashes(data: npt.NDArray[np.uint8], gram: int) -> Hashes:
    """(len(data) - gram + 1,) hashes of every stretch of `gram` bytes."""
    letters, powers, inverses = _tables()
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(letters[data] * powers[: len(data)], out=sums[1:])
    hashes = sums[gram:] - sums[:-gram]
    hashes *= inverses[: len(hashes)]
    return hashes


def _bucket(hashes: Hashes) -> Positions:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).view(np.int64)


def _contains(ordered: Hashes, hashes: Hashes) -> npt.NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(hashes), np.bool_)
    order = np.argsort(hashes)  # neighbouring look-ups in order are many times faster than scattered ones
    asked = hashes[order]
    answers = np.empty(len(hashes), np.bool_)
    answers[order] = ordered[np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)] == asked
    return answers


def _merged(starts: Positions, ends: Positions) -> Positions:
    """(n, 2) the union of ranges whose starts are in order, touching ones joined."""
    if not len(starts):
        return np.empty((0, 2), np.int64)
    reach = np.maximum.accumulate(ends)
    is_first = np.concatenate([[True], starts[1:] > reach[:-1]])
    is_last = np.concatenate([is_first[1:], [True]])
    return np.stack([starts[is_first], reach[is_last]], axis=1)


def _whole_characters(path: Path, runs: Positions) -> Positions:
    """The runs with both ends moved outward, off the continuation bytes of UTF-8."""
    wider = runs.copy()
    with path.open("rb") as file:
        for run in wider:
            file.seek(max(int(run[0]) - 3, 0))
            before = file.read(min(int(run[0]), 3) + 1)
            run[0] -= next(back for back in range(len(before)) if before[-1 - back] & 0xC0 != 0x80)
            file.seek(int(run[1]))
            after = file.read(3)
            run[1] += next((on for on, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
    return wider

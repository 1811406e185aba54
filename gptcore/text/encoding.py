"""A large snapshot encoded in shards: what each gave is a committed directory, and joined they are the token files.

A shard is a range of bytes of one side, about 16 MiB. It ends with a passage, or where `tokenizer.pieces` cuts a very
long one, so that the ids are those of the text as a whole. Its part is named by the range, in a directory that belongs
to this snapshot and this tokenizer; the next run after a kill takes it over.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from gptcore import corpus, manifest
from gptcore.errors import CheckpointError
from gptcore.text import guard, tokens
from gptcore.text.workers import SHARD_BYTES, Map
from gptcore.tokenizer import Tokenizer, pieces

_VOCABULARY, _IDS = "vocabulary", "ids.bin"


@dataclass(frozen=True)
class Shard:
    """Bytes `start` to `end` of one side of a snapshot."""

    snapshot: Path
    side: str
    directory: Path
    """Holds the vocabulary, where the passages begin, and the parts."""
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Of text."""
        return self.end - self.start

    @property
    def part(self) -> Path:
        """The directory that the shard becomes."""
        return self.directory / f"{self.side}-{self.start}-{self.end}"

    @property
    def bounds(self) -> guard.Positions:
        """(passages + 1,) where the passages of the side begin and the last one ends, mapped from disk."""
        found: guard.Positions = np.load(_bounds_file(self.directory, self.side), mmap_mode="r")
        return found


def vocabulary(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that is kept in the directory, made unless it is there: training one takes time."""
    goal = directory / _VOCABULARY
    if not manifest.is_committed(goal):
        with manifest.staging(directory) as staged:
            make().save(staged)
            manifest.commit(staged, goal, {"kind": "vocabulary"})
    return Tokenizer.load(goal)


def in_shards(snapshot: Path, directory: Path, mapped: Map) -> dict[str, Iterator[np.ndarray]]:
    """The ids of each side, part by part. `vocabulary` has been called before."""
    shards = [shard for side in tokens.SIDES for shard in plan(snapshot, side, directory)]
    made = list(zip(shards, mapped("tokenize", "encoded", encode, shards)))
    return {side: map(_ids, [part for shard, part in made if shard.side == side]) for side in tokens.SIDES}


def plan(snapshot: Path, side: str, directory: Path) -> list[Shard]:
    """The side in shards; writes down where its passages begin."""
    text = corpus.side_text(snapshot, side)
    with manifest.staging(directory) as staged:
        np.save(staged / "bounds.npy", text.bounds)
        (staged / "bounds.npy").replace(_bounds_file(directory, side))
    borders = text.bounds
    with text.path.open("rb") as file:
        for number in np.flatnonzero(np.diff(text.bounds) > SHARD_BYTES).tolist():
            borders = np.union1d(borders, _cuts(file, *text.bounds[number : number + 2].tolist()))
    shards, start, size = [], 0, int(borders[-1])
    while start < size:
        last = int(np.searchsorted(borders, start + SHARD_BYTES, side="right")) - 1
        if borders[last] <= start:  # where nothing can be cut, a shard is longer
            last += 1
        shards.append(Shard(snapshot, side, directory, start, int(borders[last])))
        start = shards[-1].end
    return shards


def _bounds_file(directory: Path, side: str) -> Path:
    return directory / f"{side}-bounds.npy"


def _cuts(file: IO[bytes], start: int, end: int) -> list[int]:
    """Where the pieces of the passage between two bytes of the file end."""
    file.seek(start)
    cuts = []
    for piece in pieces(tokens.chunks(file, end - start)):
        start += len(piece.encode())
        cuts.append(start)
    return cuts


def encode(shard: Shard) -> Path:
    """The shard's part, made unless it is there. Memory does not grow with the shard."""
    if manifest.is_committed(shard.part):
        try:
            manifest.verify(shard.part)
            return shard.part
        except CheckpointError:
            manifest.remove(shard.part)
    tokenizer = _tokenizer(shard.directory / _VOCABULARY)
    with manifest.staging(shard.directory) as staged, (shard.snapshot / f"{shard.side}.txt").open("rb") as file:
        bounds = shard.bounds
        first, last = np.searchsorted(bounds, [shard.start, shard.end])
        inner = bounds[first:last]
        edges = np.unique(np.concatenate([[shard.start], inner, [shard.end]]))
        file.seek(shard.start)
        passages = (tokens.chunks(file, length) for length in np.diff(edges).tolist())
        follows = 0 < shard.start == bounds[first]
        batches = tokens.batches(passages, follows_another=follows)
        tokens.write_ids(staged / _IDS, (tokens.encode(tokenizer, batch) for batch in batches))
        dtype = np.dtype(tokens.dtype_of(tokenizer.n_vocab)).name
        manifest.commit(staged, shard.part, {"kind": "token part", "dtype": dtype})
    return shard.part


@functools.lru_cache(maxsize=1)
def _tokenizer(saved: Path) -> Tokenizer:
    """Kept for the next shard: the directory's name says whose it is."""
    return Tokenizer.load(saved)


def _ids(part: Path) -> np.ndarray:
    return np.fromfile(part / _IDS, np.dtype(manifest.about(part)["dtype"]))

"""Encode a large snapshot in shards: each shard becomes a committed directory, and joined they are the token files.

A shard is a range of bytes of one side, about 16 MiB. It ends with a passage, or inside a very long passage at a cut of
`cut_into_pieces`, so that the ids are those of the whole text. The output of a shard is named after its range. It lies
in a work directory that belongs to this snapshot and this tokenizer, so that the next run after a kill reuses it.

The caller's `MapShards` (gptcore/processes.py) decides which processes encode the shards. See files.py for what the ids
become.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptcore import manifest
from gptcore.corpus import contamination
from gptcore.corpus.shards import SHARD_BYTES
from gptcore.corpus.snapshot import side_text
from gptcore.processes import MapShards
from gptcore.tokens.directory import SIDES, dtype_of, write_ids
from gptcore.tokens.encode import batch_passages, encode_batch, load_once, read_chunks
from gptcore.tokens.tokenizer import Tokenizer, cut_into_pieces

_VOCABULARY, _IDS = "vocabulary", "ids.bin"


@dataclass(frozen=True)
class Shard:
    """Bytes `start` to `end` of one side of a snapshot."""

    snapshot: Path
    side: str
    directory: Path
    """The work directory: the vocabulary, the bounds of the passages, and the outputs."""
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of text in the shard."""
        return self.end - self.start

    @property
    def output(self) -> Path:
        """The directory that holds the ids of the shard."""
        return self.directory / f"{self.side}-{self.start}-{self.end}"

    @property
    def bounds(self) -> contamination.Positions:
        """The offsets at which the passages of the side begin, then its end: (passages + 1,), mapped from disk."""
        bounds: contamination.Positions = np.load(_bounds_file(self.directory, self.side), mmap_mode="r")
        return bounds


def load_or_make_vocabulary(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """Load the tokenizer of the work directory. If there is none, call `make`, which may train one, and save it."""

    def fill(staged: Path) -> dict[str, Any]:
        make().save(staged)
        return {"kind": "vocabulary"}

    return Tokenizer.load(manifest.make_once(directory / _VOCABULARY, fill))


def encode_in_shards(snapshot: Path, directory: Path, map_shards: MapShards) -> dict[str, Iterator[np.ndarray]]:
    """Encode both sides of a snapshot, and return the ids of each side, one array (tokens,) per shard.

    The work directory must hold the vocabulary: call `load_or_make_vocabulary` first.
    """
    shards = [shard for side in SIDES for shard in plan_shards(snapshot, side, directory)]
    outputs = map_shards("tokenize", "encoded", encode_shard, shards)
    return {
        side: map(_read_ids, [output for shard, output in zip(shards, outputs) if shard.side == side]) for side in SIDES
    }


def plan_shards(snapshot: Path, side: str, directory: Path) -> list[Shard]:
    """Divide a side into shards, and save the bounds of its passages in the work directory."""
    text = side_text(snapshot, side)
    with manifest.stage(directory) as staged:
        np.save(staged / "bounds.npy", text.bounds)
        (staged / "bounds.npy").replace(_bounds_file(directory, side))
    borders = text.bounds  # (passages + 1,)
    with text.path.open("rb") as file:
        for number in np.flatnonzero(np.diff(text.bounds) > SHARD_BYTES).tolist():
            start, end = text.bounds[number : number + 2].tolist()
            borders = np.union1d(borders, _find_cuts(file, start, end))  # (borders,)
    shards, start, size = [], 0, int(borders[-1])
    while start < size:
        last = int(np.searchsorted(borders, start + SHARD_BYTES, side="right")) - 1
        if borders[last] <= start:  # the text cannot be cut within SHARD_BYTES, so this shard is longer
            last += 1
        shards.append(Shard(snapshot=snapshot, side=side, directory=directory, start=start, end=int(borders[last])))
        start = shards[-1].end
    return shards


def _bounds_file(directory: Path, side: str) -> Path:
    return directory / f"{side}-bounds.npy"


def _find_cuts(file: IO[bytes], start: int, end: int) -> list[int]:
    """Return the offsets at which `cut_into_pieces` cuts the passage between two offsets, its end included."""
    file.seek(start)
    cuts = []
    for piece in cut_into_pieces(read_chunks(file, end - start)):
        start += len(piece.encode())
        cuts.append(start)
    return cuts


def encode_shard(shard: Shard) -> Path:
    """Encode a shard unless its output exists and is intact. Return the output. Memory does not grow with the shard."""
    return manifest.make_once(shard.output, functools.partial(_write_shard, shard))


def _write_shard(shard: Shard, staged: Path) -> dict[str, Any]:
    """Encode a shard into a file. Return what the manifest says about it."""
    tokenizer = load_once(shard.directory / _VOCABULARY)  # the path names corpus and tokenizer
    with (shard.snapshot / f"{shard.side}.txt").open("rb") as file:
        bounds = shard.bounds
        first, last = np.searchsorted(bounds, [shard.start, shard.end])
        inner = bounds[first:last]
        edges = np.unique(np.concatenate([[shard.start], inner, [shard.end]]))
        file.seek(shard.start)
        passages = (read_chunks(file, length) for length in np.diff(edges).tolist())
        follows_another = 0 < shard.start == bounds[first]  # else the shard begins the side, or inside a passage
        batches = batch_passages(passages, follows_another=follows_another)
        write_ids(staged / _IDS, (encode_batch(tokenizer, batch) for batch in batches))
    return {"kind": "token part", "dtype": dtype_of(tokenizer.n_vocab).name}


def _read_ids(output: Path) -> np.ndarray:
    """Return the ids of one shard: (tokens,)."""
    return np.fromfile(output / _IDS, np.dtype(manifest.read_about(output)["dtype"]))

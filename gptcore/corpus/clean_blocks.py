"""Select the clean blocks of held-out text: blocks that share no run with a training text.

ingest.py keeps the training text of one snapshot free of such runs. Nothing does so between two snapshots, such as
tonight's holdout and the text that an older champion was trained on: a document may have been edited, or a block may
have changed sides with the split's settings. So the blocks on which two models are compared are selected here.
contamination.py finds the runs. Of much held-out text, only as much is searched as is needed for the sample that is
scored.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore import manifest
from gptcore.corpus import contamination
from gptcore.corpus.normalize import NormalizedFile, PassageFile, normalize, normalize_file
from gptcore.corpus.snapshot import (
    Block,
    BlockEntry,
    count_sampled,
    order_by_hash,
    passage_bounds,
    read_block_entries,
    read_chosen_blocks,
    side_text,
)
from gptcore.manifest import TEMPORARY

_RESERVE = 1.25
"""How many times as much text as needed is searched at first, because some of it may not be clean."""


@dataclass(frozen=True)
class CleanBlocks:
    """The clean blocks of one side that are scored, and how much of it was excluded."""

    blocks: tuple[Block, ...]
    """In order. Of much text, a sample."""
    excluded_bytes: int
    """Bytes of whole blocks: a block that shares a run is excluded as a whole. Of a sample, the blocks that would be in
    it if they were clean."""
    is_old: tuple[bool, ...] = ()
    """(blocks,): whether each block is old, as given."""
    weights: tuple[float, ...] = ()
    """(blocks,): how many times its own length of old or new text each block stands for; 1 unless it is one of a
    sample."""


def find_clean_blocks(
    snapshot: Path,
    side: str,
    trained_on: Sequence[Path],
    max_bytes: int | None = None,
    is_old: Sequence[bool] | None = None,
) -> CleanBlocks:
    """Select the blocks of val or holdout of `snapshot` that are in no training text of the snapshots `trained_on`.

    If the clean blocks have more than `max_bytes`, those with the lowest hashes are selected (`snapshot.count_sampled`
    says how many). `is_old`, (blocks of the side,), divides them into old and new ones, with a sample of each.

    See contamination.py for what a shared run is. A block whose view is shorter than a run is excluded if the view of a
    training text contains the block's whole view. The views are written to a temporary directory beside the snapshot.
    """
    entries = list(read_block_entries(snapshot, side))
    ages = [False] * len(entries) if is_old is None else list(is_old)  # (entries,)
    order = order_by_hash(entries)
    groups = [_Group([entries[n] for n in order if ages[n] == age], max_bytes) for age in (True, False)]
    # Neighbouring blocks may share a run only together, so they are searched together, not a sample of them.
    is_joined = manifest.read_about(snapshot)["split"]["split"] == "contiguous"
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=snapshot.parent) as directory:
        texts = [
            normalize_file(side_text(path, "train"), Path(directory) / f"train-{number}")
            for number, path in enumerate(trained_on)
        ]
        is_clean: dict[BlockEntry, bool] = {}
        while wanted := [entry for group in groups for entry in group.list_wanted(is_clean)]:
            wanted = entries if is_joined else wanted
            blocks = list(read_chosen_blocks(snapshot, side, wanted))
            text = side_text(snapshot, side) if is_joined else _write(blocks, Path(directory) / "held-out.txt")
            held_out = normalize_file(text, Path(directory) / "held-out")
            is_clean.update(zip(wanted, _are_clean(blocks, held_out, texts)))
    excluded_bytes = 0
    chosen: list[tuple[BlockEntry, bool, float]] = []
    for age, group in zip((True, False), groups):
        clean, excluded, weight = group.choose(is_clean)
        chosen += [(entry, age, weight) for entry in clean]
        excluded_bytes += sum(entry.bytes for entry in excluded)
    chosen.sort(key=lambda block: block[0].offset or 0)
    return CleanBlocks(
        blocks=tuple(read_chosen_blocks(snapshot, side, [entry for entry, _, _ in chosen])),
        excluded_bytes=excluded_bytes,
        is_old=tuple(age for _, age, _ in chosen),
        weights=tuple(weight for _, _, weight in chosen),
    )


@dataclass(frozen=True)
class _Group:
    """Old or new blocks, in the order of their hashes. The first ones that are clean are scored."""

    entries: list[BlockEntry]
    max_bytes: int | None

    def list_wanted(self, is_clean: Mapping[BlockEntry, bool]) -> list[BlockEntry]:
        """List the blocks to search next. None are left once it is known which blocks are scored."""
        searched = sum(entry in is_clean for entry in self.entries)  # the first ones
        rest = self.entries[searched:]
        if self._find_end(is_clean) is not None:
            return []
        if self.max_bytes is None:
            return rest
        most = max(int(_RESERVE * self.max_bytes), sum(entry.bytes for entry in self.entries[:searched]))
        return rest[: count_sampled([entry.bytes for entry in rest], most) + 1]

    def choose(self, is_clean: Mapping[BlockEntry, bool]) -> tuple[list[BlockEntry], list[BlockEntry], float]:
        """Return the clean blocks that are scored, the blocks before the last of them that are not clean, and a weight.

        The weight is the share of the group's bytes that these blocks are, inverted.
        """
        first = self.entries[: self._find_end(is_clean)]
        weight = sum(entry.bytes for entry in self.entries) / max(1, sum(entry.bytes for entry in first))
        return [e for e in first if is_clean[e]], [e for e in first if not is_clean[e]], weight

    def _find_end(self, is_clean: Mapping[BlockEntry, bool]) -> int | None:
        """Return how many of the first blocks the scored ones are chosen from. None if more have to be searched."""
        clean = [number for number, entry in enumerate(self.entries) if is_clean.get(entry)]
        count = count_sampled([self.entries[number].bytes for number in clean], self.max_bytes)
        if count < len(clean):
            return clean[count]
        return len(self.entries) if all(entry in is_clean for entry in self.entries) else None


def _write(blocks: Sequence[Block], path: Path) -> PassageFile:
    """Write the text of blocks to a file, each as a passage."""
    texts = [block.text.encode() for block in blocks]
    path.write_bytes(b"".join(texts))
    return PassageFile(path, passage_bounds([len(text) for text in texts]))


def _are_clean(
    blocks: Sequence[Block], held_out: NormalizedFile, training_texts: Sequence[NormalizedFile]
) -> list[bool]:
    """Return (blocks,): whether the block shares no run with a training text. `held_out` holds these blocks."""
    texts = [block.text.encode() for block in blocks]
    runs = contamination.find_shared_runs(held_out, training_texts)  # (runs, 2)
    short = {view for view in map(normalize, texts) if len(view) < contamination.RUN_BYTES}
    known = set().union(*(contamination.find_contained(short, text.view.path) for text in training_texts))
    ends = np.cumsum([len(text) for text in texts])  # (blocks,)
    starts = ends - [len(text) for text in texts]  # (blocks,)
    # A block shares a run if more runs begin before its end than end before its start.
    is_shared = np.searchsorted(runs[:, 1], starts, side="right") < np.searchsorted(runs[:, 0], ends)  # (blocks,)
    return [not shared and normalize(text) not in known for shared, text in zip(is_shared, texts)]

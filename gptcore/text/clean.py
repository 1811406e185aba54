"""Which blocks of held-out text are clean: neither in a training text, nor sharing a run of 200 bytes with one.

The guard keeps a snapshot's own training text free of such runs. Between two snapshots, tonight's holdout and what an
older champion learned from, nothing does: a document may have been edited, a block may have changed sides with the
split's settings. So what two models are compared on is looked up here. How runs are found stands in guard.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.corpus import Block, blocks, side_text
from gptcore.text import guard


@dataclass(frozen=True)
class CleanBlocks:
    """What is left to be compared on."""

    blocks: tuple[Block, ...]
    excluded_blocks: int
    excluded_bytes: int
    """Of whole blocks: one that shares a run is left out altogether."""


def clean_blocks(snapshot: Path, side: str, trained_on: Sequence[Path]) -> CleanBlocks:
    """The blocks of val or holdout of `snapshot` that stand in no training text of the snapshots `trained_on`."""
    every = list(blocks(snapshot, side))
    texts = [block.text.encode() for block in every]
    learned = [side_text(path, "train") for path in trained_on]
    runs = guard.shared_runs(side_text(snapshot, side), learned)
    ends = np.cumsum([len(text) for text in texts])
    starts = ends - [len(text) for text in texts]
    is_shared = np.searchsorted(runs[:, 1], starts, side="right") < np.searchsorted(runs[:, 0], ends)
    short = {text for text in texts if len(text) < guard.RUN_BYTES}
    known = set().union(*(guard.contained(short, text.path) for text in learned))
    clean = [not shared and text not in known for shared, text in zip(is_shared, texts)]
    kept = tuple(block for block, is_clean in zip(every, clean) if is_clean)
    lost = sum(len(text) for text, is_clean in zip(texts, clean) if not is_clean)
    return CleanBlocks(kept, len(every) - len(kept), lost)

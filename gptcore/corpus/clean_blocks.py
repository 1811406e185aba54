"""Select the clean blocks of held-out text: blocks that share no run with a training text.

ingest.py keeps the training text of one snapshot free of such runs. Nothing does so between two snapshots, such as
tonight's holdout and the text that an older champion was trained on: a document may have been edited, or a block may
have changed sides with the split's settings. So the blocks on which two models are compared are selected here.
contamination.py finds the runs.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore.corpus import contamination
from gptcore.corpus.normalize import normalize, normalize_file
from gptcore.corpus.snapshot import Block, read_blocks, side_text
from gptcore.manifest import TEMPORARY


@dataclass(frozen=True)
class CleanBlocks:
    """The clean blocks of one side, and how much of it was excluded."""

    blocks: tuple[Block, ...]
    excluded_bytes: int
    """Bytes of whole blocks: a block that shares a run is excluded as a whole."""


def find_clean_blocks(snapshot: Path, side: str, trained_on: Sequence[Path]) -> CleanBlocks:
    """Select the blocks of val or holdout of `snapshot` that are in no training text of the snapshots `trained_on`.

    See contamination.py for what a shared run is. A block whose view is shorter than a run is excluded if the view of a
    training text contains the block's whole view. The views are written to a temporary directory beside the snapshot.
    """
    blocks = list(read_blocks(snapshot, side))
    texts = [block.text.encode() for block in blocks]
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=snapshot.parent) as views:
        held_out = normalize_file(side_text(snapshot, side), Path(views) / "held-out")
        training_texts = [
            normalize_file(side_text(path, "train"), Path(views) / f"train-{number}")
            for number, path in enumerate(trained_on)
        ]
        runs = contamination.find_shared_runs(held_out, training_texts)  # (runs, 2)
        short = {view for view in map(normalize, texts) if len(view) < contamination.RUN_BYTES}
        known = set().union(*(contamination.find_contained(short, text.view.path) for text in training_texts))
    ends = np.cumsum([len(text) for text in texts])  # (blocks,)
    starts = ends - [len(text) for text in texts]  # (blocks,)
    # A block shares a run if more runs begin before its end than end before its start.
    is_shared = np.searchsorted(runs[:, 1], starts, side="right") < np.searchsorted(runs[:, 0], ends)  # (blocks,)
    is_clean = [not shared and normalize(text) not in known for shared, text in zip(is_shared, texts)]
    kept = tuple(block for block, clean in zip(blocks, is_clean) if clean)
    excluded_bytes = sum(len(text) for text, clean in zip(texts, is_clean) if not clean)
    return CleanBlocks(kept, excluded_bytes)

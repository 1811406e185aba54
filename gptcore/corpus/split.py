"""Assign each block of text to a side of the split: train, val or holdout.

A block is cut where its own content says so (blocks.py), and its side follows from the hash of its bytes. So renaming,
copying and reordering files change nothing, and an insertion moves only the block that it falls into. A corpus can
grow while yesterday's holdout stays unseen. Text that is still on two sides at once is found by contamination.py.

If a change gives equal documents other sides, raise ingest.CORPUS_VERSION.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from gptcore.config import CorpusConfig
from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.documents import DocumentStore

SIDES = ("train", "val", "holdout")


class BlockWithSide(NamedTuple):
    """A block and its side."""

    document: int
    side: str
    """One of SIDES, or `duplicate` for a copy that is left out."""
    sha256: str
    data: bytes


def assign_blocks(cfg: CorpusConfig, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks of all documents, in order, with the sides that `cfg.split` gives them."""
    return (_assign_by_hash if cfg.split == "hash" else _assign_by_position)(cfg, documents)


def _assign_by_hash(cfg: CorpusConfig, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks with the side of their hash, or `duplicate` for copies that are left out."""
    seen: set[bytes] = set()
    for number, document in enumerate(documents.entries):
        for data, digest in documents.read_blocks(document, cfg.block_bytes):
            sha256 = digest.hex()
            side = side_of(sha256, cfg.val_fraction, cfg.holdout_fraction)
            if (document.is_copy or digest in seen) and not (cfg.duplicates == "keep" and side == "train"):
                side = "duplicate"
            else:
                seen.add(digest)
            yield BlockWithSide(number, side, sha256, data)


def _assign_by_position(cfg: CorpusConfig, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks with the side of their position: first train, then val, last holdout.

    The sides are cut at a number of characters, as the book (Sebastian Raschka, "Build a Large Language Model (From
    Scratch)") cuts its text.
    """
    total = sum(document.chars for document in documents.entries)
    ends = _side_ends(cfg, total)
    first = 0
    for number, document in enumerate(documents.entries):
        borders = [min(max(end - first, 0), document.chars) for end in ends.values()]
        offsets = [document.offset, *(documents.find_byte_offset(document, border) for border in borders)]
        for side, start, end in zip(ends, offsets, offsets[1:]):
            if end - start == document.bytes:
                blocks = documents.read_blocks(document, cfg.block_bytes)
            else:
                cuts = cut_blocks(documents.read_chunks(start, end), cfg.block_bytes)
                blocks = ((data, hashlib.sha256(data).digest()) for data in cuts)
            is_left_out = document.is_copy and side != "train"
            for data, digest in blocks:
                yield BlockWithSide(number, "duplicate" if is_left_out else side, digest.hex(), data)
        first += document.chars


def _side_ends(cfg: CorpusConfig, total_chars: int) -> dict[str, int]:
    """Return the end of each side, in characters. Rounded, because 1 - 0.05 - 0.05 is a little less than 0.9."""
    train = int(round(1 - cfg.val_fraction - cfg.holdout_fraction, 12) * total_chars)
    val = int(round(1 - cfg.holdout_fraction, 12) * total_chars)
    return {"train": train, "val": val, "holdout": total_chars}


def side_of(sha256: str, val_fraction: float, holdout_fraction: float) -> str:
    """Return the side of the block with this hash. A larger val_fraction takes blocks from train only.

    For example, a hash that begins with sixteen zeros is on holdout unless `holdout_fraction` is 0.
    """
    share = int(sha256[:16], 16) / 2**64
    if share < holdout_fraction:
        return "holdout"
    return "val" if share < holdout_fraction + val_fraction else "train"

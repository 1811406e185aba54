"""Assign each block of text to a side of the split: train, val or holdout.

A block is cut where its own content says so (blocks.py), and its side follows from the hash of its bytes. So renaming,
copying and reordering files change nothing, and an insertion moves only the block that it falls into. A corpus can
grow while yesterday's holdout stays unseen. Text that is still on two sides at once is found by contamination.py.

Settings that the configuration leaves empty are chosen from the size of the text (`choose_settings`). Every snapshot
records its settings, and the later snapshots of a pipeline keep them (`fill_settings`).

If a change gives equal documents other sides, raise ingest.CORPUS_VERSION.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gptcore.config import CorpusConfig
from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.documents import DocumentStore
from gptcore.sections import parse

SIDES = ("train", "val", "holdout")
SPLIT_KEYS = ("split", "block_bytes", "val_fraction", "holdout_fraction")
"""Keys of CorpusConfig that decide the side of a text. Another value moves text between the sides."""

ENOUGH_BLOCKS = 25
"""Blocks that the reported side should have at least. The gate needs 20 (compare.MIN_BLOCKS) that are clean for both
models, so 1 in 5 may have copies in a training text."""
ENOUGH_VAL_BLOCKS = 10
"""Blocks that val should have at least if scores are reported on holdout: it only chooses the best checkpoint."""
LARGE_BYTES = 8 * 1024 * 1024
"""A text of this size has enough blocks with the first of the `CHOICES`, so they are not counted."""


class _Choice(NamedTuple):
    block_bytes: int
    val_fraction: float
    holdout_fraction: float


CHOICES = (
    _Choice(2048, 0.05, 0.05),  # prose from about 1 MB on
    _Choice(1024, 0.05, 0.1),  # from about 300 kB
    _Choice(512, 0.1, 0.15),  # from about 100 kB
    _Choice(256, 0.1, 0.2),  # from about 50 kB
    _Choice(192, 0.15, 0.25),  # from about 30 kB; from here on, short documents are cut as well
    _Choice(128, 0.2, 0.25),  # from about 20 kB
    _Choice(96, 0.2, 0.3),  # from about 12 kB
    _Choice(64, 0.25, 0.3),
)
"""What `choose_settings` chooses from, for smaller and smaller texts."""


@dataclass(frozen=True)
class SplitSettings:
    """How a corpus is split: the keys of CorpusConfig that decide it, none of them empty."""

    split: Literal["hash", "contiguous"]
    block_bytes: int
    val_fraction: float
    holdout_fraction: float
    duplicates: Literal["drop", "keep"]

    def to_record(self) -> dict[str, Any]:
        """Return what a snapshot records, and what its hash is made from."""
        return {key: getattr(self, key) for key in SPLIT_KEYS} | (
            {"duplicates": "keep"} if self.duplicates == "keep" else {}
        )

    @property
    def reported_side(self) -> str:
        """The side that scores are reported on: holdout, or val if there is no holdout."""
        return "holdout" if self.holdout_fraction > 0 else "val"


def choose_settings(cfg: CorpusConfig, documents: DocumentStore) -> SplitSettings:
    """Return the settings of the split: those that `cfg` gives, and for its empty keys what suits the size of the text.

    Of the `CHOICES`, it is the first one with which the text has enough blocks on the reported side and on val. The
    blocks are counted, because paragraphs, short documents and copies decide how many there are. So no side of a text
    of 10 kB or more is empty by chance. Larger blocks come first, because a block is scored on its own: in a block of
    100 bytes the model sees little context. The fractions are at most what leaves 45 % to train.
    """
    settings = [_complete(cfg, choice) for choice in CHOICES]
    if len(set(settings)) == 1 or sum(document.bytes for document in documents.entries) >= LARGE_BYTES:
        return settings[0]
    return next((chosen for chosen in settings if _has_enough_blocks(chosen, documents)), settings[-1])


def has_empty_settings(cfg: CorpusConfig) -> bool:
    """Whether `choose_settings` has something to choose."""
    return any(getattr(cfg, key) is None for key in _Choice._fields)


def settings_of_large_text(cfg: CorpusConfig) -> SplitSettings:
    """Return the settings that `choose_settings` returns for a text of at least `LARGE_BYTES`."""
    return _complete(cfg, CHOICES[0])


def fill_settings(cfg: CorpusConfig, record: Mapping[str, Any], where: str) -> CorpusConfig:
    """Return `cfg` with its empty keys of the split filled from what a snapshot recorded.

    Raises ConfigError if the fractions do not fit together. `where` says what recorded them.
    """
    empty = {key: record[key] for key in _Choice._fields if getattr(cfg, key) is None and key in record}
    return parse(CorpusConfig, {**cfg.model_dump(mode="json"), **empty}, where) if empty else cfg


def _complete(cfg: CorpusConfig, choice: _Choice) -> SplitSettings:
    """Fill the empty keys of `cfg`. If one fraction is given, the other one is at most half of the rest."""
    val, holdout = cfg.val_fraction, cfg.holdout_fraction
    if holdout is None:
        holdout = choice.holdout_fraction if val is None else min(choice.holdout_fraction, (1 - val) / 2)
    if val is None:
        val = min(choice.val_fraction if holdout > 0 else choice.holdout_fraction, (1 - holdout) / 2)
    return SplitSettings(cfg.split, cfg.block_bytes or choice.block_bytes, val, holdout, cfg.duplicates)


def _has_enough_blocks(settings: SplitSettings, documents: DocumentStore) -> bool:
    counts = Counter(block.side for block in assign_blocks(settings, documents))
    return counts[settings.reported_side] >= ENOUGH_BLOCKS and counts["val"] >= ENOUGH_VAL_BLOCKS


class BlockWithSide(NamedTuple):
    """A block and its side."""

    document: int
    side: str
    """One of SIDES, or `duplicate` for a copy that is left out."""
    sha256: str
    data: bytes


def assign_blocks(settings: SplitSettings, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks of all documents, in order, with the sides that `settings.split` gives them."""
    return (_assign_by_hash if settings.split == "hash" else _assign_by_position)(settings, documents)


def _assign_by_hash(settings: SplitSettings, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks with the side of their hash, or `duplicate` for copies that are left out."""
    seen: set[bytes] = set()
    for number, document in enumerate(documents.entries):
        for data, digest in documents.read_blocks(document, settings.block_bytes):
            sha256 = digest.hex()
            side = side_of(sha256, settings.val_fraction, settings.holdout_fraction)
            if (document.is_copy or digest in seen) and not (settings.duplicates == "keep" and side == "train"):
                side = "duplicate"
            else:
                seen.add(digest)
            yield BlockWithSide(number, side, sha256, data)


def _assign_by_position(settings: SplitSettings, documents: DocumentStore) -> Iterator[BlockWithSide]:
    """Yield all blocks with the side of their position: first train, then val, last holdout.

    The sides are cut at a number of characters, as the book (Sebastian Raschka, "Build a Large Language Model (From
    Scratch)") cuts its text.
    """
    total = sum(document.chars for document in documents.entries)
    ends = _side_ends(settings, total)
    first = 0
    for number, document in enumerate(documents.entries):
        borders = [min(max(end - first, 0), document.chars) for end in ends.values()]
        offsets = [document.offset, *(documents.find_byte_offset(document, border) for border in borders)]
        for side, start, end in zip(ends, offsets, offsets[1:]):
            if end - start == document.bytes:
                blocks = documents.read_blocks(document, settings.block_bytes)
            else:
                cuts = cut_blocks(documents.read_chunks(start, end), settings.block_bytes)
                blocks = ((data, hashlib.sha256(data).digest()) for data in cuts)
            is_left_out = document.is_copy and side != "train"
            for data, digest in blocks:
                yield BlockWithSide(number, "duplicate" if is_left_out else side, digest.hex(), data)
        first += document.chars


def _side_ends(settings: SplitSettings, total_chars: int) -> dict[str, int]:
    """Return the end of each side, in characters. Rounded, because 1 - 0.05 - 0.05 is a little less than 0.9."""
    train = int(round(1 - settings.val_fraction - settings.holdout_fraction, 12) * total_chars)
    val = int(round(1 - settings.holdout_fraction, 12) * total_chars)
    return {"train": train, "val": val, "holdout": total_chars}


def side_of(sha256: str, val_fraction: float, holdout_fraction: float) -> str:
    """Return the side of the block with this hash. A larger val_fraction takes blocks from train only.

    For example, a hash that begins with sixteen zeros is on holdout unless `holdout_fraction` is 0.
    """
    share = int(sha256[:16], 16) / 2**64
    if share < holdout_fraction:
        return "holdout"
    return "val" if share < holdout_fraction + val_fraction else "train"

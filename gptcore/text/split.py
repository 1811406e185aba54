"""Which side of the split a stretch of text belongs to, and how long documents are cut into such stretches.

A block is cut where its own content says so and its side follows from the hash of its bytes, so that renaming, copying
and reordering files change nothing, an insertion moves no block but the one it falls into, and a corpus can grow while
yesterday's holdout stays unseen. What stands on two sides at once in spite of that is found by guard.py.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from gptcore.config import CorpusConfig

if TYPE_CHECKING:
    from gptcore.text.spool import Documents

SIDES = ("train", "val", "holdout")
WHOLE_DOCUMENT_BYTES = 4096
"""A document of at most this size is one block."""

_SLICE_BYTES = 1024
_LONGEST_SEGMENT = 4
_LONGEST_BLOCK = 8

# Borders by rank: the end of a paragraph, a line, a sentence (also in Chinese and Japanese), a word. A segment that is
# too long at one rank is cut at the next. The lowest pattern that is in use knows all higher ones, so that the end of a
# long line or paragraph is noticed from within.
_PARAGRAPH = rb"(?P<r4>\n(?:[ \t\r\f\v]*\n)+)"
_LINE = _PARAGRAPH + rb"|(?P<r3>\n)"
_SENTENCE = _LINE + rb"|(?P<r2>[.!?][\"')\]]*[ \t]+|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)"
_WORD = _SENTENCE + rb"|(?P<r1>[ \t\r\f\v]+)"
_BORDERS = {rank: re.compile(p) for rank, p in {4: _PARAGRAPH, 3: _LINE, 2: _SENTENCE, 1: _WORD}.items()}


class Placed(NamedTuple):
    """A block and its side."""

    document: int
    side: str
    """`duplicate` for one that stands on a side already."""
    sha256: str
    data: bytes


def placed(cfg: CorpusConfig, documents: "Documents") -> Iterator[Placed]:
    """All blocks of all documents, in order, as `cfg.split` says."""
    return (_by_hash if cfg.split == "hash" else _by_position)(cfg, documents)


def _by_hash(cfg: CorpusConfig, documents: "Documents") -> Iterator[Placed]:
    """All blocks with the side of their hash; the side of one that was met before is `duplicate`."""
    seen: set[bytes] = set()
    for number, document in enumerate(documents.documents):
        for data, digest in documents.blocks(document, cfg.block_bytes):
            sha256 = digest.hex()
            where = "duplicate" if digest in seen else side(sha256, cfg.val_fraction, cfg.holdout_fraction)
            yield Placed(number, where, sha256, data)
            seen.add(digest)


def _by_position(cfg: CorpusConfig, documents: "Documents") -> Iterator[Placed]:
    """The first characters to train, the next to val, the last to holdout, as the seed split them; in blocks."""
    total = sum(document.chars for document in documents.documents)
    ends = _side_ends(cfg, total)
    first = 0
    for number, document in enumerate(documents.documents):
        borders = [min(max(end - first, 0), document.chars) for end in ends.values()]
        offsets = [document.offset, *(documents.byte_offset(document, border) for border in borders)]
        for name, start, end in zip(ends, offsets, offsets[1:]):
            if end - start == document.bytes:
                found = documents.blocks(document, cfg.block_bytes)
            else:
                cuts = cut(documents.pieces(start, end), cfg.block_bytes)
                found = ((data, hashlib.sha256(data).digest()) for data in cuts)
            for data, digest in found:
                yield Placed(number, name, digest.hex(), data)
        first += document.chars


def _side_ends(cfg: CorpusConfig, total_chars: int) -> dict[str, int]:
    """Where each side ends, in characters. Rounded, for 1 - 0.05 - 0.05 is a little less than 0.9."""
    train = int(round(1 - cfg.val_fraction - cfg.holdout_fraction, 12) * total_chars)
    val = int(round(1 - cfg.holdout_fraction, 12) * total_chars)
    return {"train": train, "val": val, "holdout": total_chars}


def side(sha256: str, val_fraction: float, holdout_fraction: float) -> str:
    """The side of the block with this hash. A larger val_fraction takes blocks from train only, none from holdout."""
    share = int(sha256[:16], 16) / 2**64
    if share < holdout_fraction:
        return "holdout"
    return "val" if share < holdout_fraction + val_fraction else "train"


def cut(pieces: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """The blocks of one document, about `block_bytes` long and at most eight times that; joined they are the document.

    A border falls behind a segment (a paragraph, or part of a very long one) of length l when the segment's hash is
    below l / block_bytes of its range: the decision is local, and the expected length of a block is `block_bytes`.
    """
    rest = iter(pieces)
    head = b""
    while len(head) <= WHOLE_DOCUMENT_BYTES and (piece := next(rest, b"")):
        head += piece
    if len(head) > WHOLE_DOCUMENT_BYTES:
        yield from _grouped(_segments(itertools.chain([head], rest), _LONGEST_SEGMENT * block_bytes), block_bytes)
    elif head:
        yield head


def _grouped(segments: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    block: list[bytes] = []
    length = 0
    for segment in segments:
        if length + len(segment) > _LONGEST_BLOCK * block_bytes:
            yield b"".join(block)
            block, length = [], 0
        block.append(segment)
        length += len(segment)
        if _hash64(segment) * block_bytes < len(segment) << 64:
            yield b"".join(block)
            block, length = [], 0
    if block:
        yield b"".join(block)


def _hash64(segment: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(segment, digest_size=8).digest(), "big")


def _segments(pieces: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Paragraphs, or parts of those longer than `longest`. Holds little more than one piece and one segment."""
    rest = iter(pieces)
    buffer, start, rank, ended = b"", 0, 4, False
    while True:
        while not ended and len(buffer) - start <= longest:
            piece = next(rest, b"")
            ended = not piece
            buffer, start = buffer[start:] + piece, 0
        if start == len(buffer):
            return
        end, rank = _segment_end(buffer, start, start + longest, rank)
        yield buffer[start:end]
        start = end


def _segment_end(buffer: bytes, start: int, limit: int, rank: int) -> tuple[int, int]:
    """Where the segment from `start` ends, and the rank of its border, at which the search for the next one begins.

    Only bytes before `limit` are looked at, so that the outcome doesn't depend on where pieces end. The buffer reaches
    past `limit` unless the document ends before.
    """
    is_last = len(buffer) <= limit
    for lower in range(rank, 0, -1):
        found = _BORDERS[lower].search(buffer, start, limit)
        if found and (is_last or found.end() < limit):
            return found.end(), _rank(found)
        if is_last:
            return len(buffer), lower
    limit = start + _SLICE_BYTES
    found = _BORDERS[1].search(buffer, start, limit)
    if found and found.end() < limit:
        return found.end(), _rank(found)
    if limit >= len(buffer):
        return len(buffer), 0
    while buffer[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit, 0


def _rank(border: re.Match[bytes]) -> int:
    assert border.lastgroup
    return int(border.lastgroup[1:])

"""Cut documents into blocks. The borders depend on the content around them only (content-defined chunking).

An edit therefore changes only the blocks around it, and the blocks of a growing corpus keep their sides of the split.
split.py decides the side of each block. After a change, raise ingest.CORPUS_VERSION and shards.SHARDS_VERSION.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

WHOLE_DOCUMENT_BYTES = 4096
"""A document of at most this size is one block, unless blocks are smaller than `SMALL_BLOCK_BYTES`."""
SMALL_BLOCK_BYTES = 256
"""Smaller blocks are for corpora so small that even short documents must be cut: see `whole_document_bytes`."""

_SLICE_BYTES = 1024
_LONGEST_SEGMENT = 4
_LONGEST_BLOCK = 8

# Borders by level: the end of a paragraph, a line, a sentence (also in Chinese and Japanese), a word. A segment that is
# too long at one level is cut at the next lower level. Each pattern also matches all borders of higher levels, so a
# search at a low level notices the end of a long line or paragraph.
_PARAGRAPH = rb"(?P<l4>\n(?:[ \t\r\f\v]*\n)+)"
_LINE = _PARAGRAPH + rb"|(?P<l3>\n)"
_SENTENCE = _LINE + rb"|(?P<l2>[.!?][\"')\]]*[ \t]+|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f)"
_WORD = _SENTENCE + rb"|(?P<l1>[ \t\r\f\v]+)"
_BORDERS = {level: re.compile(p) for level, p in {4: _PARAGRAPH, 3: _LINE, 2: _SENTENCE, 1: _WORD}.items()}


def whole_document_bytes(block_bytes: int) -> int:
    """Return the largest size, in bytes, of a document that is one block: 4096, or less if blocks are small."""
    return _LONGEST_SEGMENT * block_bytes if block_bytes < SMALL_BLOCK_BYTES else WHOLE_DOCUMENT_BYTES


def cut_blocks(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """Cut one document into blocks of about `block_bytes`, at most eight times that. Joined, they are the document.

    A segment is a paragraph, or a slice of a very long one. A block ends after a segment of length l if the segment's
    hash is below l / block_bytes of its range. This makes the expected length of a block `block_bytes`.

    For example, `list(cut_blocks([b"A short note."], 2048)) == [b"A short note."]`.
    """
    rest = iter(chunks)
    head = b""
    longest_whole = whole_document_bytes(block_bytes)
    while len(head) <= longest_whole and (chunk := next(rest, b"")):
        head += chunk
    if len(head) > longest_whole:
        segments = _cut_segments(itertools.chain([head], rest), _LONGEST_SEGMENT * block_bytes)
        yield from _group_segments(segments, block_bytes)
    elif head:
        yield head


def _group_segments(segments: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
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


def _cut_segments(chunks: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Yield paragraphs, and slices of paragraphs longer than `longest`. Holds little more than one chunk in memory."""
    rest = iter(chunks)
    buffer, start, level, is_at_end = b"", 0, 4, False
    while True:
        while not is_at_end and len(buffer) - start <= longest:
            chunk = next(rest, b"")
            is_at_end = not chunk
            buffer, start = buffer[start:] + chunk, 0
        if start == len(buffer):
            return
        end, level = _find_segment_end(buffer, start, start + longest, level)
        yield buffer[start:end]
        start = end


def _find_segment_end(buffer: bytes, start: int, limit: int, level: int) -> tuple[int, int]:
    """Return the end of the segment that begins at `start`, and the border's level, at which the next search begins.

    Only bytes before `limit` are examined, so the result does not depend on how the document was cut into chunks. The
    buffer reaches past `limit` unless the document ends before.
    """
    is_last = len(buffer) <= limit
    for lower in range(level, 0, -1):
        border = _BORDERS[lower].search(buffer, start, limit)
        if border and (is_last or border.end() < limit):
            return border.end(), _level_of(border)
        if is_last:
            return len(buffer), lower
    limit = min(start + _SLICE_BYTES, limit)
    border = _BORDERS[1].search(buffer, start, limit)
    if border and border.end() < limit:
        return border.end(), _level_of(border)
    if limit >= len(buffer):
        return len(buffer), 0
    while buffer[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit, 0


def _level_of(border: re.Match[bytes]) -> int:
    assert border.lastgroup
    return int(border.lastgroup[1:])

"""Normalise text, so that copies of a text in another form become equal. The result is called the view of the text.

A copy may have other line ends, indents or quoting marks, another case, or the same characters in another Unicode form.
So copies and contamination are found in views. A view has the letters, digits and symbols of its text, case-folded and
decomposed (NFKD), without white space, punctuation, accents and invisible characters. A model always learns the text
itself, byte for byte.

Each character has its own view, which is never longer than the character itself. So the view of a text is the same
wherever the text is cut, and every byte of the view belongs to one byte of the text.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

MIN_VIEW_BYTES = 128
"""Views, or parts of views, of at least this length that are equal are not a coincidence. In prose, that is
the view of about 160 bytes of text."""

_CHUNK_BYTES = 1 << 19
_PAGE_BITS = 8
_LEFT_OUT = ("Z", "C", "P", "Mn", "Me", "Sk", "Sm")
"""Categories of characters that have no view: white space, invisible characters, punctuation, accents, operators."""
_JAMO = (("\u1100", "\u1112", 0x80), ("\u1161", "\u1175", 0xA0), ("\u11a8", "\u11c2", 0xC0))
"""The letters of Korean syllables: first and last letter, and the view of the first. Each letter's view is one byte, so
that the view of a syllable is not longer than the syllable."""


@dataclass(frozen=True)
class PassageFile:
    """A file whose bytes are passages, one directly after another."""

    path: Path
    bounds: Positions
    """(passages + 1,) the offsets at which the passages begin, from 0, and the end of the last one."""


@dataclass(frozen=True)
class NormalizedFile:
    """The view of a file, in a file of its own."""

    text: PassageFile
    """The file with the text."""
    view: PassageFile
    """Its view. Each passage is the view of the passage with the same number, and may be empty."""
    chunks: Positions
    """(chunks + 1, 2) where each chunk begins in the text and in the view, and the ends of the last one."""

    def find_in_text(self, runs: Positions) -> Positions:
        """Return the place in the text of each run of the view. Both are (runs, 2): starts and ends, in order.

        In the text, a run begins and ends at whole characters.
        """
        firsts = self._find_bytes(runs[:, 0])  # (runs,)
        lasts = self._find_bytes(runs[:, 1] - 1)  # (runs,)
        return _extend_to_characters(self.text.path, np.stack([firsts, lasts + 1], axis=1))

    def _find_bytes(self, positions: Positions) -> Positions:
        """Return (positions,): the place in the text of each byte of the view. The positions are in order."""
        places = np.empty(len(positions), np.int64)
        borders = np.searchsorted(positions, self.chunks[:, 1])  # (chunks + 1,)
        with self.text.path.open("rb") as file:
            for chunk in np.flatnonzero(np.diff(borders)):
                (start, done), (end, _) = self.chunks[chunk], self.chunks[chunk + 1]
                file.seek(int(start))
                viewed = np.flatnonzero(_view_bytes(file.read(int(end - start))))  # (bytes of the view,)
                here = slice(borders[chunk], borders[chunk + 1])
                places[here] = start + viewed[positions[here] - done]
        return places


def normalize(text: bytes) -> bytes:
    """Return the view of a text in UTF-8.

    For example, `normalize(b"> It\\'s\\r\\n> HERE.") == b"itshere"`.
    """
    return _drop_zeros(_view_bytes(text))


def normalize_file(text: PassageFile, path: Path) -> NormalizedFile:
    """Write the view of a file to `path`. Passages must begin at whole characters."""
    bounds = np.empty(len(text.bounds), np.int64)  # (passages + 1,)
    ends, offset, done = [(0, 0)], 0, 0
    with text.path.open("rb") as file, path.open("wb") as out:
        for chunk in _read_characters(file):
            view = _view_bytes(chunk)
            low, high = np.searchsorted(text.bounds, [offset, offset + len(chunk)])
            borders = text.bounds[low:high] - offset  # (bounds of the chunk,)
            bounds[low:high] = done + _count_before(view != 0, borders.tolist())
            viewed = _drop_zeros(view)
            out.write(viewed)
            offset, done = offset + len(chunk), done + len(viewed)
            ends.append((offset, done))
    bounds[np.searchsorted(text.bounds, offset) :] = done
    return NormalizedFile(text, PassageFile(path, bounds), np.array(ends, np.int64))


def _read_characters(file: BinaryIO) -> Iterator[bytes]:
    """Read a file of UTF-8 in chunks that end at whole characters."""
    rest = b""
    while data := file.read(_CHUNK_BYTES):
        data = rest + data
        cut = len(data)
        while cut > 0 and cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        lead = data[cut - 1] if cut else 0
        is_whole = lead < 0xC0 or len(data) - cut + 1 >= _count_bytes(lead)
        cut = len(data) if is_whole else cut - 1
        data, rest = data[:cut], data[cut:]
        yield data
    if rest:
        yield rest


def _count_bytes(lead: int) -> int:
    return 2 + (lead >= 0xE0) + (lead >= 0xF0)


def _count_before(is_kept: npt.NDArray[np.bool_], places: list[int]) -> Positions:
    """Return (places,): how many of the bytes before each of these places are kept. The places are in order."""
    # A count over a slice is many times faster than a running sum over all bytes.
    counts = [np.count_nonzero(is_kept[start:end]) for start, end in zip([0, *places], places)]
    return np.cumsum(np.asarray(counts, np.int64))


def _drop_zeros(view: Bytes) -> bytes:
    return view.tobytes().translate(None, b"\0")


def _view_bytes(text: bytes) -> Bytes:
    """Return (len(text),): each byte's byte of the view, 0 for bytes that have none. NUL has no view."""
    view = np.frombuffer(text.translate(_make_ascii_table()), np.uint8)
    if not text.isascii():
        whole, view = np.frombuffer(text, np.uint8), view.copy()
        _fill_views(whole, np.flatnonzero(whole >= 0xC0), view)
    return view


@cache
def _make_ascii_table() -> bytes:
    return _view_page(0)[0][:128, 0].tobytes() + bytes(128)


def _fill_views(text: Bytes, leads: Positions, view: Bytes) -> None:
    """Write the views of the characters that begin at `leads` and are not ASCII into `view`."""
    points = _decode(text, leads)  # (characters,)
    for page in np.unique(points >> _PAGE_BITS):
        views, lengths = _view_page(int(page))
        here = points >> _PAGE_BITS == page  # (characters,)
        starts, entries = leads[here], points[here] & ((1 << _PAGE_BITS) - 1)
        for place in range(views.shape[1]):
            has_byte = lengths[entries] > place
            view[starts[has_byte] + place] = views[entries[has_byte], place]


def _decode(text: Bytes, leads: Positions) -> Positions:
    """Return (characters,): the code points of the characters that begin at `leads`. The text is whole UTF-8."""
    first = text[leads].astype(np.int64)  # (characters,)
    sizes = 2 + (first >= 0xE0) + (first >= 0xF0)  # (characters,)
    points = first & (0xFF >> (sizes + 1))
    for place in range(1, 4):
        has_byte = sizes > place
        following = text[np.minimum(leads + place, len(text) - 1)].astype(np.int64) & 0x3F
        points = np.where(has_byte, points << 6 | following, points)
    return points


@cache
def _view_page(number: int) -> tuple[Bytes, Positions]:
    """Return the views of 256 characters: (256, 4) their bytes, padded with zeros, and (256,) their lengths."""
    views, lengths = np.zeros((1 << _PAGE_BITS, 4), np.uint8), np.zeros(1 << _PAGE_BITS, np.int64)
    for entry in range(1 << _PAGE_BITS):
        data = _view_character(number << _PAGE_BITS | entry)
        views[entry, : len(data)] = list(data)
        lengths[entry] = len(data)
    return views, lengths


def _view_character(point: int) -> bytes:
    """Return the view of one character, at most as long as the character itself in UTF-8."""
    character = chr(point) if not 0xD800 <= point < 0xE000 and point <= 0x10FFFF else ""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    view = b"".join(map(_encode, folded))
    return view if len(view) <= len(character.encode()) else character.encode()


def _encode(character: str) -> bytes:
    """Return the view of a character that is folded and decomposed already."""
    if unicodedata.category(character).startswith(_LEFT_OUT):
        return b""
    for first, last, code in _JAMO:
        if first <= character <= last:
            return bytes([code + ord(character) - ord(first)])
    return character.encode()


def _extend_to_characters(path: Path, runs: Positions) -> Positions:
    """Return the runs, (runs, 2), with both ends moved outward to whole UTF-8 characters."""
    extended = runs.copy()
    with path.open("rb") as file:
        for run in extended:
            file.seek(max(int(run[0]) - 3, 0))
            before = file.read(min(int(run[0]), 3) + 1)
            run[0] -= next(back for back in range(len(before)) if before[-1 - back] & 0xC0 != 0x80)
            file.seek(int(run[1]))
            after = file.read(3)
            run[1] += next((on for on, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
    return extended

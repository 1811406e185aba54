"""Find text that looks like a key or a password, so that a run can warn before a model learns it.

The patterns are those of well-known formats (private keys, AWS, GitHub, GitLab, Slack, Google, OpenAI and Anthropic,
Hugging Face, JSON web tokens), addresses with a password, and assignments such as `password = "..."` of a value that is
not a word. Only the place and the kind are reported, never the secret. The search costs little: a pattern is tried only
where the text has the four characters with which such a secret begins.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_OVERLAP = 512
"""Longest secret, in bytes, that is found even if it lies across two chunks."""
_MIN_BITS = 3.0
"""Entropy per byte from which a value is not a word."""
_ANY = bytes(range(256))


class _Pattern(NamedTuple):
    kind: str
    begin: tuple[bytes, bytes, bytes, bytes]
    """The characters that are possible in each of the first four places of a match."""
    regex: re.Pattern[bytes]
    """If it has groups, the last one is the value, which must look random."""


def _token(kind: str, begin: bytes, rest: bytes) -> _Pattern:
    """Return the pattern of a token: it begins with `begin`, in which `?` is any character, and does not follow a word.

    `rest` is the regular expression of what follows the first four characters.
    """
    places = [_ANY if letter == ord("?") else bytes([letter]) for letter in begin]
    regex = re.compile(rb"(?<![A-Za-z0-9_\-])" + re.escape(begin).replace(rb"\?", b".") + rest)
    return _Pattern(kind, (places[0], places[1], places[2], places[3]), regex)


def _assignment(begin: str, rest: str) -> _Pattern:
    """Return the pattern of `password = "value"` for a word, of which `begin` are the first four letters."""
    places = [f"{letter}{letter.upper()}".encode() for letter in begin]
    regex = (
        rf"{begin}{rest}[a-z0-9_.\-]{{0,20}}[\"']?[ \t]{{0,8}}(?::=|=>|=|:)[ \t]{{0,8}}"
        r"""([\"'])([^\s\"'`<>{}()\[\];,]{8,128})\1"""
    )
    return _Pattern("password", (places[0], places[1], places[2], places[3]), re.compile(regex.encode(), re.IGNORECASE))


_PATTERNS = (
    _Pattern(
        "private key",
        (b"B", b"E", b"G", b"I"),
        re.compile(
            rb"(?<=-----)BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:\\[rn]|\s){1,8}"
            rb"(?:[A-Za-z0-9+/=]{16}|Proc-Type:|Version:|Comment:)"
        ),
    ),
    _token("AWS key", b"AKIA", rb"[A-Z2-7]{16}(?![A-Za-z0-9])"),
    _token("AWS key", b"ASIA", rb"[A-Z2-7]{16}(?![A-Za-z0-9])"),
    _token("GitHub token", b"gh?_", rb"(?<=gh[pousr]_)([A-Za-z0-9]{36,251})(?![A-Za-z0-9])"),
    _token("GitHub token", b"gith", rb"ub_pat_([A-Za-z0-9_]{59,244})"),
    _token("GitLab token", b"glpa", rb"t-([A-Za-z0-9_\-]{20,128})"),
    _token("Slack token", b"xox?", rb"-([A-Za-z0-9\-]{20,250})"),
    _token("Google key", b"AIza", rb"([A-Za-z0-9_\-]{35})(?![A-Za-z0-9_\-])"),
    _token("API key", b"sk-?", rb"((?:[a-z]+[0-9]*-){0,3}[A-Za-z0-9_\-]{31,250})"),
    _token("Hugging Face token", b"hf_?", rb"([A-Za-z0-9]{33,64})(?![A-Za-z0-9])"),
    _token("JSON web token", b"eyJ?", rb"[A-Za-z0-9_\-]{7,}\.eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{16,}"),
    _Pattern(
        "address with a password",
        (b":", b"/", b"/", _ANY),
        re.compile(rb"://[^\s/?#:@\"'<>]{0,64}:([^\s/?#:@\"'<>]{3,128})@[A-Za-z0-9\[]"),
    ),
    _assignment("pass", "(?:w(?:or)?d|phrase)"),
    _assignment("secr", "et"),
    _assignment("apik", "ey"),
    _assignment("api_", "key"),
    _assignment("toke", "n"),
)
_PLACEHOLDER = re.compile(
    rb"[$%*<{\[].*|(?:(?:your|my|the|some|test|example|dummy|sample|fake)?[_.\-]?)"
    rb"(?:user|pass|passwd|password|pwd|pw|secret|token|key|api_?key|changeme|example)s?|\.{3}.*",
    re.IGNORECASE | re.DOTALL,
)


class SecretFinder:
    """Finds the lines of a text, which comes in chunks, that seem to hold a secret."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        """The kind of the first secret of each line, from 1."""
        self._rest = b""
        self._line = 1

    def search(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass on the chunks of a text, and search them."""
        for chunk in chunks:
            data = self._rest + chunk
            self._search(data, max(0, len(data) - _OVERLAP))  # what begins at the end is found with the next chunk
            yield chunk
        self._search(self._rest, len(self._rest))

    def _search(self, data: bytes, end: int) -> None:
        """Search for secrets that begin before `end`, and keep the rest of the data for the next chunk."""
        for start, kind in _find_secrets(data, end):
            self.found.setdefault(self._line + data.count(b"\n", 0, start), kind)
        self._line += data.count(b"\n", 0, end)
        self._rest = data[end:]


def _find_secrets(data: bytes, end: int) -> Iterator[tuple[int, str]]:
    """Yield the place and the kind of each secret that begins before `end`, in order."""
    end = min(end, len(data) - 3)
    if end <= 0:
        return
    can_begin, firsts, seconds = _make_tables()
    pairs: npt.NDArray[np.uint16] = np.ndarray(
        (len(data) - 1,), "<u2", data, strides=(1,)
    )  # at each byte, it and the next
    starts = np.flatnonzero(can_begin[pairs[:end]])  # (candidates,)
    masks = firsts[pairs[starts]] & seconds[pairs[starts + 2]]  # (candidates,) one bit per pattern
    for start, mask in zip(starts[masks != 0].tolist(), masks[masks != 0].tolist()):
        for number, pattern in enumerate(_PATTERNS):
            if mask >> number & 1 and (match := pattern.regex.match(data, start)) and _looks_random(match):
                yield start, pattern.kind


@cache
def _make_tables() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return, for each pair of bytes: whether a pattern begins with it, and the patterns that have it first and second.

    Each array has shape (65536,). In the last two, bit n stands for the pattern number n.
    """
    firsts, seconds = np.zeros(1 << 16, np.uint32), np.zeros(1 << 16, np.uint32)
    for number, pattern in enumerate(_PATTERNS):
        for table, low, high in ((firsts, *pattern.begin[:2]), (seconds, *pattern.begin[2:])):
            pairs = np.frombuffer(high, np.uint8)[:, None].astype(np.int64) << 8 | np.frombuffer(low, np.uint8)
            table[pairs.ravel()] |= np.uint32(1 << number)
    return firsts != 0, firsts, seconds


def _looks_random(match: re.Match[bytes]) -> bool:
    """Whether the value of the match is neither a word nor a placeholder such as `${PASSWORD}`."""
    if not match.lastindex:
        return True
    value = match[match.lastindex]
    if _PLACEHOLDER.fullmatch(value) or len(set(value)) < 3:
        return False
    if match[0].startswith(b"://"):
        return True
    return any(48 <= byte < 58 for byte in value) and _measure_entropy(value) >= _MIN_BITS


def _measure_entropy(value: bytes) -> float:
    """Return the Shannon entropy of the bytes, in bits per byte."""
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares)

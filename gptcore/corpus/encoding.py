"""Turn the bytes of text into UTF-8, and say what bytes are if they are not text.

A byte order mark decides the encoding, then corpus.encoding, then UTF-8. The mark is not part of the text. Everything
else passes unchanged, byte for byte if the file is UTF-8: single NULs and CRLF too. Text is passed on in chunks, so a
file of any size needs little memory.
"""

import codecs
import re
import threading
import unicodedata
from collections.abc import Iterator
from typing import BinaryIO, Literal

from gptcore.corpus.compression import CHUNK_BYTES, open_chunks
from gptcore.corpus.file_types import classify
from gptcore.errors import CorpusError

Errors = Literal["strict", "replace", "gptcore.replace"]
"""A name of Python's registry of error handlers. See `count_replaced` for the last one."""

_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"} | {
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
"""The encodings that byte order marks name. UTF-32's begins like UTF-16's, so it comes first."""
_SIGNATURES = {
    b"%PDF-": ".pdf",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf\x27\x1c": ".7z",
    b"Rar!\x1a": ".rar",
    b"\xd0\xcf\x11\xe0": ".doc",
    b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz",
    b"SQLite format 3\0": ".sqlite",
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"\x7fELF": ".so",
}
"""How files begin that are not text, whatever their names say."""
_COMPRESSED = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_HEAD_BYTES = 64 * 1024
_MAX_NULS = 0.05
"""Files with more NULs are binary."""
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_ENCODED_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_WESTERN_MARKS = frozenset("€…‘’“”•–—™\xa0¡£§©«®°»¿·²³½")
_FIX = "Save it as UTF-8, or set corpus.errors: replace."
_EXCLUDE = "Remove it from corpus.sources, or name it in corpus.exclude."


def to_utf8(file: BinaryIO, name: str, encoding: str, errors: Errors) -> BinaryIO:
    """Return `file` as UTF-8. `encoding` is corpus.encoding. A byte order mark of UTF-8 stays.

    Raises CorpusError, which calls the file `name`, if it is not text, or is UTF-16 without a byte order mark. Reading
    from what is returned raises CorpusError if bytes are not valid in the encoding and `errors` is strict.
    """
    head, file = _peek(file)
    _check_signature(head, name)
    codec = find_mark(head) or encoding or "utf-8"
    if codecs.lookup(codec).name in ("utf-8", "utf-8-sig"):
        _check_nuls(head, name)
        return file
    return open_chunks(_transcode(file, name, codec, errors))


def find_mark(head: bytes) -> str:
    """Return the encoding that the byte order mark at the beginning of a file names; empty if there is no mark."""
    return next((codec for mark, codec in _MARKS.items() if head.startswith(mark)), "")


def read_utf8(file: BinaryIO, name: str, errors: Errors, codec: str = "utf-8") -> Iterator[bytes]:
    """Yield the text of a file in UTF-8, in chunks that end at whole characters. utf-8-sig leaves out the mark.

    Raises CorpusError if bytes are not valid and `errors` is strict.
    """
    decoder = codecs.getincrementaldecoder(codec)(errors)
    offset, chunk = 0, b"."
    while chunk:
        before, chunk = chunk, file.read(CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # At the end of the file, the decoder knows only the bytes of the last character.
            sample = error.object if chunk else before
            raise utf8_error(name, offset + len(chunk) - len(error.object), error, sample) from None
        if text:
            yield text.encode()
        offset += len(chunk)


def encode_chunks(text: str, name: str, errors: Errors) -> Iterator[bytes]:
    """Yield `text` as UTF-8 in chunks of at most 1 MiB. A lone surrogate (JSON allows it) counts as an invalid byte."""
    for start in range(0, len(text), CHUNK_BYTES):
        chunk = text[start : start + CHUNK_BYTES]
        try:
            yield chunk.encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                problem = f"character {start + error.start} is the lone surrogate {chunk[error.start]!r}"
                raise CorpusError(f"{name} is not Unicode text: {problem}. {_FIX}") from None
            replaced, number = _LONE_SURROGATE.subn("\ufffd", chunk)
            _replaced.number += number
            yield replaced.encode()


class _Replaced(threading.local):
    number = 0


_replaced = _Replaced()


def count_replaced() -> int:
    """Return how many characters this thread has put in the place of invalid bytes, if errors is gptcore.replace."""
    return _replaced.number


def counting(errors: Errors) -> Errors:
    """Return the handler that does what `errors` says, and counts what it replaces."""
    codecs.register_error("gptcore.replace", _replace)
    return "gptcore.replace" if errors == "replace" else errors


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    _replaced.number += 1
    return codecs.replace_errors(error)


def decode(data: bytes, name: str, encoding: str, errors: Errors) -> str:
    """Return bytes as text, without a byte order mark. Raises CorpusError as `read_utf8`."""
    codec = "utf-8-sig" if codecs.lookup(encoding or "utf-8").name == "utf-8" else encoding
    try:
        return data.decode(codec, errors)
    except UnicodeDecodeError as error:
        if codec == "utf-8-sig":
            raise utf8_error(name, len(data) - len(error.object), error) from None
        raise _encoding_error(name, 0, error) from None
    except UnicodeError as error:
        raise _unreadable_error(name, codec, error) from None


def utf8_error(name: str, offset: int, error: UnicodeDecodeError, sample: bytes | None = None) -> CorpusError:
    """Return the error for bytes that are not UTF-8, with what they may be. The bytes begin at `offset` of the file.

    `sample` is text around them, if the bytes of the error are few.
    """
    return CorpusError(f"{name} is not UTF-8: {_describe_place(offset, error)}. {_advise(sample or error.object)}")


def _encoding_error(name: str, offset: int, error: UnicodeDecodeError) -> CorpusError:
    place = _describe_place(offset, error)
    return CorpusError(
        f"{name} is not {error.encoding}: {place}. Save it in that encoding, or set corpus.errors: replace."
    )


def _unreadable_error(name: str, encoding: str, error: UnicodeError) -> CorpusError:
    return CorpusError(
        f"{name} cannot be read as {encoding}: {error}. If it has no byte order mark, set corpus.encoding: "
        f"{'utf-16-le' if '16' in encoding else 'utf-32-le' if '32' in encoding else 'utf-8'}, or save it as UTF-8."
    )


def _describe_place(offset: int, error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"


def _peek(file: BinaryIO) -> tuple[bytes, BinaryIO]:
    """Return the beginning of a file, and the file as it was before."""
    head = file.read(_HEAD_BYTES)
    if file.seekable():
        file.seek(0)
        return head, file
    rest = iter(lambda: file.read(CHUNK_BYTES), b"")
    return head, open_chunks(chunk for chunks in ([head], rest) for chunk in chunks)


def _check_signature(head: bytes, name: str) -> None:
    for signature, suffix in _SIGNATURES.items():
        if head.startswith(signature):
            raise CorpusError(f"{name} is not text, it begins like {suffix}: {classify(f'a{suffix}').reason}")
    for signature, suffix in _COMPRESSED.items():
        if head.startswith(signature):
            raise CorpusError(f"{name} is compressed. Give it a name that ends in {suffix}.")


def _check_nuls(head: bytes, name: str) -> None:
    if encoding := _guess_wide_encoding(head) or (is_binary(head) and _looks_wide(head)):
        raise CorpusError(f"{name} has no byte order mark. {_advise_encoding(str(encoding))}")
    if is_binary(head):
        raise CorpusError(f"{name} looks like a binary file: it has {head.count(0):,} NULs. {_EXCLUDE}")


def is_binary(head: bytes) -> bool:
    """Whether the beginning of a file has too many NULs for text."""
    return head.count(0) > _MAX_NULS * len(head)


def _guess_wide_encoding(head: bytes) -> str:
    """Return the encoding of UTF-16 or UTF-32 without a mark: most of its characters have NULs in the same places."""
    nuls = [head[start::4].count(0) / (len(head) // 4 + 1) for start in range(4)]
    wide = {
        "utf-32-le": (nuls[2] + nuls[3], nuls[0]),
        "utf-32-be": (nuls[0] + nuls[1], nuls[3]),
        "utf-16-le": (nuls[1] + nuls[3], nuls[0] + nuls[2]),
        "utf-16-be": (nuls[0] + nuls[2], nuls[1] + nuls[3]),
    }
    return next((name for name, (high, low) in wide.items() if high > 1 and low < 0.1), "")


def _transcode(file: BinaryIO, name: str, encoding: str, errors: Errors) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    offset, chunk = 0, b"."
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _encoding_error(name, offset + len(chunk) - len(error.object), error) from None
        except UnicodeError as error:  # UTF-16 without a byte order mark, for example
            raise _unreadable_error(name, encoding, error) from None
        yield text.encode("utf-8", "replace")
        offset += len(chunk)


def _looks_wide(data: bytes) -> str:
    """Return the encoding of UTF-16 without a mark in which bytes are Chinese, Japanese or Korean lines; else empty."""
    for codec in ("utf-16-le", "utf-16-be"):
        text = data[: len(data) // 2 * 2].decode(codec, "replace")
        odd = sum(unicodedata.category(character) in ("Co", "Cn", "Cs", "Cc") for character in text)
        if "\n" in text and odd - text.count("\n") - text.count("\r") <= 0.01 * len(text):
            return codec
    return ""


def _advise(data: bytes) -> str:
    """Return what to do with bytes that are not UTF-8: it depends on what they look like."""
    replaced = data.decode("utf-8", "replace")
    num_bad = replaced.count("\ufffd")
    num_valid = sum(map(len, re.findall("[^\x00-\x7f\ufffd]+", replaced)))
    if data.count(0) and (codec := _looks_wide(data)):
        return _advise_encoding(codec)
    if len(_CONTROLS.findall(data)) > max(1, 0.01 * len(data)):
        return f"It looks like a binary file. {_EXCLUDE}"
    if num_valid >= num_bad or _ENCODED_SURROGATE.search(data):
        return _FIX
    if _looks_western(data):
        return _advise_encoding("cp1252")
    if num_bad <= max(3, 0.01 * len(data)):
        return _FIX
    return "Save it as UTF-8. If all text has its encoding, set corpus.encoding instead."


def _advise_encoding(codec: str) -> str:
    """Return what to do with a file in this encoding. corpus.encoding would be wrong for the UTF-8 files beside it."""
    convert = f"iconv -f {codec} -t utf-8 FILE > NEW && mv NEW FILE"
    return f"It looks like {codec}. Convert it: {convert}. If all text is {codec}, set corpus.encoding: {codec}."


def _looks_western(data: bytes) -> bool:
    """Whether bytes are likely to be cp1252: few of the letters are accented, and these are beside others."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    plain = sum(character.isascii() and character.isalpha() for character in text)
    others = [match.start() for match in re.finditer("[^\x00-\x7f]", text)]
    likely = [
        text[place] in _WESTERN_MARKS
        or (
            unicodedata.category(text[place]) in ("Ll", "Lu")
            and text[place] not in "ƒÿþðÞÐ"
            and (text[max(place - 1, 0)] + text[min(place + 1, len(text) - 1)]).strip().isalpha()
        )
        for place in others
    ]
    return len(others) <= plain / 2 and sum(likely) >= 0.9 * len(others)

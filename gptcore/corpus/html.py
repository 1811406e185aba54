"""Take the readable text of a web page: all that is visible, without scripts, styles and navigation.

Resiliparse reads broken pages as browsers do. Lists, tables and preformatted text keep their lines.
"""

import codecs
import re

from gptcore.corpus.encoding import Errors, decode, find_mark
from gptcore.errors import CorpusError

MAX_PAGE_BYTES = 16 * 1024 * 1024
"""Limit for one page. A page needs up to 100 times its size in memory while it is read."""
_MAX_LISTS = 32
"""Limit for lists in lists: each one indents all lines in it."""
_MAX_ATTRIBUTES = 1000
"""Limit for one tag. The time that a tag takes grows with the square of its attributes."""
_SKIPPED = ["nav", "[role=navigation]", "[hidden]"]
_ENCODINGS = ("utf-8", "cp", "iso8859", "iso2022", "koi8", "gb", "big5", "shift_jis", "euc", "mac-", "tis-620", "johab")
"""Beginnings of the names of the encodings that a page may choose. Some of Python's others decode very slowly."""
_CHARSET_BYTES = 4096
_CHARSET = re.compile(
    rb"""<(?:meta\s|\?xml\s)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:\-]+)""", re.IGNORECASE
)
# As browsers do: a value ends at its quotation mark, or without one at a space. No part of a match is tried twice.
_ATTRIBUTE = r"""[\s/]*+[^\s/>][^\s/>=]*+(?:\s*+=\s*+(?:"[^"]*+"|'[^']*+'|[^\s>]++)?+)?+"""
_TAG = re.compile(rf"<([A-Za-z][^\s/>]*+)(?:{_ATTRIBUTE}){{0,{_MAX_ATTRIBUTES}}}+(?P<more>{_ATTRIBUTE})?")
_CLOSING = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style")}


def extract_text(data: bytes, name: str, encoding: str, errors: Errors) -> str:
    """Return the visible text of a page. `encoding` is corpus.encoding, for pages that do not name theirs.

    Raises CorpusError, which calls the page `name`, if it is too large, is nested too deeply, or is not valid in its
    encoding and `errors` is strict.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    if len(data) > MAX_PAGE_BYTES:
        raise CorpusError(
            f"{name} is longer than the {MAX_PAGE_BYTES:,} bytes of HTML that are read at once. Convert it: "
            "pandoc FILE -t plain -o FILE.txt"
        )
    page = decode(data, name, _find_encoding(data) or encoding, errors)
    if len(page) > _MAX_ATTRIBUTES and _has_huge_tag(page):
        raise CorpusError(f"{name} has a tag with more than {_MAX_ATTRIBUTES:,} attributes, so it is not read.")
    tree = HTMLTree.parse(page)
    if tree.body is None:
        return ""
    if tree.body.query_selector(" ".join([":is(ul, ol)"] * (_MAX_LISTS + 1))):
        raise CorpusError(f"{name} has lists that are nested more than {_MAX_LISTS} deep, so it is not read.")
    return str(extract_plain_text(tree, alt_texts=False, skip_elements=_SKIPPED))


def _has_huge_tag(page: str) -> bool:
    """Whether a tag has too many attributes. Scripts and styles, whose text may look like tags, are passed over."""
    end = 0
    while tag := _TAG.search(page, end):
        if tag["more"]:
            return True
        end = tag.end()
        if (name := tag[1].lower()) in _CLOSING:
            closing = _CLOSING[name].search(page, end)
            if closing is None:
                return False
            end = closing.end()
    return False


def _find_encoding(data: bytes) -> str:
    """Return the encoding that a byte order mark or the page itself names; empty if there is none that is known."""
    if mark := find_mark(data):
        return mark
    match = _CHARSET.search(data[:_CHARSET_BYTES])
    try:
        codec = codecs.lookup(match[1].decode()).name if match else ""
    except LookupError:
        return ""
    # Browsers read these as cp1252, and so pages use its characters.
    codec = "cp1252" if codec in ("iso8859-1", "ascii") else codec
    return codec if codec.startswith(_ENCODINGS) else ""

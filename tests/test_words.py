"""The words of comments, docstrings and messages: unclear expressions that were replaced must not return."""

import re
import tokenize
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
UNCLEAR = {
    r"\bstands? in\b": "is in / see",
    r"(?<![tT]here )\bis no (?!longer\b|more\b)[a-z]+": "is not a",
    r"\bwhoever\b": "name the actor",
    r"\bthe seed's\b": "the book's",
    r"\banew\b": "again",
    r"\bfor ever\b": "forever",
    r"\bsigns? of life\b": "heartbeat",
    r"\bthe cure\b": "the fix",
    r"\brival": "champion or challenger",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\btold\b": "reported to / given",
    r"\b(gives?|gave|given) back\b": "release / return",
    r"\bgo(es)? on with\b": "resume / continue",
}
"""Patterns of unclear expressions, and what to write instead."""
STRINGS = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


@pytest.mark.parametrize("package", ["gptcore", "flows"])
def test_texts_use_plain_words(package: str) -> None:
    unclear = []
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type in STRINGS:
                    text = " ".join(token.string.split())
                    for pattern, better in UNCLEAR.items():
                        if match := re.search(pattern, text):
                            where = f"{path.relative_to(REPOSITORY)}:{token.start[0]}"
                            unclear.append(f"{where}: {match[0]!r} (better: {better})")
    assert not unclear, "\n".join(unclear)

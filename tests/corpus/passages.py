"""Read the passages of a snapshot, for the tests that compare them."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from gptcore.corpus.snapshot import side_text


def read_passages(path: Path, side: str) -> Iterator[str]:
    """Yield the passages of one side, in order."""
    text = side_text(path, side)
    content = text.path.read_bytes()
    for start, end in pairwise(text.bounds.tolist()):
        yield content[start:end].decode()

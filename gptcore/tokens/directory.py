"""The format of a token directory: a snapshot's train and val sides as flat arrays of ids, and their tokenizer.

    train.bin  val.bin     the ids of each side, uint16, or uint32 if the vocabulary has more than 65,536 entries
    tokenizer/             the tokenizer that made them
    manifest.json          identity, counts and the facts in `Tokens`

See files.py for how a directory is made and opened, and stream.py for a directory in an object store.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptcore import manifest
from gptcore.tokens.tokenizer import Tokenizer

TOKENS_VERSION = 1
"""Raised when a change of gptcore/tokens gives the same corpus and tokenizer other files."""

SIDES = ("train", "val")
"""The sides of the split that have a token file."""


@dataclass(frozen=True)
class Tokens:
    """A committed token directory."""

    path: Path
    sha256: str
    """Identity of corpus, tokenizer and `TOKENS_VERSION`."""
    n_vocab: int
    """Number of ids in the vocabulary."""
    eot: int
    """The id of the end-of-text token."""
    tokenizer: str
    """The tokenizer's name."""
    counts: dict[str, int]
    """Number of tokens on each side."""
    tokenizer_sha256: str
    """Identity of the vocabulary."""

    def side(self, side: str) -> np.ndarray:
        """Return the ids of "train" or "val", mapped from disk: (tokens,) uint16 or uint32."""
        if self.counts[side] == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype_of(self.n_vocab))
        return np.memmap(self.path / f"{side}.bin", dtype=dtype_of(self.n_vocab), mode="r")

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the files. Raises TokenizerError if it is damaged."""
        return Tokenizer.load(self.path / "tokenizer")


def read_manifest(path: Path) -> Tokens:
    """Read what the manifest in `path` says about the token files. The files themselves are not checked."""
    about = manifest.read_about(path)
    keys = ("sha256", "n_vocab", "eot", "tokenizer", "counts", "tokenizer_sha256")
    return Tokens(path=path, **{key: about[key] for key in keys})


def dtype_of(n_vocab: int) -> np.dtype:
    """Return the type of ids on disk: uint16 for up to 65,536 entries, else uint32."""
    return np.dtype(np.uint16 if n_vocab <= 65_536 else np.uint32)


def write_ids(path: Path, arrays: Iterable[np.ndarray]) -> int:
    """Write arrays of ids to one file, one after another, and return the total number of ids."""
    count = 0
    with path.open("wb") as file:
        for ids in arrays:
            file.write(ids.data)
            count += len(ids)
    return count

"""Token files: make the token directory of a corpus snapshot, and open it again.

Text is encoded once and mapped into memory afterwards, so that training starts at once and keeps no corpus in memory.
An end-of-text id separates passages. The holdout has no token file: it is scored block by block, as text.

See directory.py for the format, encode.py and encode_shards.py for the encoding, stream.py for object stores.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore import manifest
from gptcore.corpus import shards
from gptcore.corpus.shards import WHOLE_BYTES
from gptcore.corpus.snapshot import Snapshot, load_snapshot
from gptcore.errors import CheckpointError, ConfigError, NewerFormat
from gptcore.processes import MapShards, map_in_processes
from gptcore.progress import Progress
from gptcore.tokens import encode_shards, stream
from gptcore.tokens.directory import SIDES, TOKENS_VERSION, Tokens, dtype_of, read_manifest, write_ids
from gptcore.tokens.encode import batch_passages, choose_num_processes, read_passages_in_chunks, start_encoder
from gptcore.tokens.tokenizer import Tokenizer, cut_into_pieces, get_tokenizer, train_bpe


@dataclass(frozen=True)
class _NewTokens:
    """A token directory that does not exist yet."""

    source: Snapshot
    identity: str
    target: Path
    make_tokenizer: Callable[[], Tokenizer]

    @property
    def num_bytes(self) -> int:
        """Bytes of text to encode."""
        return sum(self.source.bytes[side] for side in SIDES)

    def write_sides(
        self, staged: Path, tokenizer: Tokenizer, sides: Mapping[str, Iterable[np.ndarray]]
    ) -> dict[str, Any]:
        """Write the ids of each side, arrays (tokens,). Return what the manifest says about the directory."""
        counts = {side: write_ids(staged / f"{side}.bin", ids) for side, ids in sides.items()}
        return {
            "sha256": self.identity,
            "corpus_sha256": self.source.sha256,
            "tokenizer": tokenizer.name,
            "tokenizer_sha256": tokenizer.sha256,
            "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "dtype": dtype_of(tokenizer.n_vocab).name,
            "counts": counts,
        }


def load_tokens(path: Path | str, must_verify: bool = True) -> Tokens:
    """Open the token directory at `path`, or at a URL that fsspec opens, which is then streamed (see stream.py).

    Reads all files once and compares their hashes. `must_verify` is False if another process has just done so. Of
    streamed files, only the sizes are compared. Raises CheckpointError if the directory was never completed or was
    altered.
    """
    if "://" in str(path):
        return stream.load(str(path))
    if must_verify:
        try:
            manifest.verify(Path(path))
        except NewerFormat:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"the tokens cannot be used: {error} Run `gptflow run`, or `gptflow prepare` if it made the directory. "
                "The command makes the tokens again from the snapshot."
            ) from None
    return read_manifest(Path(path))


def tokenize(
    snapshot: Path,
    name: str,
    tokens_root: Path,
    processes: int | None = None,
    vocabulary: Tokenizer | None = None,
    map_shards: MapShards = map_in_processes,
) -> Tokens:
    """Encode the train and val sides of a corpus snapshot into a directory of `tokens_root`, unless it exists already.

    `name` is the tokenizer as in the configuration. A tokenizer bpe:N is trained on the train side first, unless a
    `vocabulary` of that name is given. `map_shards` distributes the shards of a large corpus. A smaller corpus, or any
    corpus if `processes` is given, is encoded by this process and its children, `processes` in all. Memory does not
    grow with the corpus or its longest text.

    Raises ConfigError for an unknown tokenizer or a vocabulary of another name, CorpusError if the text is too short
    for the N entries of bpe:N, and TokenizerError if a vocabulary is missing and cannot be downloaded. If an existing
    directory was altered, it is made again, with a warning in the log.

        tokenize(Path("corpora/0123456789abcdef"), "bpe:4096", Path("tokens")).counts  # {"train": ..., "val": ...}
    """
    source = load_snapshot(snapshot)
    fixed = _choose_fixed_tokenizer(name, vocabulary)
    identity = _compute_identity(source.sha256, name, fixed)
    target = tokens_root / identity[:16]
    manifest.set_aside_damaged(target)
    if manifest.is_committed(target):
        return read_manifest(target)

    new = _NewTokens(source, identity, target, make_tokenizer=lambda: fixed or _train_tokenizer(name, snapshot))
    if processes is None and new.num_bytes > WHOLE_BYTES:
        _encode_in_shards(new, map_shards)
    else:
        _encode_whole(new, processes or choose_num_processes(new.num_bytes))
    return read_manifest(target)


def _encode_in_shards(new: _NewTokens, map_shards: MapShards) -> None:
    """Encode a large snapshot through `map_shards`."""
    with shards.lock_work_directory(new.target.parent.absolute(), new.identity) as directory:
        tokenizer = encode_shards.load_or_make_vocabulary(directory, new.make_tokenizer)
        sides = encode_shards.encode_in_shards(new.source.path.absolute(), directory, map_shards)

        def fill(staged: Path) -> dict[str, Any]:
            tokenizer.save(staged / "tokenizer")
            return new.write_sides(staged, tokenizer, sides)

        manifest.make_once(new.target, fill)


def _encode_whole(new: _NewTokens, processes: int) -> None:
    """Encode a snapshot by this process and its children, while the ids are written."""
    tokenizer = new.make_tokenizer()
    progress = Progress("tokenize", "encoded", new.num_bytes)

    def fill(staged: Path) -> dict[str, Any]:
        tokenizer.save(staged / "tokenizer")
        with start_encoder(tokenizer, staged / "tokenizer", processes) as encode:
            passages = {side: read_passages_in_chunks(new.source.path, side, progress) for side in SIDES}
            sides = {side: encode(batch_passages(passages[side])) for side in SIDES}
            return new.write_sides(staged, tokenizer, sides)

    manifest.make_once(new.target, fill)


def _choose_fixed_tokenizer(name: str, vocabulary: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer that exists before the text is read, or None if it must be trained on the text.

    Raises ConfigError if `vocabulary` has another name.
    """
    if vocabulary is not None and vocabulary.name != name:
        raise ConfigError(
            f"corpus.tokenizer is {name!r}, but the vocabulary to be kept is {vocabulary.name!r}: set corpus.tokenizer "
            f"to {vocabulary.name!r}, or train.start_from to scratch."
        )
    return vocabulary or (None if name.startswith("bpe:") else get_tokenizer(name))


def _train_tokenizer(name: str, snapshot: Path) -> Tokenizer:
    """Train the tokenizer bpe:N on the train side."""
    passages = read_passages_in_chunks(snapshot, "train")
    texts = (piece for passage in passages for piece in cut_into_pieces(passage))
    return train_bpe(texts, int(name.removeprefix("bpe:")))


def _compute_identity(corpus_sha256: str, name: str, fixed: Tokenizer | None) -> str:
    """Return the identity of a token directory.

    A trained vocabulary depends only on corpus, name and trainer. So the directory is found without training it again.
    """
    vocabulary = fixed.sha256 if fixed else f"rustbpe {importlib.metadata.version('rustbpe')}"
    return manifest.sha256_of([corpus_sha256, name, vocabulary, TOKENS_VERSION])

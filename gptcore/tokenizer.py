"""Text to token ids and back: tiktoken's encodings by name, a BPE trained on the corpus, and plain bytes.

GPT-2's vocabulary needs no network; tiktoken checks it against the sha256 it was published with. How the files of
vocabularies are read stands in vocabularies.py. A `Tokenizer` saves itself as one JSON file that loads without network,
tiktoken's cache or pickle.

What is not here: which texts are encoded, and where their ids are kept (tokens.py).
"""

import binascii
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcore import vocabularies
from gptcore.errors import ConfigError, CorpusError, TokenizerError
from gptcore.manifest import sha256_of

if TYPE_CHECKING:
    from tiktoken import Encoding

END_OF_TEXT = "<|endoftext|>"
"""What stands between two texts in a token stream. Inside a text it is ordinary text."""

VOCABULARY = "vocabulary.json"
"""The file that `Tokenizer.save` writes."""

PIECE_CHARS = 65_536
"""`pieces` cuts at the first border after so many characters, and without a border at twice as many."""

# tiktoken's patterns split text before a space that follows a non-space, and after a line's end between two non-spaces
# (o200k_base takes slashes after a line's end along): no match runs on there, and none looks further ahead.
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")

# cl100k_base's pattern (GPT-4), from tiktoken_ext/openai_public.py. Against GPT-2's, a trained vocabulary of 4096 puts
# 11% more bytes into a token of held-out tiny Shakespeare, 1% more of python-docs.
BPE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
BYTES_PATTERN = r"[^\n]*\n|[^\n]+"

_FORMAT = 1
_MOST_ENTRIES = 2**24


class Tokenizer:
    """A vocabulary with a name. Special strings such as <|endoftext|> inside a text are encoded as ordinary text."""

    def __init__(self, name: str, encoding: "Encoding") -> None:
        """Raises ConfigError if the encoding has no end-of-text token."""
        if END_OF_TEXT not in encoding.special_tokens_set:
            raise ConfigError(f"tokenizer {name!r} has no {END_OF_TEXT} token, which separates documents; use gpt2.")
        self.name = name
        """As in the configuration: gpt2, bpe:4096, bytes, ..."""
        self.encoding = encoding
        """The tiktoken encoding that does the work."""
        self.n_vocab: int = encoding.n_vocab
        """Number of ids, the largest plus one."""
        self.eot: int = encoding.eot_token
        """The id of the end-of-text token."""

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}, {self.n_vocab} entries>"

    def encode(self, text: str) -> list[int]:
        """The ids of any string. Memory for the intermediate steps does not grow with the text.

        Decoding gives the text back, except that a lone surrogate, which no UTF-8 can hold, becomes U+FFFD. The ids are
        those of `encoding.encode_ordinary(text)`, except in a run of over 65,536 characters without a border (see
        `pieces`), on which tiktoken itself may fail.
        """
        return list(itertools.chain.from_iterable(map(self.encoding.encode_ordinary, pieces(text))))

    def encode_prompt(self, prompt: str) -> list[int]:
        """What a model continues: the prompt's ids, or end-of-text alone, after which a new document begins."""
        return self.encode(prompt) or [self.eot]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode`: (tokens,) uint32."""
        # tiktoken's own array spares it a list of Python's numbers, but knows no surrogates.
        parts = [self.encoding.encode_to_numpy(_valid(piece), disallowed_special=()) for piece in pieces(text)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8, as where a character is cut, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids. An unused id of the vocabulary gives U+FFFD. Raises TokenizerError beyond it."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            return b"".join(self._bytes_of(int(token)) for token in ids)

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise TokenizerError(
                f"token id {token} is not in the vocabulary {self.name}: its ids are 0 to {self.n_vocab - 1}."
            )
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:
            return "\ufffd".encode()

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the vocabulary: name, pattern, special tokens and every entry."""
        return sha256_of(self._vocabulary())

    def _vocabulary(self) -> dict[str, Any]:
        ranks = self.encoding._mergeable_ranks
        entries: list[str | None] = [None] * (max(ranks.values()) + 1)
        for entry, rank in ranks.items():
            entries[rank] = binascii.b2a_base64(entry, newline=False).decode()
        return {
            "name": self.name,
            "pattern": self.encoding._pat_str,
            "special_tokens": self.encoding._special_tokens,
            "entries": entries,
        }

    def save(self, directory: Path) -> None:
        """Writes all that `load` needs, as JSON, into `directory`, which is made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        body = {"format": _FORMAT, "sha256": self.sha256, **self._vocabulary()}
        (directory / VOCABULARY).write_text(json.dumps(body, indent=0, ensure_ascii=True) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """The tokenizer that was saved in `directory`. Raises TokenizerError if it is missing or damaged."""
        path = directory / VOCABULARY
        try:
            body = json.loads(path.read_bytes())
            if (found := body.pop("format")) != _FORMAT:
                raise TokenizerError(f"{path} has format {found}, this release reads format {_FORMAT}.")
            expected, found = body.pop("sha256"), sha256_of(body)
            if found != expected:
                raise TokenizerError(f"{path} is damaged: it says sha256 {expected}, its vocabulary has {found}.")
            return assembled(body["name"], body["pattern"], _ranks(body["entries"]), body["special_tokens"])
        except FileNotFoundError:
            raise TokenizerError(f"{path} is missing: there is no saved tokenizer in {directory}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise TokenizerError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def check(name: str) -> None:
    """Whether there is such a tokenizer: raises ConfigError with the nearest names if not. Nothing is loaded."""
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known or name == "bytes" or name.startswith("bpe:"):
        return
    near = difflib.get_close_matches(name, [*known, "bytes", "bpe:4096"], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}, bpe:N and bytes."
    raise ConfigError(f"tokenizer {name!r} is unknown; {hint}")


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a fixed vocabulary: gpt2, any other tiktoken name, or bytes (256 bytes and end-of-text).

    Raises ConfigError for an unknown name, and TokenizerError if a vocabulary is damaged or cannot be had.
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return assembled(name, BYTES_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    if name.startswith("bpe:"):
        raise ConfigError(f"tokenizer {name!r} has no fixed vocabulary: train_bpe makes one from a corpus.")
    return Tokenizer(name, tiktoken_encoding(name))


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A byte-pair encoding learned from `texts`: n_vocab - 1 entries, and end-of-text as the last id.

    The same texts give the same vocabulary. Raises ConfigError if n_vocab is below 257, and CorpusError if there are
    too few texts to learn so many entries.
    """
    import rustbpe

    if n_vocab < 257:
        raise ConfigError(f"tokenizer 'bpe:{n_vocab}': needs at least 257 entries, the 256 bytes and end-of-text.")
    trainer = rustbpe.Tokenizer()
    fed = (_valid(piece) for text in texts for piece in pieces(text))
    trainer.train_from_iterator(fed, vocab_size=n_vocab - 1, buffer_size=64, pattern=BPE_PATTERN)
    ranks = {bytes(entry): rank for entry, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + 1 < n_vocab:
        raise CorpusError(
            f"tokenizer 'bpe:{n_vocab}': the train split gives only {len(ranks) + 1} entries, not {n_vocab}. "
            f"Use bpe:{len(ranks) + 1} or fewer, or give more text."
        )
    return assembled(f"bpe:{n_vocab}", BPE_PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def tiktoken_encoding(name: str) -> "Encoding":
    """As `tiktoken.get_encoding(name)`, but gpt2 needs no network and a download ends in bounded time.

    The encoding is registered by tiktoken itself, so afterwards `tiktoken.get_encoding(name)` returns the same object
    in this process. No environment variable and no cache is touched for gpt2. Raises as `get_tokenizer`.
    """
    import tiktoken

    check(name)
    with vocabularies.read_here():
        return tiktoken.get_encoding(name)


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cuts a text, given whole or in chunks, where tiktoken's patterns surely split it.

    So piece by piece it has the ids it has as a whole. A piece ends at the first border (before a space after a
    non-space; after the end of a line between two non-spaces) from `PIECE_CHARS` characters on, or without a border at
    twice as many: tiktoken's regular expressions overflow their stack on a million spaces. Where the next cut lies
    depends only on the text since the previous one, not on the chunks.
    """
    longest = 2 * PIECE_CHARS
    rest = ""
    for chunk in [text] if isinstance(text, str) else text:
        seen, begin = rest + chunk, 0
        while len(seen) - begin >= longest:
            end = _cut(seen, begin)
            yield seen[begin:end]
            begin = end
        rest = seen[begin:]
    while len(rest) > PIECE_CHARS:
        end = _cut(rest, 0)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _cut(text: str, begin: int) -> int:
    """Where the piece that starts at `begin` ends."""
    furthest = min(begin + 2 * PIECE_CHARS, len(text))
    border = _BORDER.search(text, begin + PIECE_CHARS, furthest)
    return border.start() if border else furthest


def _valid(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def assembled(name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Tokenizer:
    """A tokenizer of one's own entries. Raises ValueError for a vocabulary that tiktoken cannot use."""
    from tiktoken import Encoding

    if not pattern or b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("its pattern or an entry is empty, or one of the 256 bytes has no entry")  # tiktoken panics
    if END_OF_TEXT not in special_tokens or not all(0 <= rank < _MOST_ENTRIES for rank in special_tokens.values()):
        raise ValueError(f"its special tokens lack {END_OF_TEXT} or have impossible ids: {special_tokens!r:.200}")
    if len({*ranks.values(), *special_tokens.values()}) < len(ranks) + len(special_tokens):
        raise ValueError("two of its entries have the same id")
    encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    return Tokenizer(name, encoding)


def _ranks(entries: list[str | None]) -> dict[bytes, int]:
    ranks = {binascii.a2b_base64(entry): rank for rank, entry in enumerate(entries) if entry is not None}
    if len(ranks) < len(entries) - entries.count(None):
        raise ValueError("two of its entries are the same")
    return ranks

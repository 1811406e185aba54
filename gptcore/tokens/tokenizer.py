"""Text to token ids and back: tiktoken's encodings by name, a BPE trained on the corpus, and plain bytes.

GPT-2's vocabulary needs no network; tiktoken checks it against the sha256 it was published with. A `Tokenizer` saves
itself as one JSON file that loads without network, tiktoken's cache or pickle.

See vocabulary_files.py for how the files of tiktoken's vocabularies are read, and files.py for which texts are encoded
and where their ids are kept.
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

from gptcore.errors import ConfigError, CorpusError, TokenizerError
from gptcore.manifest import sha256_of
from gptcore.tokens import vocabulary_files

if TYPE_CHECKING:
    from tiktoken import Encoding

END_OF_TEXT = "<|endoftext|>"
"""The token between two texts in a token stream. Inside a text, the same characters are ordinary text."""

VOCABULARY = "vocabulary.json"
"""The file that `Tokenizer.save` writes."""

PIECE_CHARS = 65_536
"""`cut_into_pieces` cuts at the first border after this many characters, or after twice as many without a border."""

# tiktoken's patterns split text before a space that follows a non-space, and after the end of a line between two
# non-spaces (o200k_base matches slashes after a line's end together with it). No match continues across such a border,
# and no pattern looks ahead beyond it.
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")

# cl100k_base's pattern (GPT-4), from tiktoken_ext/openai_public.py. With a trained vocabulary of 4096 entries, a token
# of held-out tiny Shakespeare holds 11% more bytes than with GPT-2's pattern, and a token of python-docs 1% more.
BPE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
BYTES_PATTERN = r"[^\n]*\n|[^\n]+"

_FORMAT = 1
_MAX_ENTRIES = 2**24


class Tokenizer:
    """A vocabulary with a name. Special strings such as <|endoftext|> inside a text are encoded as ordinary text."""

    def __init__(self, name: str, encoding: "Encoding") -> None:
        """Raise ConfigError if the encoding has no end-of-text token."""
        if END_OF_TEXT not in encoding.special_tokens_set:
            raise ConfigError(f"tokenizer {name!r} has no {END_OF_TEXT} token, which separates documents. Use gpt2.")
        self.name = name
        """As in the configuration: gpt2, bpe:4096, bytes, ..."""
        self.encoding = encoding
        """The tiktoken encoding."""
        self.n_vocab: int = encoding.n_vocab
        """Number of ids: the largest id plus one."""
        self.eot: int = encoding.eot_token
        """The id of the end-of-text token."""

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}, {self.n_vocab} entries>"

    def encode(self, text: str) -> list[int]:
        """Return the ids of any string. Memory for the intermediate steps does not grow with the text.

        `decode` returns the same text, except that a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD. The ids
        are those of `encoding.encode_ordinary(text)`, except in a run of over 65,536 characters without a border (see
        `cut_into_pieces`), on which tiktoken itself may fail.

            get_tokenizer("gpt2").encode("Hello, world")  # [15496, 11, 995]
        """
        return list(itertools.chain.from_iterable(map(self.encoding.encode_ordinary, cut_into_pieces(text))))

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, or the end-of-text id for an empty one: a new document begins after it."""
        return self.encode(prompt) or [self.eot]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids that `encode` returns: (tokens,) uint32."""
        # tiktoken's own array avoids a list of Python numbers, but tiktoken rejects surrogates here.
        pieces = map(_replace_surrogates, cut_into_pieces(text))
        ids = [self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids. An unused id of the vocabulary becomes U+FFFD.

        Raises TokenizerError for an id that is negative, or not below `n_vocab`.
        """
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            return b"".join(self._decode_token(int(token)) for token in ids)

    def _decode_token(self, token: int) -> bytes:
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
        return sha256_of(self._describe())

    def _describe(self) -> dict[str, Any]:
        """Return the vocabulary as JSON: all that decides which ids a text has."""
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
        """Write all that `load` needs, as JSON, into `directory`, which is made if it does not exist."""
        directory.mkdir(parents=True, exist_ok=True)
        body = {"format": _FORMAT, "sha256": self.sha256, **self._describe()}
        (directory / VOCABULARY).write_text(json.dumps(body, indent=0, ensure_ascii=True) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Load the tokenizer that was saved in `directory`. Raises TokenizerError if it is missing or damaged."""
        path = directory / VOCABULARY
        try:
            body = json.loads(path.read_bytes())
            if (version := body.pop("format")) != _FORMAT:
                raise TokenizerError(f"{path} has format {version}, this release reads format {_FORMAT}.")
            expected, actual = body.pop("sha256"), sha256_of(body)
            if actual != expected:
                raise TokenizerError(f"{path} is damaged: it says sha256 {expected}, its vocabulary has {actual}.")
            return assemble_tokenizer(
                name=body["name"],
                pattern=body["pattern"],
                ranks=_parse_ranks(body["entries"]),
                special_tokens=body["special_tokens"],
            )
        except FileNotFoundError:
            raise TokenizerError(f"{path} is missing: there is no saved tokenizer in {directory}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise TokenizerError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def check(name: str) -> None:
    """Raise ConfigError with the nearest names if no tokenizer has this name. No vocabulary is loaded."""
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known or name == "bytes" or name.startswith("bpe:"):
        return
    near = difflib.get_close_matches(name, [*known, "bytes", "bpe:4096"], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}, bpe:N and bytes."
    raise ConfigError(f"tokenizer {name!r} is unknown; {hint}")


def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a fixed vocabulary: gpt2, any other tiktoken name, or bytes (256 bytes and end-of-text).

    Raises ConfigError for an unknown name, and TokenizerError if a vocabulary is damaged or cannot be downloaded.

        get_tokenizer("bytes").encode("hi")  # [104, 105]
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        return assemble_tokenizer(name, BYTES_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    if name.startswith("bpe:"):
        raise ConfigError(f"tokenizer {name!r} has no fixed vocabulary: train_bpe makes one from a corpus.")
    return Tokenizer(name, load_tiktoken_encoding(name))


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Train a byte-pair encoding on `texts`: `n_vocab` - 1 entries, and end-of-text as the last id.

    The same texts give the same vocabulary. Raises ConfigError if `n_vocab` is below 257, and CorpusError if the texts
    are too few for so many entries.
    """
    import rustbpe

    if n_vocab < 257:
        raise ConfigError(f"tokenizer 'bpe:{n_vocab}': needs at least 257 entries, the 256 bytes and end-of-text.")
    trainer = rustbpe.Tokenizer()
    pieces = (_replace_surrogates(piece) for text in texts for piece in cut_into_pieces(text))
    trainer.train_from_iterator(pieces, vocab_size=n_vocab - 1, buffer_size=64, pattern=BPE_PATTERN)
    ranks = {bytes(entry): rank for entry, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + 1 < n_vocab:
        raise CorpusError(
            f"tokenizer 'bpe:{n_vocab}': the train split gives only {len(ranks) + 1} entries, not {n_vocab}. "
            f"Use bpe:{len(ranks) + 1} or fewer, or give more text."
        )
    return assemble_tokenizer(f"bpe:{n_vocab}", BPE_PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def load_tiktoken_encoding(name: str) -> "Encoding":
    """Return `tiktoken.get_encoding(name)`, but without a network for gpt2, and with a time limit for downloads.

    tiktoken itself registers the encoding. So a later `tiktoken.get_encoding(name)` returns the same object in this
    process. For gpt2, neither an environment variable nor a cache is changed. Raises what `get_tokenizer` raises.
    """
    import tiktoken

    check(name)
    with vocabulary_files.patch_tiktoken_reader():
        return tiktoken.get_encoding(name)


def cut_into_pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a text, given whole or in chunks, at borders where all patterns of tiktoken split it. Yield the pieces.

    So the ids of the pieces are the ids of the whole text. A border is before a space that follows a non-space, or
    after the end of a line between two non-spaces. A piece ends at the first border after `PIECE_CHARS` characters.
    Without a border it ends after twice as many, because tiktoken's regular expressions overflow their stack on a
    million spaces. A cut depends only on the text since the previous cut, not on the chunks.
    """
    longest = 2 * PIECE_CHARS
    rest = ""
    for chunk in [text] if isinstance(text, str) else text:
        buffer, begin = rest + chunk, 0
        while len(buffer) - begin >= longest:
            end = _find_piece_end(buffer, begin)
            yield buffer[begin:end]
            begin = end
        rest = buffer[begin:]
    while len(rest) > PIECE_CHARS:
        end = _find_piece_end(rest, 0)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def _find_piece_end(text: str, begin: int) -> int:
    """Return the index at which the piece that starts at `begin` ends."""
    furthest = min(begin + 2 * PIECE_CHARS, len(text))
    border = _BORDER.search(text, begin + PIECE_CHARS, furthest)
    return border.start() if border else furthest


def _replace_surrogates(text: str) -> str:
    """Return the text with U+FFFD instead of each lone surrogate, as `encode_ordinary` of tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def assemble_tokenizer(name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Tokenizer:
    """Make a tokenizer from the entries of a vocabulary. Raises ValueError if tiktoken cannot use them.

    `ranks` gives the id of each entry, `pattern` the regular expression that splits a text before it is encoded.
    """
    from tiktoken import Encoding

    if not pattern or b"" in ranks or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("its pattern or an entry is empty, or one of the 256 bytes has no entry")  # tiktoken panics
    if END_OF_TEXT not in special_tokens or not all(0 <= rank < _MAX_ENTRIES for rank in special_tokens.values()):
        raise ValueError(f"its special tokens lack {END_OF_TEXT} or have impossible ids: {special_tokens!r:.200}")
    if len({*ranks.values(), *special_tokens.values()}) < len(ranks) + len(special_tokens):
        raise ValueError("two of its entries have the same id")
    encoding = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    return Tokenizer(name, encoding)


def _parse_ranks(entries: list[str | None]) -> dict[bytes, int]:
    """Return the id of each entry of a saved vocabulary. None means an unused id."""
    ranks = {binascii.a2b_base64(entry): rank for rank, entry in enumerate(entries) if entry is not None}
    if len(ranks) < len(entries) - entries.count(None):
        raise ValueError("two of its entries are the same")
    return ranks

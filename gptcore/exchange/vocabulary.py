"""Vocabularies as Hugging Face's tokenizer.json, both ways: equal ids for every text, or a refusal with the reason.

Both sides merge bytes pair by pair. tiktoken merges any two neighbours that are an entry together, the lowest id first;
Hugging Face's BPE only the pairs that it lists, in their order. Listing the last two parts of each entry, in the order
of ids, comes to the same: when a pair is merged, its bytes have met no others before, so they have been merged as in
the entry alone. Both split the text beforehand by a regular expression, in different dialects: here stand those whose
translation was compared.

A `<|endoftext|>` inside a text is ordinary text on our side. The exported tokenizer does the same (its
`split_special_tokens` is set).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptcore.errors import ExchangeError, GPTCoreError
from gptcore.tokenizer import BPE_PATTERN, BYTES_PATTERN, END_OF_TEXT, Tokenizer, assembled, get_tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_LISTS = ("vocab.json", "merges.txt")
FILES = (TOKENIZER, *_LISTS)
"""What `read` looks for."""
_GPT2_IDS = range(50257, 50305)
"""GPT-2's, and up to the next multiple of 128, as they are padded to for speed."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""As in tiktoken_ext/openai_public.py; Hugging Face's ByteLevel splits by the same one, spelled otherwise."""

# For Oniguruma, in which {1,3}+ repeats {1,3} and $ ends any line. About letters, numbers, white space and case it
# agrees with tiktoken's engine: tiktoken 0.14 and tokenizers 0.23 were compared on every code point.
_TRANSLATED = {
    BPE_PATTERN: BPE_PATTERN.replace("{1,3}+", "{1,3}").replace("$", r"\z"),
    BYTES_PATTERN: BYTES_PATTERN,
}

Ranks = Mapping[bytes, int]
Pair = tuple[bytes, bytes]


def write(body: Mapping[str, Any], directory: Path, context_length: int) -> None:
    """Writes tokenizer.json, as `expressed` gives it, and tokenizer_config.json."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids to the embeddings
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in ((TOKENIZER, body), (TOKENIZER_CONFIG, settings)):
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def expressed(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says about `tokenizer`. Raises ExchangeError if its pattern is none of those known here."""
    encoding = tokenizer.encoding
    ranks, special, pattern = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    names = {_spelled(entry): rank for entry, rank in ranks.items()}
    if (both := names.keys() & special.keys()) or pattern not in (GPT2_PATTERN, *_TRANSLATED):
        why = f"it has {both.pop()!r} twice" if both else f"nobody has compared its pattern there: {pattern!r}"
        raise ExchangeError(f"the tokenizer {tokenizer.name} cannot be expressed as {TOKENIZER}: {why}.")
    listed, whole = merges(ranks)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _special(content, rank) for content, rank in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _splitting(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(whole),
            "vocab": {**names, **special},
            "merges": [[_spelled(left), _spelled(right)] for left, right in listed],
        },
    }


def read(directory: Path | None, n_vocab: int) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, for a model of `n_vocab` ids.

    Without files of its own, a model with as many ids as GPT-2's vocabulary has that one. Raises ExchangeError if ids
    would not be equal, naming the key.
    """
    if directory and (directory / TOKENIZER).is_file():
        return _read_json(directory / TOKENIZER)
    if directory and all((directory / name).is_file() for name in _LISTS):
        return _read_lists(*(directory / name for name in _LISTS))
    if n_vocab not in _GPT2_IDS:
        raise ExchangeError(
            f"{directory or 'the file'} comes without a tokenizer ({TOKENIZER}, or {' and '.join(_LISTS)}), and "
            f"{n_vocab} ids are not the {_GPT2_IDS[0]} of GPT-2's. Name a directory that holds weights, config.json "
            f"and {TOKENIZER}."
        )
    return get_tokenizer("gpt2")


def merges(ranks: Ranks) -> tuple[list[Pair], list[bytes]]:
    """The last two parts that each entry is merged from, in the order of ids; and entries that no merge leads to."""
    listed, unreachable = [], []
    for entry, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(entry) > 1:
            parts = _merged(entry, ranks, rank)
            if len(parts) == 2:
                listed.append((parts[0], parts[1]))
            else:
                unreachable.append(entry)
    return listed, unreachable


def _merged(entry: bytes, ranks: Ranks, below: int) -> list[bytes]:
    """The parts of an entry after every merge of a lower id."""
    parts = [entry[i : i + 1] for i in range(len(entry))]
    while len(parts) > 2:
        found = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        if (lowest := min(found)) >= below:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _read_lists(vocabulary: Path, listed: Path) -> Tokenizer:
    """GPT-2's own format. It splits as GPT-2 does."""
    body = object_in(vocabulary)
    lines = listed.read_text(encoding="utf-8", errors="replace").split("\n")
    pairs = [line for line in lines if line and not line.startswith("#version")]
    special = {END_OF_TEXT: body[END_OF_TEXT]} if END_OF_TEXT in body else {}
    return _built(vocabulary, body, pairs, special, GPT2_PATTERN, False)


def _read_json(path: Path) -> Tokenizer:
    try:
        return _of_json(path, object_in(path))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def _of_json(path: Path, body: Mapping[str, Any]) -> Tokenizer:
    model = body.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ExchangeError(f"{path} holds no byte-pair encoding: its model is {model!r:.80}. Only those are imported.")
    refused = [("normalizer", body.get("normalizer"))]
    refused += [(f"model.{key}", model.get(key)) for key in ("dropout", "byte_fallback", "unk_token")]
    refused += [(f"model.{key}", model.get(key)) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if (post := body.get("post_processor")) and post.get("type") != "ByteLevel" and _adds_tokens(post):
        refused.append(("post_processor", post))
    added = body.get("added_tokens") or []
    refused += [("added_tokens", token) for token in added if not token.get("special")]
    for key, value in refused:
        if value and not (key == "model.unk_token" and value == END_OF_TEXT):
            raise ExchangeError(f"{path}: {key} is {value!r:.80}, which the tokenizers here cannot do.")
    special = {token["content"]: token["id"] for token in added}
    pattern = _pattern(path, body.get("pre_tokenizer"))
    return _built(path, model["vocab"], model.get("merges") or [], special, pattern, bool(model.get("ignore_merges")))


def _built(
    path: Path,
    vocabulary: Mapping[str, Any],
    pairs: Sequence[Any],
    special: Mapping[str, int],
    pattern: str,
    takes_whole: bool,
) -> Tokenizer:
    """The tokenizer of a vocabulary and its merges, once it is sure that tiktoken gives the same ids."""
    if END_OF_TEXT not in special:
        raise ExchangeError(f"{path} has no special token {END_OF_TEXT}, which separates documents here.")
    try:
        ranks = {_bytes_of(name): int(rank) for name, rank in vocabulary.items() if name not in special}
        given = [tuple(map(_bytes_of, pair.split(" ") if isinstance(pair, str) else pair)) for pair in pairs]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ExchangeError(f"{path} is no byte-level vocabulary: {type(error).__name__}: {error}.") from None
    implied, unreachable = merges(ranks)
    if given != implied or (unreachable and not takes_whole):
        number = next((i for i, (a, b) in enumerate(zip(given, implied)) if a != b), min(len(given), len(implied)))
        where = "entries that no merge leads to" if given == implied else f"merge {number} is none that its ids imply"
        raise ExchangeError(
            f"{path}: {where} ({len(given)} merges, {len(implied)} implied by {len(ranks)} entries): the tokenizers "
            "here merge in the order of ids, and would give others."
        )
    try:
        tokenizer = assembled(f"bpe:{max([*ranks.values(), *special.values()]) + 1}", pattern, ranks, dict(special))
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{path} cannot be used here: {error}") from None
    return next((fixed for fixed in _fixed(tokenizer.n_vocab) if _same(fixed, tokenizer)), tokenizer)


def _fixed(n_vocab: int) -> list[Tokenizer]:
    try:
        return [get_tokenizer(name) for name, size in (("gpt2", 50257), ("bytes", 257)) if size == n_vocab]
    except GPTCoreError:
        return []


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    keys = ("_mergeable_ranks", "_special_tokens", "_pat_str")
    return all(getattr(one.encoding, key) == getattr(other.encoding, key) for key in keys)


def _adds_tokens(post_processor: Mapping[str, Any]) -> bool:
    template = post_processor.get("single")
    return not template or not all("Sequence" in part for part in template)


def _pattern(path: Path, splitting: Any) -> str:
    for pattern in (GPT2_PATTERN, *_TRANSLATED):
        if _essential(splitting) == _essential(_splitting(pattern)):
            return pattern
    raise ExchangeError(
        f"{path}: pre_tokenizer is {json.dumps(splitting):.300}, which the tokenizers here cannot do: they split as "
        "GPT-2 does (ByteLevel without add_prefix_space), or as the tokenizers that `gptflow export` writes."
    )


def _essential(splitting: Any) -> Any:
    """Without what moves no border between ids."""
    if isinstance(splitting, dict):
        defaults = {"use_regex": True} if splitting.get("type") == "ByteLevel" else {}
        return {k: _essential(v) for k, v in {**defaults, **splitting}.items() if k != "trim_offsets"}
    return [_essential(part) for part in splitting] if isinstance(splitting, list) else splitting


def _splitting(pattern: str) -> dict[str, Any]:
    by_itself = pattern == GPT2_PATTERN
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_itself}
    if by_itself:
        return level
    split = {"type": "Split", "pattern": {"Regex": _TRANSLATED[pattern]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def _special(content: str, rank: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": rank, "content": content, **flags}


def object_in(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises ExchangeError if it is damaged."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise ExchangeError(f"{path} is damaged: it holds {type(body).__name__}, not an object.")
    return body


def _alphabet() -> dict[int, str]:
    """A printable character for each byte: itself where it is one, else those from U+0100 on (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_SPELLED = _alphabet()
_BYTE = {character: byte for byte, character in _SPELLED.items()}


def _spelled(entry: bytes) -> str:
    return "".join(map(_SPELLED.__getitem__, entry))


def _bytes_of(name: str) -> bytes:
    return bytes(map(_BYTE.__getitem__, name))

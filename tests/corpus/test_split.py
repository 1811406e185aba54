"""Blocks, sides, and the search for runs that the views of two texts share."""

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.corpus import contamination
from gptcore.corpus import normalize as normalization
from gptcore.corpus.blocks import WHOLE_DOCUMENT_BYTES, cut_blocks
from gptcore.corpus.contamination import RUN_BYTES, find_shared_runs
from gptcore.corpus.normalize import NormalizedFile, PassageFile, normalize, normalize_file
from gptcore.corpus.split import side_of
from tests.tiny import odd_prose


def sliced(data: bytes, size: int) -> Iterable[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


SHAPES = {
    "paragraphs": odd_prose(1, 70_000).encode(),
    "one paragraph of lines": odd_prose(2, 40_000).encode().replace(b"\n\n", b"\n"),
    "one line": odd_prose(3, 150_000).replace("\n\n", " ").encode(),
    "one line of sentences": odd_prose(4, 40_000).encode().replace(b"\n\n", b" "),
    "one word": "日本語".encode() * 5000,
    "blank lines": b"\n" * 50_000,
    "spaces": b" " * 50_000,
    "dots": b"." * 50_000,
    "CRLF": odd_prose(5, 70_000).encode().replace(b"\n", b"\r\n"),
    "one byte over": b"word " * (WHOLE_DOCUMENT_BYTES // 5 + 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_bytes", [64, 256, 2048])
def test_blocks_add_up_to_the_document_in_whole_characters_for_chunks_of_any_size(shape: str, block_bytes: int) -> None:
    document = SHAPES[shape]
    blocks = list(cut_blocks([document], block_bytes))
    assert b"".join(blocks) == document
    assert len(blocks) > 1 or len(document) <= 4 * block_bytes
    assert max(map(len, blocks)) <= 8 * block_bytes
    for block in blocks:
        block.decode()
    for size in (1, 7, 1000) if len(document) < 60_000 else (999, 65_536):
        assert list(cut_blocks(sliced(document, size), block_bytes)) == blocks


@given(st.text(alphabet="ab .!\n\r\t日🎈", max_size=3000), st.integers(1, 400))
@settings(max_examples=50)
def test_any_text_is_cut_without_loss(text: str, size: int) -> None:
    document = (text * 5).encode()
    blocks = list(cut_blocks(sliced(document, size), 256))
    assert b"".join(blocks) == document
    assert all(block.decode() for block in blocks)


def test_a_short_document_is_one_block_and_an_empty_document_has_none() -> None:
    document = odd_prose(1, 40_000).encode()[: WHOLE_DOCUMENT_BYTES - 2] + b"ab"
    assert list(cut_blocks(sliced(document, 100), 256)) == [document]
    assert list(cut_blocks([], 256)) == []


@pytest.mark.parametrize("shape", ["paragraphs", "one paragraph of lines", "one line", "one line of sentences"])
def test_blocks_have_about_the_requested_length(shape: str) -> None:
    lengths = [len(block) for block in cut_blocks([SHAPES[shape] * 3 + odd_prose(9, 40_000).encode()], 1024)]
    assert 512 < np.mean(lengths) < 2048


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([" word", "\n\nA paragraph.\n\n", "é" * 40]))
@settings(max_examples=40)
def test_an_insertion_changes_only_the_blocks_near_it(seed: int, place: int, inserted: str) -> None:
    text = odd_prose(seed, 50_000)
    at = place % len(text)
    before = list(cut_blocks([text.encode()], 1024))
    after = list(cut_blocks([(text[:at] + inserted + text[at:]).encode()], 1024))
    kept = set(before) & set(after)
    assert len(set(before) - kept) <= 4
    assert len(set(after) - kept) <= 4


def test_the_side_follows_from_the_hash_and_the_shares_are_as_requested() -> None:
    import hashlib

    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000)]
    sides = [side_of(sha256, 0.1, 0.2) for sha256 in hashes]
    assert sides.count("val") / len(sides) == pytest.approx(0.1, abs=0.01)
    assert sides.count("holdout") / len(sides) == pytest.approx(0.2, abs=0.01)
    assert side_of("0" * 64, 0.1, 0.2) == "holdout"
    assert side_of("0" * 64, 0.1, 0.0) == "val"
    assert side_of("f" * 64, 0.49, 0.5) == "train"


def test_a_larger_val_share_takes_from_train_only() -> None:
    hashes = [f"{number:016x}" + "0" * 48 for number in range(0, 2**64, 2**56)]
    for sha256 in hashes:
        if side_of(sha256, 0.05, 0.1) != "train":
            assert side_of(sha256, 0.3, 0.1) == side_of(sha256, 0.05, 0.1)


def text_of(path: Path, passages: Sequence[bytes]) -> NormalizedFile:
    path.write_bytes(b"".join(passages))
    text = PassageFile(path, np.cumsum([0, *map(len, passages)]).astype(np.int64))
    return normalize_file(text, path.with_suffix(".view"))


def find_shared_ranges(directory: Path, passages: Sequence[bytes], *others: Sequence[bytes]) -> list[tuple[int, int]]:
    """Search by an index of the others and by one of the text itself, which is for short texts."""
    text = text_of(directory / "text", passages)
    views = [text_of(directory / f"other{n}", other) for n, other in enumerate(others)]
    found = []
    for ratio in (math.inf, 1e-9):
        with mock.patch.object(contamination, "_SHORT_TEXT_RATIO", ratio):
            found.append([(int(start), int(end)) for start, end in find_shared_runs(text, views)])
    assert found[0] == found[1]
    return found[0]


def find_by_brute_force(passages: Sequence[bytes], others: Sequence[bytes]) -> list[tuple[int, int]]:
    """Compare every window of the views with every passage's view. Join runs that touch in a view or in the text."""
    places: list[tuple[int, int]] = []  # of each byte of the view: start and end of its character in the text
    shared: list[bool] = []  # of each byte of the view
    first, views = 0, [normalize(other) for other in others]
    for passage in passages:
        view, is_shared = normalize(passage), [False] * len(normalize(passage))
        for start in range(len(view) - RUN_BYTES + 1):
            if any(view[start : start + RUN_BYTES] in other for other in views):
                is_shared[start : start + RUN_BYTES] = [True] * RUN_BYTES
        shared += is_shared
        for character in passage.decode():
            size = len(character.encode())
            places += [(first, first + size)] * len(normalize(character.encode()))
            first += size
    runs: list[tuple[int, int]] = []
    for number, (start, end) in enumerate(places):
        if shared[number]:
            follows = (number > 0 and shared[number - 1]) or (bool(runs) and runs[-1][1] >= start)
            runs.append((runs.pop()[0], end) if follows else (start, end))
    return runs


def random_text(drawn: random.Random, chars: int, alphabet: str) -> str:
    return "".join(drawn.choices(alphabet, k=chars))


@given(st.integers(0, 10**9), st.sampled_from(["ab", "abcdefgh \n", "日本語é🎈a", "aB. e\u0301ﬁ한ᄒ\n> "]))
@settings(max_examples=60)
def test_the_search_finds_the_same_runs_as_brute_force(
    tmp_path_factory: pytest.TempPathFactory, seed: int, alphabet: str
) -> None:
    drawn = random.Random(seed)
    train = [random_text(drawn, drawn.randint(1, 900), alphabet) for _ in range(drawn.randint(1, 4))]
    others = [random_text(drawn, drawn.randint(1, 900), alphabet) for _ in range(drawn.randint(1, 4))]
    for _ in range(drawn.randint(0, 5)):
        source, goal = drawn.choice(train), drawn.randrange(len(others))
        low = drawn.randrange(len(source))
        at = drawn.randint(0, len(others[goal]))
        others[goal] = others[goal][:at] + source[low : low + drawn.randint(50, 400)] + others[goal][at:]
    passages, held = [text.encode() for text in train], [text.encode() for text in others]
    half = drawn.randint(0, len(held))
    found = find_shared_ranges(tmp_path_factory.mktemp("search"), passages, held[:half], held[half:])
    assert found == find_by_brute_force(passages, held)


@pytest.mark.parametrize("chunk_bytes", [64, 200, 1000])
def test_the_search_finds_the_same_runs_wherever_its_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    drawn = random.Random(chunk_bytes)
    held = [random_text(drawn, 700, "abcd").encode() for _ in range(5)]
    passages = [
        random_text(drawn, 300, "abcd").encode() + block[low : low + 350] for block in held for low in (0, 1, 150, 350)
    ]
    monkeypatch.setattr(contamination, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(normalization, "_CHUNK_BYTES", chunk_bytes)
    contamination._make_hash_tables.cache_clear()
    try:
        assert find_shared_ranges(tmp_path, passages, held) == find_by_brute_force(passages, held)
    finally:
        contamination._make_hash_tables.cache_clear()


@pytest.mark.parametrize("offset", [0, 1, 50, 63, 64, 65, 127])
def test_a_run_of_127_bytes_is_kept_and_one_of_128_is_removed(tmp_path: Path, offset: int) -> None:
    drawn = random.Random(offset)
    shared = bytes(drawn.choices(range(97, 123), k=RUN_BYTES))
    held = b"A" * offset + shared + b"A" * 70
    train = [b"B" * 500 + shared[:-1] + b"B" * 500, b"C" * 500 + shared + b"C" * 500]
    assert find_shared_ranges(tmp_path, train, [held]) == [(1627, 1755)]


def test_a_run_counts_only_within_one_passage(tmp_path: Path) -> None:
    shared = bytes(random.Random(1).choices(range(97, 123), k=200))
    assert find_shared_ranges(tmp_path, [shared], [shared[:100], shared[100:]]) == []
    assert find_shared_ranges(tmp_path, [shared[:100], shared[100:]], [shared]) == []
    assert find_shared_ranges(tmp_path, [b"x" + shared], [shared]) == [(1, 201)]


def test_empty_and_too_short_texts_share_nothing(tmp_path: Path) -> None:
    assert find_shared_ranges(tmp_path, [b"a" * 1000]) == []
    assert find_shared_ranges(tmp_path, [b"a" * 1000], []) == []
    assert find_shared_ranges(tmp_path, [b"a" * 1000], [b"a" * 127]) == []
    assert find_shared_ranges(tmp_path, [b"a" * 1000], [b".-\n" * 500]) == []
    assert find_shared_ranges(tmp_path, [], [b"a" * 1000]) == []
    assert find_shared_ranges(tmp_path, [b"a" * 1000], [b"a" * 128]) == [(0, 1000)]

"""The normalised view: copies in another form are equal, and every byte of the view has its place in the text."""

import random
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import CorpusConfig
from gptcore.corpus import normalize as normalization
from gptcore.corpus.clean_blocks import find_clean_blocks
from gptcore.corpus.contamination import RUN_BYTES
from gptcore.corpus.ingest import ingest
from gptcore.corpus.normalize import PassageFile, normalize, normalize_file
from gptcore.corpus.snapshot import Snapshot, read_blocks
from tests.corpus.passages import read_passages

PROSE = (
    "It was “late”; the lamp – a small one – had gone out. Nobody spoke: Zoë's café was closed.\n\nThen, at 9:30, … "
)
CODE = 'def add(a, b):\n    """Add."""\n    return a + b  # the sum\n\n\nfor n in range(10):\n    print(add(n, 2))\n'
TABLE = "| name | price |\n|------|-------|\n| tea  |  2.50 |\n| ﬁsh  | 11.00 |\n"
CJK = "春はあけぼの。やうやう白くなりゆく山ぎは、すこしあかりて。\n한국어 문장도 있습니다. 그리고 하나 더.\n"
TEXTS = {"prose": PROSE, "code": CODE, "table": TABLE, "cjk": CJK}
FORMS: dict[str, Callable[[str], str]] = {
    "line ends": lambda text: text.replace("\n", "\r\n"),
    "trailing blanks": lambda text: text.replace("\n", "  \n"),
    "indents": lambda text: textwrap.indent(text, "    "),
    "tabs": lambda text: text.replace(" ", "\t"),
    "wrapped": lambda text: "\n".join(textwrap.wrap(text, 19)),
    "on one line": lambda text: " ".join(text.split()),
    "quoted": lambda text: textwrap.indent(text, "> ", lambda line: True),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "compatible": lambda text: unicodedata.normalize("NFKC", text),
    "capitals": str.upper,
    "typewriter": lambda text: text.translate(str.maketrans("“”–…", '""-.')),
    "list": lambda text: textwrap.indent(text, "  * "),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_copy_in_another_form_has_the_same_view(name: str, form: str) -> None:
    assert normalize(FORMS[form](TEXTS[name]).encode()) == normalize(TEXTS[name].encode())


def test_other_words_have_another_view_and_punctuation_has_none() -> None:
    assert normalize(b"> It's\r\n> HERE.") == b"itshere"
    assert normalize("Ärger".encode()) == normalize(b"ARGER") != normalize(b"Ager")
    assert normalize("한글".encode()) != normalize("한굴".encode())
    assert normalize(" .,;-—\n\t\u200b\ufeff\x00".encode()) == b""


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_the_view_is_that_of_each_character_and_never_longer(text: str) -> None:
    views = [normalize(character.encode()) for character in text]
    assert normalize(text.encode()) == b"".join(views)
    assert all(len(view) <= len(character.encode()) for view, character in zip(views, text))


@pytest.mark.parametrize("chunk_bytes", [7, 64, 1 << 19])
def test_a_file_has_the_same_view_wherever_its_chunks_end_and_runs_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(normalization, "_CHUNK_BYTES", chunk_bytes)
    passages = [text.encode() for text in (PROSE, "", "...", CODE, TABLE, CJK)]
    (tmp_path / "text").write_bytes(b"".join(passages))
    bounds = np.cumsum([0, *map(len, passages)]).astype(np.int64)
    made = normalize_file(PassageFile(tmp_path / "text", bounds), tmp_path / "view")
    view, text = (tmp_path / "view").read_bytes(), b"".join(passages)
    assert [view[start:end] for start, end in zip(made.view.bounds, made.view.bounds[1:])] == list(
        map(normalize, passages)
    )
    draw = random.Random(1)
    runs = np.array([[start, start + draw.randint(1, 20)] for start in range(0, len(view) - 20, 20)])
    for (start, end), (first, last) in zip(runs, made.find_in_text(runs)):
        assert view[start:end] in normalize(text[first:last])
        assert len(normalize(text[first:last])) - (end - start) < 6, "only whole characters are added"


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    stock = ["".join(draw.choices("abcdefghijklmnoprstuvwy", k=draw.randint(2, 9))) for _ in range(400)]
    sentences = [" ".join(draw.choices(stock, k=draw.randint(5, 14))).capitalize() + "." for _ in range(count // 9)]
    return "\n\n".join(textwrap.fill(" ".join(sentences[n : n + 6]), 72) for n in range(0, len(sentences), 6)) + "\n"


def snapshot(
    tmp_path: Path, name: str, texts: dict[str, str], previous: Path | None = None, **given: object
) -> Snapshot:
    base = tmp_path / name
    base.mkdir()
    for file, text in texts.items():
        (base / file).write_text(text, newline="")
    cfg = CorpusConfig(sources=(".",), block_bytes=512, val_fraction=0.15, holdout_fraction=0.15, **given)  # type: ignore[arg-type]
    return ingest(cfg, tmp_path / "corpora", base, previous=previous)


def share_of_leaked_runs(held_out: Path, side: str, learned: Path, learned_side: str = "train") -> float:
    """Return the share of the runs of a side, by their views, that the other text holds."""
    view = "".join(normalize(text.encode()).decode("latin1") for text in read_passages(learned, learned_side))
    held = (normalize(block.text.encode()).decode("latin1") for block in read_blocks(held_out, side))
    runs = [text[at : at + RUN_BYTES] for text in held for at in range(0, len(text) - RUN_BYTES + 1, 7)]
    return sum(run in view for run in runs) / len(runs)


ORIGINALS = {f"{number:02d}.txt": words(number, 500 + 40 * number) for number in range(30)}


@pytest.mark.parametrize("form", ["line ends", "indents", "on one line", "quoted", "capitals"])
def test_the_copies_of_another_night_give_the_gate_no_evidence(tmp_path: Path, form: str) -> None:
    first = snapshot(tmp_path, "first", ORIGINALS)
    copies = {f"copy-{name}": FORMS[form](text) for name, text in ORIGINALS.items()}
    second = snapshot(tmp_path, "second", {**ORIGINALS, **copies})
    third = snapshot(tmp_path, "third", copies)
    assert second.documents == 30
    if form in ("line ends", "indents", "quoted"):  # the shortest form is the original
        assert second.sha256 == first.sha256, "the copies change nothing"
    else:
        assert second.dropped["duplicate_documents"] == 30
    same = snapshot(tmp_path, "same", {**ORIGINALS, **copies}, previous=first.path)
    assert same.sha256 == first.sha256, "text that an earlier night learned stays in its form, so no block moves"
    for held_out, learned in ((second, second), (first, first)):
        for side in ("val", "holdout"):
            assert share_of_leaked_runs(held_out.path, side, learned.path) == 0
    assert share_of_leaked_runs(third.path, "holdout", first.path) > 0.5, "the copies are on other sides"
    clean = find_clean_blocks(third.path, "holdout", [first.path])
    assert len(clean.blocks) < 0.5 * third.blocks["holdout"]
    learned_text = "".join(normalize(text.encode()).decode() for text in read_passages(first.path, "train"))
    assert not any(normalize(block.text.encode()).decode() in learned_text for block in clean.blocks)


def test_text_of_holdout_is_not_in_val_and_is_counted(tmp_path: Path) -> None:
    header = "This notice stands above every page of the collection and is repeated. " * 5
    made = snapshot(tmp_path, "pages", {f"{n}.txt": f"{header}\n\n{words(n, 200)}" for n in range(80)})
    assert made.dropped["val_guard_runs"] > 3 and made.dropped["val_guard_bytes"] > 3 * len(header)
    assert share_of_leaked_runs(made.path, "holdout", made.path, "val") == 0
    assert sum(len(block.text.encode()) for block in read_blocks(made.path, "val")) == made.bytes["val"]


def test_copies_may_stay_in_train_but_never_in_held_out_text(tmp_path: Path) -> None:
    texts = {**ORIGINALS, **{f"again-{name}": text for name, text in ORIGINALS.items()}}
    texts |= {f"quoted-{name}": FORMS["quoted"](text) for name, text in ORIGINALS.items()}
    dropped, kept = (snapshot(tmp_path, way, texts, duplicates=way) for way in ("drop", "keep"))
    assert dropped.documents == 30 and kept.documents == 90 and dropped.sha256 != kept.sha256
    assert kept.bytes["train"] > 2 * dropped.bytes["train"]
    assert list(read_blocks(kept.path, "holdout"))
    assert [block.text for block in read_blocks(kept.path, "holdout")] == [
        block.text for block in read_blocks(dropped.path, "holdout")
    ]
    assert share_of_leaked_runs(kept.path, "holdout", kept.path) == 0

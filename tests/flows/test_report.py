"""The decision card as a page: what it says of each verdict, and that nothing a model writes can break it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from flows.releases.gate import Verdict, decide
from flows.releases.report import Card, Side, page, sentence, table, text
from gptcore.config import GateConfig
from gptcore.evaluate import Evaluation
from gptcore.judging.baselines import Baselines
from gptcore.judging.compare import Comparison
from gptcore.judging.dossier import Scores
from gptcore.judging.samples import Sample
from gptcore.learning.rundir import Result

KINDS = (
    "better",
    "worse",
    "tie within noise",
    "not finite",
    "insufficient evidence",
    "beats unigram",
    "does not beat unigram",
    "sources overridden",
    "withdrawn",
)


def sample(words: str, prompt: str = "The model") -> Sample:
    return Sample(prompt, 0.8, 123, words, 5, 1.0, 1.0, 0.0, 3, "The")


def verdict(kind: str = "better") -> Verdict:
    champion, number = (None, None) if "unigram" in kind else (1.9, "2")
    scored = {"blocks": 40, "bytes": 12_345, "excluded_bytes": 678}
    bounds = {"low": 0.05, "high": 0.15} if kind in ("better", "worse", "tie within noise") else {}
    own = math.nan if kind == "not finite" else 1.8
    return Verdict("b" in kind[:1], kind, f"{kind}: because", own, champion, number, **scored, **bounds)


def card(kind: str = "better", **changed: object) -> Card:
    evaluation = Evaluation("holdout", False, 40, 12_345, 5_000, 2.0, 7.4, 1.8, 0.3, 0.6, (), ())
    facts = {"tokenizer": "gpt2", "parameters": "1,234", "training": "60 steps", "corpus": "3 documents"}
    champion = Side("2", "[models:/gpt-tiny/2](http://there/2)", facts, [sample("writes")])
    made = Card(
        model_name="gpt-tiny",
        verdict=verdict(kind),
        gate=GateConfig(),
        challenger=Side("3", "`models:/gpt-tiny/3`", {**facts, "parameters": "5,678"}, [sample("learns")]),
        champion=None if "unigram" in kind else champion,
        changes=[("documents added", "3")],
        scores=Scores(evaluation, evaluation, Baselines(8.0, 10.8, 2.6, 7.4, 2.5, 1.4, 1000)),
        result=Result(60, 61_440, 1.5, "max_steps", 60, 2.1, "0" * 64),
        pictures=[("How it learned", Path("plots-123abc/losses.png"))],
        links=[("MLflow run", "`abc`")],
    )
    return replace(made, **changed)


def rendered(made: Card) -> str:
    return page(made, lambda path: f"at:{path.name}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_verdict_has_a_page_that_begins_with_a_plain_sentence(kind: str) -> None:
    written = rendered(card(kind))
    title, plain, technical = written.split("\n\n")[:3]
    assert title == f"# gpt-tiny version 3: {'promoted' if card(kind).verdict.promoted else 'rejected'}"
    assert plain == f"**{sentence(verdict(kind), '3')}**" and plain.count(".") <= 2
    assert technical == f"{kind.capitalize()}: because."
    for jargon in ("bits per byte", "margin", "bootstrap", "holdout", "nan"):
        assert jargon not in plain
    assert kind in ("better", "beats unigram") or "does not become champion" in plain or "did not compete" in plain


def test_a_kind_of_verdict_that_is_not_known_here_still_gets_a_sentence() -> None:
    assert sentence(replace(verdict(), kind="too late", promoted=False), "3") == "Version 3 was rejected: too late."


def test_the_sentence_says_by_how_much_and_in_which_direction() -> None:
    assert "better than version 2 (5.3% fewer bits)" in sentence(verdict("better"), "3")
    worse = replace(verdict("worse"), bits_per_byte=2.09)
    assert "worse than version 2 (10.0% more bits)" in sentence(worse, "3")


def test_both_models_stand_side_by_side_with_the_numbers_of_the_verdict() -> None:
    written = rendered(card())
    assert "| version | `models:/gpt-tiny/3` | [models:/gpt-tiny/2](http://there/2) |" in written
    assert "| bits per byte, lower is better | 1.8000 | 1.9000 |" in written
    assert "| parameters | 5,678 | 1,234 |" in written
    assert "| improvement | 0.1000 bits per byte" in written and "more than 0.005 |" in written
    assert "| interval | from 0.0500 to 0.1500, each bound with 0.95 confidence |" in written
    assert "40 blocks, 12,345 bytes" in written and "678 bytes: held-out text" in written
    assert "| documents added | 3 |" in written
    assert "![How it learned](at:losses.png)" in written
    assert "| prompt | version 3 | version 2 |" in written and "| learns | writes |" in written


def test_a_comparison_in_the_gate_s_own_words_is_on_the_page() -> None:
    compared = Comparison(1.8, 1.9, 40, 12_345, "block", 0.95, 0.05, 0.15)
    written = rendered(card(verdict=decide(compared, GateConfig(), "2", unknown="version 2 learned from is gone")))
    assert "Better: 1.8000 bits per byte against 1.9000 of version 2" in written
    assert "| unknown | what version 2 learned from is gone |" in written


def test_a_first_version_has_one_column_and_no_interval() -> None:
    written = rendered(card("beats unigram", changes=None))
    assert "## The first version" in written and "champion |" not in written and "interval" not in written
    assert "First training" in written and "| prompt | version 3 |\n" in written


def test_a_version_that_did_not_compete_says_so_instead_of_a_number() -> None:
    alone = replace(verdict("sources overridden"), champion_bits_per_byte=None, blocks=0)
    written = rendered(card("sources overridden", verdict=alone))
    assert "| bits per byte, lower is better | 1.8000 | not compared |" in written
    assert "improvement" not in written and "left out" not in written


def test_a_champion_whose_files_are_damaged_leaves_its_samples_out_and_the_reason_in() -> None:
    champion = cast(Side, card().champion)
    broken = replace(champion, facts={}, samples=(), problem="model.safetensors was altered")
    written = rendered(card(champion=broken))
    assert "| tokenizer | gpt2 | unknown |" in written
    assert "| prompt | version 3 |\n" in written
    assert "The champion has no column: model.safetensors was altered." in written


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a | b", r"a \| b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("# no *title* `code` ![x](y)", r"\# no \*title\* \`code\` !\[x\](y)"),
        ("one\ntwo\r\nthree", "one<br>two<br>three"),
        ("back\\slash & more", r"back\\slash &amp; more"),
    ],
)
def test_what_a_model_writes_is_shown_letter_by_letter(written: str, shown: str) -> None:
    assert text(written) == shown
    (line,) = [line for line in rendered(card()).splitlines() if line.startswith("| The model")]
    broken = replace(card().challenger, samples=[sample(written)])
    (other,) = [line for line in rendered(card(challenger=broken)).splitlines() if line.startswith("| The model")]
    assert line.replace("learns", shown) == other


def test_long_lines_are_broken_since_the_ui_breaks_none_and_long_samples_are_cut() -> None:
    assert text("a word and a word and a word", 12) == "a word and a<br> word and a <br>word"
    long = replace(card().challenger, samples=[sample("word " * 1000)])
    (line,) = [line for line in rendered(card(challenger=long)).splitlines() if line.startswith("| The model")]
    cell = line.split(" | ")[1]
    assert max(map(len, cell.split("<br>"))) <= 40 and cell.endswith("…") and len(cell) < 1000


def test_samples_without_words_say_so() -> None:
    empty = replace(card().challenger, samples=[sample(""), sample(" \n ")])
    written = rendered(card(challenger=empty))
    assert "*ended at once*" in written and "*only white space*" in written


def test_a_table_has_as_many_cells_in_every_line() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert table(("a", "b"), []) == ""

"""The decision card: what the page says about each verdict, and that text from a model cannot break the page."""

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from mlflow.entities.model_registry import ModelVersion

from flows.cards.decision import Card, Side, escape, explain_verdict, render_card, render_table
from flows.cards.verdict import Verdict
from flows.registry.gate import judge_comparison
from gptcore.config import GateConfig
from gptcore.evaluation.baselines import Baselines
from gptcore.evaluation.bits_per_byte import Evaluation
from gptcore.evaluation.compare import Comparison
from gptcore.evaluation.memorization import Completions, Memorization
from gptcore.evaluation.run_report import Scores
from gptcore.evaluation.samples import Sample
from gptcore.evaluation.sources import SourceComparison, SourceScore
from gptcore.training.run_directory import Result

KINDS = (
    "better",
    "worse",
    "tie within noise",
    "worse on old text",
    "not finite",
    "insufficient evidence",
    "beats unigram",
    "does not beat unigram",
    "sources overridden",
    "withdrawn",
)


MEMORIZED = Memorization(50, Completions.count(200, 1), Completions.count(63, 40))
SOURCES = (SourceScore("a|b/", 30, 9_345, 1.5), SourceScore("c/", 10, 3_000, 2.7), SourceScore("d/", 0, 0, math.nan))
CHALLENGER = ModelVersion("gpt-tiny", "3", creation_timestamp=0)


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
    return render_card(made, lambda path: f"at:{path.name}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_verdict_has_a_page_that_begins_with_a_plain_sentence(kind: str) -> None:
    written = rendered(card(kind))
    title, plain, technical = written.split("\n\n")[:3]
    assert title == f"# gpt-tiny version 3: {'promoted' if card(kind).verdict.promoted else 'rejected'}"
    assert plain == f"**{explain_verdict(verdict(kind), '3')}**" and plain.count(".") <= 3
    assert technical == f"{kind.capitalize()}: because."
    for jargon in ("bits per byte", "margin", "bootstrap", "holdout", "nan"):
        assert jargon not in plain
    assert kind in ("better", "beats unigram") or "does not become champion" in plain or "did not compete" in plain


def test_an_unknown_kind_of_verdict_still_gets_a_sentence() -> None:
    assert (
        explain_verdict(replace(verdict(), kind="too late", promoted=False), "3") == "Version 3 was rejected: too late."
    )


def test_the_sentence_says_how_much_better_or_worse_the_version_is() -> None:
    assert "better than version 2 (5.3% fewer bits to encode it)" in explain_verdict(verdict("better"), "3")
    worse = replace(verdict("worse"), bits_per_byte=2.09)
    assert "worse than version 2 (10.0% more bits to encode it)" in explain_verdict(worse, "3")


def test_the_page_shows_both_models_side_by_side_with_the_numbers_of_the_verdict() -> None:
    written = rendered(card())
    assert "| version | `models:/gpt-tiny/3` | [models:/gpt-tiny/2](http://there/2) |" in written
    assert "| bits per byte, lower is better | 1.8000 | 1.9000 |" in written
    assert "| parameters | 5,678 | 1,234 |" in written
    assert "| improvement | 0.1000 bits per byte" in written and "above 0.005 |" in written
    assert "| interval | from 0.0500 to 0.1500, each bound with 0.95 confidence |" in written
    assert "40 blocks, 12,345 bytes" in written and "678 bytes: held-out text" in written
    assert "| documents added | 3 |" in written
    assert "![How it learned](at:losses.png)" in written
    assert "| prompt | version 3 | version 2 |" in written and "| learns | writes |" in written


def test_the_page_shows_the_gates_own_description_of_a_comparison() -> None:
    compared = Comparison(1.8, 1.9, 40, 12_345, "block", 0.95, 0.05, 0.15)
    verdict = judge_comparison(compared, GateConfig(), CHALLENGER, "2", unknown="version 2 learned from is gone")
    written = rendered(card(verdict=verdict))
    assert "Better: 1.8000 bits per byte against 1.9000 of version 2" in written
    assert "| unknown | what version 2 learned from is gone |" in written


def by_age(old: Comparison, new: Comparison) -> Comparison:
    return Comparison(1.8, 1.9, 90, 22_345, "block", 0.95, 0.05, 0.15, old=old, new=new)


def test_the_page_scores_old_and_new_text_apart_and_names_the_rule() -> None:
    old = Comparison(2.3701, 2.04, 50, 12_345, "block", 0.95, -0.4, -0.28)
    new = Comparison(6.0, 8.1, 40, 10_000, "block", 0.95, 2.0, 2.2)
    written = rendered(card(verdict=judge_comparison(by_age(old, new), GateConfig(), CHALLENGER, "2")))
    plain = written.split("\n\n")[1]
    assert "predicts older text worse (16.2% more bits to encode it)" in plain
    unwrapped = written.replace(" <br>", " ")
    assert "| old text | 50 blocks, 12,345 bytes: 2.3701 bits per byte, champion 2.0400;" in unwrapped
    assert "improvement -0.3301, from -0.4000 to -0.2800 |" in unwrapped
    assert "| new text | 40 blocks, 10,000 bytes: 6.0000 bits per byte, champion 8.1000;" in unwrapped
    assert "interval on old text is below -0.005 (gate.forget) |" in unwrapped
    assert "`gptflow promote gpt-tiny 3 --reason WHY`".replace("`", "\\`") in written


def test_the_page_says_which_share_was_scored_and_with_which_interval() -> None:
    scored = replace(card().scores.reported, bytes=1_000_000, available_bytes=50_300_000, low=1.7512, high=1.8488)
    compared = replace(verdict(), bytes=1_999_000, available_bytes=50_300_000)
    written = rendered(card(verdict=compared, scores=replace(card().scores, holdout=scored))).replace(" <br>", " ")
    assert "1,999,000 bytes of text that neither model has trained on: 2.0 MB of 50.3 MB, 4 percent" in written
    assert "| scored | 5,000 tokens, 1,000,000 bytes, 40 blocks: 1.0 MB of 50.3 MB, 2 percent of that text |" in written
    assert "| score, 95% interval | from 1.7512 to 1.8488 bits per byte |" in written
    old = Comparison(1.8, 1.9, 500, 1_000_000, "block", 0.95, 0.05, 0.15, available_bytes=48_000_000)
    written = rendered(card(verdict=replace(compared, old=old, new=replace(old, available_bytes=1_000_000))))
    assert "| old text | 500 blocks, 1,000,000 bytes (1.0 MB of 48.0 MB, 2 percent): 1.8000" in written.replace(
        " <br>", " "
    )
    assert "| new text | 500 blocks, 1,000,000 bytes: 1.8000 bits per byte" in written.replace(" <br>", " ")
    assert "percent" not in rendered(card()), "an earlier release scored everything"


@pytest.mark.parametrize(
    ("available", "fix"),
    [
        (50_300_000, "the sample is too small to see differences of that size. Raise evaluate.max_bytes"),
        (
            12_345,
            "the holdout is too small to see differences of that size. Add text, or raise corpus.holdout_fraction",
        ),
        (None, "the holdout is too small"),
    ],
)
def test_the_page_says_if_the_interval_is_wider_than_the_margin_and_which_key_helps(
    available: int | None, fix: str
) -> None:
    wide = replace(verdict("tie within noise"), available_bytes=available)
    written = rendered(card(verdict=wide)).replace(" <br>", " ").replace("<br>", "").replace("\\", "")
    assert f"the interval is 0.1000 wide, more than gate.margin 0.005: {fix}" in written
    assert "too wide" not in rendered(card(verdict=wide, gate=GateConfig(margin=0.1001)))
    assert "too wide" not in rendered(card("insufficient evidence")), "there is no interval"


def test_the_page_says_why_all_blocks_decide_together() -> None:
    few = Comparison(2.3701, 2.04, 19, 12_345, "block", 0.95, None, None)
    none = Comparison(math.nan, math.nan, 0, 0, "block", 0.95, None, None)
    decided = judge_comparison(by_age(few, none), GateConfig(), CHALLENGER, "2")
    written = rendered(card(verdict=decided)).replace(" <br>", " ")
    assert decided.promoted and "all blocks decide together: fewer than 20 blocks were in the champion" in written
    assert "improvement -0.3301 |" in written and "| new text | 0 blocks |" in written
    unknown = rendered(card(verdict=replace(verdict(), unknown="version 2 learned from is gone"))).replace(" <br>", " ")
    assert "| old text | all blocks decide together: it is unknown which held-out text" in unknown


def test_the_page_of_a_first_version_has_one_column_and_no_interval() -> None:
    written = rendered(card("beats unigram", changes=None))
    assert "## The first version" in written and "champion |" not in written and "interval" not in written
    assert "the first training" in written and "| prompt | version 3 |\n" in written


def test_the_page_of_a_version_that_did_not_compete_says_so_instead_of_a_number() -> None:
    alone = replace(verdict("sources overridden"), champion_bits_per_byte=None, blocks=0)
    written = rendered(card("sources overridden", verdict=alone))
    assert "| bits per byte, lower is better | 1.8000 | not compared |" in written
    assert "improvement" not in written and "left out" not in written


def test_the_page_says_how_much_of_the_training_text_the_model_completes() -> None:
    assert "memorized" not in rendered(card()), "an earlier release did not measure it"
    scores = replace(card().scores, memorization=MEMORIZED)
    written = rendered(card(scores=scores))
    assert "| memorized, in train once | 0.5% of 200 passages are completed word for word (0.1% to 2.8%) |" in written
    assert "| memorized, in train repeatedly | 63.5% of 63 passages are completed word for word (51.1% to" in written
    assert "| the model reads 50 tokens of a passage and writes the next 50 exactly |" in written
    none = replace(scores, memorization=replace(MEMORIZED, repeated=Completions.count(0, 0)))
    assert "| memorized, in train repeatedly | not measured: train has no such passage |" in rendered(card(scores=none))


def test_the_page_compares_both_models_source_by_source_if_there_are_several() -> None:
    both = (SourceComparison("a|b/", 30, 9_345, 1.5, 2.0), SourceComparison("c/", 0, 0, math.nan, math.nan))
    written = rendered(card(verdict=replace(verdict(), sources=both)))
    assert "Bits per byte, lower is better, on the text that the gate compared on." in written
    assert "| source | blocks | bytes | challenger | champion | improvement |" in written
    assert r"| a\|b/ | 30 | 9,345 | 1.5000 | 2.0000 | 0.5000 |" in written and "| c/ |" not in written
    assert "Sources without text that the gate compared on: 1." in written
    assert "Source by source" not in rendered(card(verdict=replace(verdict(), sources=both[:1])))
    scores = replace(card().scores, sources=SOURCES)
    uncompared = rendered(card(verdict=replace(verdict(), sources=(both[1], both[1])), scores=scores))
    assert "| c/ | 10 | 3,000 | 2.7000 |" in uncompared, "no block was clean for both, so the version's own scores"


def test_the_page_of_a_version_without_a_comparison_has_its_own_scores_source_by_source() -> None:
    scores = replace(card().scores, sources=SOURCES)
    written = rendered(card("beats unigram", scores=scores))
    assert "| source | blocks | bytes | bits per byte |" in written and "| c/ | 10 | 3,000 | 2.7000 |" in written
    assert "Sources without held-out text: 1." in written
    many = [SourceScore(f"{number}/", 1, 1000 + number, 2.0) for number in range(1100)]
    written = rendered(card("beats unigram", scores=replace(scores, sources=tuple(many))))
    assert written.count("| 2.0000 |") == 20 and "| 1099/ |" in written and "| 1079/ |" not in written
    assert "Not shown: 1,080 sources with less held-out text." in written
    assert "Source by source" not in rendered(card(scores=replace(scores, sources=SOURCES[:1])))


def test_if_the_champions_files_are_damaged_the_page_omits_its_samples_and_gives_the_reason() -> None:
    champion = cast(Side, card().champion)
    broken = replace(champion, facts={}, samples=(), problem="model.safetensors was altered")
    written = rendered(card(champion=broken))
    assert "| tokenizer | gpt2 | unknown |" in written
    assert "| prompt | version 3 |\n" in written
    assert "The champion's samples are missing: model.safetensors was altered." in written


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
def test_text_written_by_a_model_is_shown_literally(written: str, shown: str) -> None:
    assert escape(written) == shown
    (line,) = [line for line in rendered(card()).splitlines() if line.startswith("| The model")]
    broken = replace(card().challenger, samples=[sample(written)])
    (other,) = [line for line in rendered(card(challenger=broken)).splitlines() if line.startswith("| The model")]
    assert line.replace("learns", shown) == other


def test_long_lines_are_wrapped_because_the_ui_does_not_wrap_and_long_samples_are_cut() -> None:
    assert escape("a word and a word and a word", 12) == "a word and a<br> word and a <br>word"
    long = replace(card().challenger, samples=[sample("word " * 1000)])
    (line,) = [line for line in rendered(card(challenger=long)).splitlines() if line.startswith("| The model")]
    cell = line.split(" | ")[1]
    assert max(map(len, cell.split("<br>"))) <= 40 and cell.endswith("…") and len(cell) < 1000


def test_samples_without_words_are_marked() -> None:
    empty = replace(card().challenger, samples=[sample(""), sample(" \n ")])
    written = rendered(card(challenger=empty))
    assert "*ended at once*" in written and "*only white space*" in written


def test_every_line_of_a_table_has_the_same_number_of_cells() -> None:
    assert render_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert render_table(("a", "b"), []) == ""

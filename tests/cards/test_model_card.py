"""The model card: no text, source or name in the card can break the structure of the page."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from flows.cards.model_card import Champion, TrainedModelFacts, adapt_for_transformers, render_card
from gptcore.corpus.reading import Reading
from gptcore.evaluation.memorization import Completions, Memorization
from tests.cards.test_decision import MEMORIZED, SOURCES, card, sample
from tests.registry.judging import CFG

SECTIONS = [
    "gpt-tiny",
    "How to load it",
    "What it learned from",
    "How it was trained",
    "How good it is",
    "What it writes",
    "Limits",
    "Licence",
]
SIDES = {"train": 8, "val": 1, "holdout": 1}
LINEAGE = {
    "pipeline": "tiny",
    "parameters": 22_000,
    "tokenizer": "by`t|es",
    "corpus": {"documents": 3, "blocks": SIDES, "bytes": SIDES},
    "config": {"corpus": {"sources": ["https://me:secret@example.org/a.txt?sig=hidden", "a|b\n## c/<b>*.md"]}},
    "split": {"split": "hash"},
}
WRITTEN = "said ```\n## Limits\n<script>alert(1)</script>\n````\n| a | b |\r\n\x1b[31m and went on"


def parsed(markdown: str) -> tuple[dict[str, Any], list[Token]]:
    """Return the front matter and the tokens of the text after it."""
    _, front, body = markdown.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(body)


def headings(tokens: list[Token]) -> list[str]:
    return [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]


def test_text_from_models_and_sources_does_not_break_the_page_and_no_secret_is_on_it() -> None:
    written = TrainedModelFacts(card().result, card().scores, [sample(WRITTEN, "` | \n# A <i>prompt</i>")])
    made = render_card("gpt-tiny", CFG, LINEAGE, written, Champion("2", "1.9000"))
    front, tokens = parsed(made)
    assert front["library_name"] == "gptflow" and front["pipeline_tag"] == "text-generation"
    assert headings(tokens) == SECTIONS
    fences = [token.content for token in tokens if token.type == "fence"]
    shown = WRITTEN.replace("\r", "").replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert fences[-1].endswith(f"{shown}\n"), "the whole sample is in one block"
    html = [inner.content for token in tokens for inner in token.children or () if inner.type.startswith("html")]
    assert set(html) <= {"<br>"} and not any(token.type == "html_block" for token in tokens)
    assert "secret" not in made and "hidden" not in made and "https://example.org/a.txt" in made
    rows = [token.content for token in tokens if token.type == "inline"]
    for part in ("this model, holdout bits per byte", "1.8000", "version 2, the champion then", "1.9000"):
        assert any(part in row for row in rows), part
    front, exported = parsed(adapt_for_transformers(made, "Qwen3"))
    assert front["library_name"] == "transformers" and headings(exported) == SECTIONS
    fenced = [token.content for token in exported if token.type == "fence"]
    assert "AutoModelForCausalLM" in fenced[0] and fenced[-1] == fences[-1]
    assert not any("flows.load" in block for block in fenced)


@pytest.mark.parametrize("xz, is_said", [(1.4, True), (1.9, False)])
def test_the_card_of_a_model_that_a_compressor_beats_says_so(xz: float, is_said: bool) -> None:
    scores = card().scores
    beaten = replace(scores, baselines=replace(scores.baselines, xz_primed_bits_per_byte=xz))
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, beaten, []))
    assert ("remembering strings" in made) == is_said


def test_the_card_has_the_scores_of_each_source_and_says_what_the_model_has_memorized() -> None:
    scores = replace(card().scores, memorization=MEMORIZED, sources=SOURCES)
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, scores, []))
    assert "\n| source | blocks | bytes | bits per byte |\n" in made and r"| a\|b/ | 30 | 9,345 | 1.5000 |" in made
    assert "\n\nSources without held-out text: 1.\n\n" in made
    assert (
        "Given 50 tokens of its training text, it continues with exactly the next 50 tokens of that text in 0.5% of "
        "200 passages that are there once (95% interval: 0.1% to 2.8%), and in 63.5% of 63 passages that are there "
        "more than once (95% interval: 51.1% to 74.3%)."
    ) in made
    none = Completions.count(0, 0)
    short = replace(scores, memorization=Memorization(16, none, none), sources=SOURCES[:1])
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, short, []))
    assert "no passage of 32 tokens" in made and "| source |" not in made


def test_the_card_says_what_became_of_the_files_of_the_text_in_numbers() -> None:
    reading = Reading()
    reading.count(".txt", read=1200, documents=1200, empty=1, duplicate=3)
    reading.count(".a|b`", read=1, documents=9, replaced=4)
    reading.count(".pdf", skipped=2)
    reading.exclude(".gitignore", is_directory=True)
    reading.add_problem(".csv", "board/minutes.csv is damaged")
    reading.add_secret("password", "board/minutes.txt line 3")
    facts = TrainedModelFacts(card().result, card().scores, [], reading)
    made = render_card("gpt-tiny", CFG, {**LINEAGE, "split": {"split": "hash", "duplicates": "keep"}}, facts)
    table = (
        "| suffix | files read | documents | empty | duplicates | damaged files | replaced characters |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| `.txt` | 1,200 | 1,200 | 1 | 3 |  |  |\n"
        "| `.a b ` | 1 | 9 |  |  |  | 4 |\n"
        "| `.csv` |  |  |  |  | 1 |  |\n\n"
    )
    assert table in made and headings(parsed(made)[1]) == [one for one in SECTIONS if one != "What it writes"]
    assert (
        "Files that were not read: `.pdf` 2. Left out by rules: 1 directory (.gitignore 1)." in made
        and "are in the text: password 1." in made
    )
    assert "minutes" not in made, "the card goes wherever the model goes"
    assert "Duplicates were kept (split hash)" in made
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, card().scores, []))
    assert "| suffix |" not in made and "Duplicates were dropped (split hash)" in made


def test_the_card_says_which_share_was_scored_and_with_which_interval() -> None:
    scored = replace(card().scores.reported, bytes=1_000_000, available_bytes=50_300_000, low=1.7512, high=1.8488)
    scores = replace(card().scores, holdout=scored)
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, scores, []))
    assert "on 1,000,000 bytes in 40 blocks of holdout (1.0 MB of 50.3 MB, 2 percent)." in made
    assert "The model's score on such text is from 1.7512 to 1.8488 bits per byte, with a confidence of 95%." in made
    made = render_card("gpt-tiny", CFG, LINEAGE, TrainedModelFacts(card().result, card().scores, []))
    assert "percent" not in made and "confidence" not in made, "an earlier release scored everything"


def test_the_card_says_how_the_first_updates_were_computed_if_the_last_ones_were_not_computed_so() -> None:
    executions = [{"device": "cuda", "threads": 8}, {"device": "cpu", "threads": 1}]
    for shown in (executions, executions[1:]):
        made = render_card(
            "gpt-tiny", CFG, {**LINEAGE, "executions": shown}, TrainedModelFacts(card().result, card().scores, [])
        )
        assert ("| earlier updates with | device cuda, threads 8 |" in made) == (len(shown) == 2)


def test_a_version_older_than_model_cards_gets_a_card_from_its_lineage() -> None:
    made = render_card("gpt-tiny", CFG, {**LINEAGE, "holdout_bits_per_byte": 1.8})
    assert headings(parsed(made)[1]) == [section for section in SECTIONS if section != "What it writes"]
    assert "1.8000 bits per byte" in made and "elsewhere" not in made

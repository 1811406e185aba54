"""The decision card: one page of Markdown that says what a retraining decided, and why.

It has two kinds of readers. Those who only want to know what happened find plain words and a picture at the top. Those
who doubt the verdict find the numbers and their sources below. A card is a function of its arguments: nothing is looked
up here. retrain/decision_card.py gathers the arguments and stores the card.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows.cards.verdict import SOURCES_OVERRIDDEN, WITHDRAWN, Verdict, describe_share
from gptcore.config import GateConfig
from gptcore.evaluation.bits_per_byte import Evaluation
from gptcore.evaluation.compare import MIN_BLOCKS, Comparison
from gptcore.evaluation.memorization import Completions
from gptcore.evaluation.run_report import Scores
from gptcore.evaluation.samples import Sample
from gptcore.evaluation.sources import SourceComparison, SourceScore
from gptcore.training.run_directory import Result

Rows = Sequence[tuple[str, str]]
S = TypeVar("S", SourceScore, SourceComparison)

FACTS = ("tokenizer", "parameters", "training", "corpus")
"""Facts about each model in the comparison, besides its score."""
_MAX_CHARS = 600
"""Most characters of a sample on the card; samples.json has the whole text."""
_MAX_SOURCES = 20
_SAMPLE_WIDTH, _VALUE_WIDTH, _FACT_WIDTH = 36, 72, 30
"""Characters per line. Prefect's UI breaks no line inside a table, and cuts off what is too wide."""


@dataclass(frozen=True)
class Side:
    """One of the two models: a column of the card."""

    version: str
    link: str
    """Markdown link to the version."""
    facts: dict[str, str]
    """Those of `FACTS` that are known."""
    samples: Sequence[Sample]
    problem: str = ""
    """Why facts or samples are missing; empty if they are not."""


@dataclass(frozen=True)
class Card:
    """All that the card shows."""

    model_name: str
    verdict: Verdict
    gate: GateConfig
    challenger: Side
    champion: Side | None
    """None for a first version."""
    changes: Rows | None
    """What changed in the corpus since the previous training; None for the first training."""
    scores: Scores
    result: Result
    pictures: Sequence[tuple[str, Path]]
    """A heading and a PNG each."""
    links: Rows
    """Names with values in Markdown."""

    @property
    def title(self) -> str:
        """Return model, version and verdict."""
        return f"{self.model_name} version {self.challenger.version}: {_decision(self.verdict)}"


def list_scores(scores: Scores) -> list[tuple[str, str]]:
    """List the reported bits per byte, and the scores of simple models on the same text."""
    reported, simple = scores.reported, scores.baselines
    note = " (also used for selection)" if reported.also_used_for_selection else ""
    primed = "with the training text" if simple.primed_bytes else "primed"
    return [
        (f"{reported.side} bits per byte", f"{reported.bits_per_byte:.4f}{note}"),
        ("xz -9e, primed " + primed, f"{simple.xz_primed_bits_per_byte:.4f}"),
        ("xz -9e alone", f"{simple.xz_bits_per_byte:.4f}"),
        ("unigram model", f"{simple.unigram_bits_per_byte:.4f}"),
        ("uniform model", f"{simple.uniform_bits_per_byte:.4f}"),
    ]


def list_details(scores: Scores, result: Result) -> list[tuple[str, str]]:
    """List how the model was trained, its score in other units, and what it has memorized."""
    reported = scores.reported
    sizes = f"{reported.tokens:,} tokens, {reported.bytes:,} bytes, {reported.blocks:,} blocks"
    return [
        ("loss, perplexity", f"{reported.loss:.4f} nats per token, {reported.perplexity:,.1f}"),
        ("top-1, top-5 accuracy", f"{reported.top1:.1%}, {reported.top5:.1%}"),
        ("scored", _add_share(sizes, reported.bytes, reported.available_bytes)),
        *([("score, 95% interval", interval)] if (interval := format_interval(reported)) else []),
        ("best val loss", f"{result.best_val_loss:.4f} nats per token at step {result.best_step:,}"),
        ("trained", f"{result.tokens_seen:,} tokens, {result.steps:,} steps, {result.seconds:.1f} s in updates"),
        ("ended by", result.stopped_by),
        *list_memorized(scores),
    ]


def format_interval(scored: Evaluation) -> str:
    """Format the interval of the score, for example "from 1.5871 to 1.6684 bits per byte". Empty if it is unknown."""
    if scored.low is None or scored.high is None:
        return ""
    return f"from {scored.low:.4f} to {scored.high:.4f} bits per byte"


def _add_share(sizes: str, scored: int, available: int | None) -> str:
    """Add which share of the held-out text was scored, unless all of it was."""
    share = describe_share(scored, available)
    return f"{sizes}: {share} of that text" if share else sizes


def list_memorized(scores: Scores) -> list[tuple[str, str]]:
    """List how much of its training text the model completes word for word; empty if that was not measured."""
    if (found := scores.memorization) is None:
        return []
    tokens = found.prefix_tokens
    return [
        ("memorized, in train once", _format_completions(found.once)),
        ("memorized, in train repeatedly", _format_completions(found.repeated)),
        ("memorized means", f"the model reads {tokens} tokens of a passage and writes the next {tokens} exactly"),
    ]


def _format_completions(found: Completions) -> str:
    """Format a share, for example "0.5% of 200 passages are completed word for word (0.1% to 2.8%)"."""
    if found.share is None:
        return "not measured: train has no such passage"
    passages = f"{found.sampled} passage{'s are' if found.sampled > 1 else ' is'} completed word for word"
    return f"{found.share:.1%} of {passages} ({found.low:.1%} to {found.high:.1%})"


def pick_sources(scores: Sequence[S], text: str) -> tuple[list[S], str]:
    """Return the sources with the most held-out text, at most 20, and a sentence about the others, perhaps empty.

    `text` describes the text that was scored, for example "held-out text".
    """
    scored = sorted((score for score in scores if score.blocks), key=lambda score: score.bytes, reverse=True)
    notes = []
    if (more := len(scored) - _MAX_SOURCES) > 0:
        notes.append(f"Not shown: {more:,} sources with less {text}. The evaluation's sources.csv lists all sources.")
    if empty := len(scores) - len(scored):
        notes.append(f"Sources without {text}: {empty:,}.")
    return scored[:_MAX_SOURCES], " ".join(notes)


def explain_verdict(verdict: Verdict, version: str) -> str:
    """Explain verdict and reason in one or two sentences for readers who know none of the terms."""
    new, old = f"Version {version}", f"version {verdict.champion_version}"
    stays = f"{old} stays champion" if verdict.champion_version else "there is still no champion"
    loses = f"{new} does not become champion, the version in use."
    difference = _format_difference(verdict.bits_per_byte, verdict.champion_bits_per_byte)
    old_difference = _format_difference(verdict.old.challenger, verdict.old.champion) if verdict.old else ""
    sentences = {
        "beats unigram": f"{new} is the first champion, the version in use. It predicts unseen text better than word "
        "frequencies alone do.",
        "does not beat unigram": f"{loses} It predicts unseen text no better than word frequencies alone do.",
        "better": f"{new} is the new champion, the version in use. It predicts unseen text better than {old}"
        f"{difference}, and chance hardly explains the difference.",
        "worse": f"{loses} It predicts unseen text worse than {old}{difference}.",
        "tie within noise": f"{loses} It predicts unseen text about as well as {old}{difference}, so the "
        "difference may be chance.",
        "worse on old text": f"{loses} It predicts new text better than {old}, but it predicts older text "
        f"worse{old_difference}.",
        "not finite": f"{loses} Its score is not a finite number, so it cannot be compared and {stays}.",
        "insufficient evidence": f"{loses} Too little text that neither model has learned from is left to tell which "
        f"is better, so {stays}.",
        SOURCES_OVERRIDDEN: f"{new} was an experiment with other text than the pipeline's own, so it did not compete "
        f"to be the version in use: {stays}.",
        WITHDRAWN: f"{loses} A person has already withdrawn the same model by a rollback, so {stays}.",
    }
    return sentences.get(verdict.kind, f"{new} was {_decision(verdict)}: {verdict.kind}.")


def render_card(card: Card, address: Callable[[Path], str]) -> str:
    """Render the card as Markdown. `address` returns the link to the picture at a path."""
    parts = [
        f"# {escape(card.title)}",
        f"**{escape(explain_verdict(card.verdict, card.challenger.version))}**",
        escape(card.verdict.reason[:1].upper() + card.verdict.reason[1:]) + ".",
        "## Challenger against champion" if card.champion else "## The first version",
        _render_comparison(card),
        _render_pairs("what the verdict rests on", _list_evidence(card)),
        *_render_changes(card),
        *_render_sources(card),
        *(f"## {heading}\n\n![{heading}]({address(path)})" for heading, path in card.pictures),
        "## Samples",
        _render_samples(card),
        "## Compared with simple models",
        _render_pairs("on all held-out text", list_scores(card.scores)),
        "## In detail",
        _render_pairs("the training and its score", list_details(card.scores, card.result)),
        "## Where things are",
        render_table(("what", "where"), card.links),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def escape(plain: str, width: int | None = None) -> str:
    """Escape plain text, so that Markdown shows it letter by letter, also in a table. Breaks lines at `width`.

    For example, `escape("a | b")` returns `a \\| b`.
    """
    lines = re.split(r"\r\n|\r|\n", plain)
    if width:
        lines = [part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
    escaped = (re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", line) for line in lines)
    return "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in escaped)


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table. The cells are Markdown already. Returns an empty string if there are no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if rows else ""


def _render_pairs(heading: str, rows: Rows) -> str:
    """Render a table of names and values, both plain text."""
    return render_table((heading, ""), [(escape(name), escape(value, _VALUE_WIDTH)) for name, value in rows])


def _render_changes(card: Card) -> list[str]:
    """Render the section about the corpus; no section if its changes are not known."""
    heading = "## What changed in the corpus"
    if card.changes is None:
        return [] if card.champion else [heading, "This is the first training, so there is nothing to compare with."]
    return [heading, _render_pairs("since the previous training", card.changes) or "Nothing."]


def _render_sources(card: Card) -> list[str]:
    """Render the scores on the text of each source; no section if the corpus has a single source."""
    if len(card.verdict.sources or card.scores.sources) < 2:
        return []
    head = ["source", "blocks", "bytes", "bits per byte"]
    rows: list[tuple[str, ...]]
    if any(one.blocks for one in card.verdict.sources):
        text = "text that the gate compared on"
        compared, note = pick_sources(card.verdict.sources, text)
        head[3:] = "challenger", "champion", "improvement"
        rows = [
            (
                *_format_source(one),
                f"{one.challenger:.4f}",
                f"{one.champion:.4f}",
                f"{one.champion - one.challenger:.4f}",
            )
            for one in compared
        ]
    else:
        text = "held-out text"
        scored, note = pick_sources(card.scores.sources, text)
        rows = [(*_format_source(one), f"{one.bits_per_byte:.4f}") for one in scored]
    return ["## Source by source", f"Bits per byte, lower is better, on the {text}.", render_table(head, rows), note]


def _format_source(score: SourceScore | SourceComparison) -> tuple[str, str, str]:
    return escape(score.source, _FACT_WIDTH), f"{score.blocks:,}", f"{score.bytes:,}"


def _decision(verdict: Verdict) -> str:
    return "promoted" if verdict.promoted else "rejected"


def _format_difference(challenger: float, champion: float | None) -> str:
    """Format the relative difference of the scores, for example " (5.3% fewer bits to encode it)"."""
    if not champion:
        return ""
    share = 1 - challenger / champion
    return f" ({abs(share):.1%} {'fewer' if share >= 0 else 'more'} bits to encode it)"


def _render_comparison(card: Card) -> str:
    """Render a table with a column for each model."""
    verdict, sides = card.verdict, [side for side in (card.challenger, card.champion) if side]
    score = verdict.champion_bits_per_byte
    scores = [f"{verdict.bits_per_byte:.4f}", "not compared" if score is None else f"{score:.4f}"]
    rows = [
        ("version", *(side.link for side in sides)),
        ("bits per byte, lower is better", *scores[: len(sides)]),
        *((fact, *(escape(side.facts.get(fact, "unknown"), _FACT_WIDTH) for side in sides)) for fact in FACTS),
    ]
    return render_table(("", "challenger", "champion")[: 1 + len(sides)], rows)


def _list_evidence(card: Card) -> list[tuple[str, str]]:
    """List the numbers that the verdict rests on."""
    verdict, rows = card.verdict, []
    if verdict.champion_bits_per_byte is not None:
        gain = verdict.champion_bits_per_byte - verdict.bits_per_byte
        condition = f"to win, the whole interval must be above {card.gate.margin:g}"
        rows.append(("improvement", f"{gain:.4f} bits per byte; {condition}"))
    if verdict.low is not None and verdict.high is not None:
        confidence = f"each bound with {card.gate.confidence:.4g} confidence"
        rows.append(("interval", f"from {verdict.low:.4f} to {verdict.high:.4f}, {confidence}"))
        rows += _list_width(verdict.high - verdict.low, card)
    elif verdict.champion_bits_per_byte is not None:
        rows.append(("interval", f"none: it needs at least {MIN_BLOCKS} blocks and finite scores"))
    if verdict.blocks:
        which = "that neither model has trained on" if card.champion else "that the model has not trained on"
        sizes = f"{verdict.blocks:,} blocks, {verdict.bytes:,} bytes of text {which}"
        rows.append(("scored on", _add_share(sizes, verdict.bytes, verdict.available_bytes)))
    if verdict.champion_bits_per_byte is not None:
        why = "held-out text that one of the models may have trained on, or that shares 128 letters and digits with it"
        rows.append(("left out", f"{verdict.excluded_bytes:,} bytes: {why}"))
    if verdict.champion_bits_per_byte is not None:
        rows += _list_ages(card)
    if verdict.unknown:
        rows.append(("unknown", f"what {verdict.unknown}"))
    return rows


def _list_width(width: float, card: Card) -> list[tuple[str, str]]:
    """Say that differences of the size of the margin cannot be seen, and what to do, if the interval is so wide."""
    verdict, margin = card.verdict, card.gate.margin
    if not width > margin:
        return []
    is_sample = verdict.available_bytes is not None and verdict.bytes < verdict.available_bytes
    what, fix = (
        ("sample", "Raise evaluate.max_bytes to score more of the held-out text")
        if is_sample
        else ("holdout", "Add text, or raise corpus.holdout_fraction")
    )
    return [
        (
            "too wide",
            f"the interval is {width:.4f} wide, more than gate.margin {margin:g}: the {what} is too small to see "
            f"differences of that size. {fix}",
        )
    ]


def _list_ages(card: Card) -> list[tuple[str, str]]:
    """List the scores on old and on new text, and what they mean for the verdict."""
    old, new = card.verdict.old, card.verdict.new
    if old is None or new is None:
        why = "it is unknown which held-out text was in the champion's corpus"
        return [("old text", f"all blocks decide together: {why}")] if card.verdict.unknown else []
    rows = [(f"{age} text", _format_comparison(part)) for age, part in (("old", old), ("new", new))]
    if old.blocks < MIN_BLOCKS:
        rule = f"all blocks decide together: fewer than {MIN_BLOCKS} blocks were in the champion's corpus (old text)"
    else:
        rule = (
            "old text was in the champion's corpus already; the challenger is not promoted if the whole interval on "
            f"old text is below -{card.gate.forget_margin:g} (gate.forget)"
        )
    return [*rows, ("rule for old text", rule)]


def _format_comparison(part: Comparison) -> str:
    if not part.blocks:
        return "0 blocks"
    interval = "" if part.low is None or part.high is None else f", from {part.low:.4f} to {part.high:.4f}"
    share = describe_share(part.bytes, part.available_bytes)
    return (
        f"{part.blocks:,} blocks, {part.bytes:,} bytes{f' ({share})' if share else ''}: {part.challenger:.4f} bits per "
        f"byte, champion {part.champion:.4f}; improvement {part.improvement:.4f}{interval}"
    )


def _render_samples(card: Card) -> str:
    """Render a column of samples for each model, made with the same prompts, temperatures and seeds."""
    champion = card.champion
    champion_samples = champion.samples if champion else ()
    names = [f"version {card.challenger.version}"]
    if champion and champion_samples:
        names.append(f"version {champion.version}")
    rows = [
        [
            f"{escape(sample.prompt, _FACT_WIDTH) or 'a new document'}<br>temperature {sample.temperature:g}",
            *(_render_sample(column) for column in (sample, *champion_samples[number : number + 1])),
        ]
        for number, sample in enumerate(card.challenger.samples)
    ]
    parts = [render_table(("prompt", *names), rows)]
    if champion and champion.problem:
        parts.append(f"The champion's samples are missing: {escape(champion.problem)}.")
    return "\n\n".join(filter(None, parts))


def _render_sample(sample: Sample) -> str:
    if not sample.text.strip():
        return "*only white space*" if sample.text else "*ended at once*"
    more = " …" if len(sample.text) > _MAX_CHARS else ""
    return escape(sample.text[:_MAX_CHARS], _SAMPLE_WIDTH) + more

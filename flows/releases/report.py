"""The decision card: one page of markdown that says what a retraining decided, and why.

It has two readers: who only wants to know what happened finds a sentence and a picture, who doubts it finds the numbers
and where they come from. A page is a function of what it is given: card.py gathers that, and nothing is looked up here.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.releases.gate import SOURCES_OVERRIDDEN, WITHDRAWN, Verdict
from gptcore.config import GateConfig
from gptcore.judging.compare import MIN_BLOCKS
from gptcore.judging.dossier import Scores
from gptcore.judging.samples import Sample
from gptcore.learning.rundir import Result

Rows = Sequence[tuple[str, str]]

FACTS = ("tokenizer", "parameters", "training", "corpus")
"""What a column of the comparison says of its model, beside its score."""
_MOST_CHARS = 600
"""Of a sample on the card; the whole text lies beside it."""
_SAMPLE_WIDTH, _VALUE_WIDTH, _FACT_WIDTH = 36, 72, 30
"""Characters per line: Prefect's UI breaks no line inside a table, and what is too wide is cut off."""


@dataclass(frozen=True)
class Side:
    """One of the two models, a column of the card."""

    version: str
    link: str
    """Markdown."""
    facts: dict[str, str]
    """Of `FACTS` those that are known."""
    samples: Sequence[Sample]
    problem: str = ""
    """Why facts or samples are missing; empty where they are not."""


@dataclass(frozen=True)
class Card:
    """All that the page says."""

    model_name: str
    verdict: Verdict
    gate: GateConfig
    challenger: Side
    champion: Side | None
    """None on a first version."""
    changes: Rows | None
    """What changed in the corpus since the training before; None on a first one."""
    scores: Scores
    result: Result
    pictures: Sequence[tuple[str, Path]]
    """A heading and a PNG each."""
    links: Rows
    """Values are markdown."""

    @property
    def title(self) -> str:
        """Model, version and verdict."""
        return f"{self.model_name} version {self.challenger.version}: {_decision(self.verdict)}"


def score_rows(scores: Scores) -> list[tuple[str, str]]:
    """The reported bits per byte, and what simple models reach on the same text."""
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


def detail_rows(scores: Scores, result: Result) -> list[tuple[str, str]]:
    """How the model was trained, and its score in other words."""
    reported = scores.reported
    return [
        ("loss, perplexity", f"{reported.loss:.4f} nats per token, {reported.perplexity:,.1f}"),
        ("top-1, top-5 accuracy", f"{reported.top1:.1%}, {reported.top5:.1%}"),
        ("scored", f"{reported.tokens:,} tokens, {reported.bytes:,} bytes, {reported.blocks:,} blocks"),
        ("best val loss", f"{result.best_val_loss:.4f} nats per token at step {result.best_step:,}"),
        ("trained", f"{result.tokens_seen:,} tokens, {result.steps:,} steps, {result.seconds:.1f} s in updates"),
        ("ended by", result.stopped_by),
    ]


def sentence(verdict: Verdict, version: str) -> str:
    """Verdict and reason in one sentence without a technical term."""
    new, old = f"Version {version}", f"version {verdict.champion_version}"
    stays = f"{old} stays champion" if verdict.champion_version else "there is still no champion"
    sentences = {
        "beats unigram": f"{new} is the first champion: it predicts unseen text better than word frequencies alone do.",
        "does not beat unigram": f"{new} does not become champion: it predicts unseen text no better than word "
        "frequencies alone do.",
        "better": f"{new} is the new champion: it predicts unseen text better than {old}{_by(verdict)}, and that is "
        "hardly luck.",
        "worse": f"{new} does not become champion: it predicts unseen text worse than {old}{_by(verdict)}.",
        "tie within noise": f"{new} does not become champion: it predicts unseen text about as well as {old}"
        f"{_by(verdict)}, too small a difference to be sure of.",
        "not finite": f"{new} does not become champion: its score is not a number that can be compared, so {stays}.",
        "insufficient evidence": f"{new} does not become champion: too little text is left that neither model has "
        f"learned from to tell which is better, so {stays}.",
        SOURCES_OVERRIDDEN: f"{new} was an experiment on other text than the pipeline's own, so it did not compete, "
        f"and {stays}.",
        WITHDRAWN: f"{new} does not become champion: a person has rolled back the same model before, so {stays}.",
    }
    return sentences.get(verdict.kind, f"{new} was {_decision(verdict)}: {verdict.kind}.")


def page(card: Card, address: Callable[[Path], str]) -> str:
    """The card as markdown. `address` says what an image's link is."""
    parts = [
        f"# {text(card.title)}",
        f"**{text(sentence(card.verdict, card.challenger.version))}**",
        text(card.verdict.reason[:1].upper() + card.verdict.reason[1:]) + ".",
        "## Challenger against champion" if card.champion else "## The first version",
        _comparison(card),
        _pairs("what it rests on", _evidence(card)),
        *_changes(card),
        *(f"## {heading}\n\n![{heading}]({address(path)})" for heading, path in card.pictures),
        "## Samples",
        _samples(card),
        "## Beside simple models",
        _pairs("on all held-out text", score_rows(card.scores)),
        "## In detail",
        _pairs("the training and its score", detail_rows(card.scores, card.result)),
        "## Where things are",
        table(("what", "where"), card.links),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def text(plain: str, width: int | None = None) -> str:
    """Plain text as markdown that shows it letter by letter, also inside a table's cell; broken into lines at `width`.

    Characters that markdown would take for its own are escaped.
    """
    lines = re.split(r"\r\n|\r|\n", plain)
    if width:
        lines = [part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
    escaped = (re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", line) for line in lines)
    return "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in escaped)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table of cells that are markdown already; nothing where there are no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if rows else ""


def _pairs(heading: str, rows: Rows) -> str:
    """A table of names and values in plain text."""
    return table((heading, ""), [(text(name), text(value, _VALUE_WIDTH)) for name, value in rows])


def _changes(card: Card) -> list[str]:
    heading = "## What changed in the corpus"
    if card.changes is None:
        return [] if card.champion else [heading, "First training: there is nothing to compare with."]
    return [heading, _pairs("since the training before", card.changes) or "Nothing."]


def _decision(verdict: Verdict) -> str:
    return "promoted" if verdict.promoted else "rejected"


def _by(verdict: Verdict) -> str:
    if not verdict.champion_bits_per_byte:
        return ""
    share = 1 - verdict.bits_per_byte / verdict.champion_bits_per_byte
    return f" ({abs(share):.1%} {'fewer' if share >= 0 else 'more'} bits)"


def _comparison(card: Card) -> str:
    verdict, sides = card.verdict, [side for side in (card.challenger, card.champion) if side]
    own = f"{verdict.bits_per_byte:.4f}"
    rival = "not compared" if verdict.champion_bits_per_byte is None else f"{verdict.champion_bits_per_byte:.4f}"
    rows = [
        ("version", *(side.link for side in sides)),
        ("bits per byte, lower is better", own, rival)[: 1 + len(sides)],
        *((fact, *(text(side.facts.get(fact, "unknown"), _FACT_WIDTH) for side in sides)) for fact in FACTS),
    ]
    return table(("", "challenger", "champion")[: 1 + len(sides)], rows)


def _evidence(card: Card) -> list[tuple[str, str]]:
    """What the verdict rests on."""
    verdict, rows = card.verdict, []
    if verdict.champion_bits_per_byte is not None:
        gain = verdict.champion_bits_per_byte - verdict.bits_per_byte
        rows.append(
            ("improvement", f"{gain:.4f} bits per byte; a champion needs surely more than {card.gate.margin:g}")
        )
    if verdict.low is not None and verdict.high is not None:
        sure = f"each bound with {card.gate.confidence:.4g} confidence"
        rows.append(("interval", f"from {verdict.low:.4f} to {verdict.high:.4f}, {sure}"))
    elif verdict.champion_bits_per_byte is not None:
        rows.append(("interval", f"none: it takes {MIN_BLOCKS} blocks and finite scores"))
    if verdict.blocks:
        which = "that neither has trained on" if card.champion else "that it has not trained on"
        rows.append(("scored on", f"{verdict.blocks:,} blocks, {verdict.bytes:,} bytes of text {which}"))
    if verdict.champion_bits_per_byte is not None:
        why = "held-out text that one of the two may have trained on, or that shares 200 bytes with such text"
        rows.append(("left out", f"{verdict.excluded_bytes:,} bytes: {why}"))
    if verdict.unknown:
        rows.append(("unknown", f"what {verdict.unknown}"))
    return rows


def _samples(card: Card) -> str:
    """Same prompts, temperatures and seeds; a column per model."""
    champion = card.champion
    theirs = champion.samples if champion else ()
    names = [f"version {card.challenger.version}", *([f"version {champion.version}"] if champion and theirs else [])]
    rows = [
        [
            f"{text(own.prompt, _FACT_WIDTH) or 'a new document'}<br>temperature {own.temperature:g}",
            *(_shown(sample) for sample in (own, *theirs[number : number + 1])),
        ]
        for number, own in enumerate(card.challenger.samples)
    ]
    missing = f"The champion has no column: {text(champion.problem)}." if champion and champion.problem else ""
    return "\n\n".join(filter(None, [table(("prompt", *names), rows), missing]))


def _shown(sample: Sample) -> str:
    if not sample.text.strip():
        return "*only white space*" if sample.text else "*ended at once*"
    more = " …" if len(sample.text) > _MOST_CHARS else ""
    return text(sample.text[:_MOST_CHARS], _SAMPLE_WIDTH) + more

"""The report of one retraining: a page of markdown for the Prefect run and the MLflow run."""

import base64
from collections.abc import Sequence
from pathlib import Path

from gptcore.dossier import Scores, read_samples
from gptcore.rundir import Result

Rows = Sequence[tuple[str, str]]


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


def report(title: str, summary: str, rows: Rows, plots: Path, samples: Path, links: Rows) -> str:
    """The page: verdict, result table, loss plot inline, samples, links."""
    picture = base64.b64encode((plots / "losses.png").read_bytes()).decode()
    parts = [
        f"# {title}",
        summary,
        _table(rows),
        f"![Losses](data:image/png;base64,{picture})",
        "## Samples",
        *(_sample(sample.prompt, sample.temperature, sample.text) for sample in read_samples(samples)),
        "## Where things are",
        _table(links),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Rows) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sample(prompt: str, temperature: float, text: str) -> str:
    quoted = f"{prompt}{text}".replace("\n", "\n> ")
    return f"Temperature {temperature:g}\n\n> {quoted}"

"""What each step of a retraining says of its outcome: one line, for the terminal and the log in the Prefect UI.

A step over a large text also says every few seconds how far it is.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.reason import Reason
from flows.releases.gate import Verdict
from gptcore.corpus import Snapshot
from gptcore.data import Tokens
from gptcore.judging.dossier import read_samples, read_scores
from gptcore.learning.rundir import Paused, Result
from gptcore.progress import LOGGER

Logger = logging.Logger | logging.LoggerAdapter


def of_snapshot(snapshot: Snapshot) -> str:
    """`78 documents: train 351 kB, val 31 kB, holdout 27 kB`."""
    sizes = ", ".join(f"{side} {size / 1000:,.0f} kB" for side, size in snapshot.bytes.items())
    return f"{snapshot.documents:,} documents: {sizes}"


def of_reason(reason: Reason) -> str:
    """Whether there is a reason to train, and which."""
    return reason.text if reason.must_train else f"no reason to train: {reason.text}"


def of_tokens(tokens: Tokens) -> str:
    """`gpt2, 50,257 entries: train 104,413, val 8,990 tokens`."""
    counts = ", ".join(f"{side} {count:,}" for side, count in tokens.counts.items())
    return f"{tokens.tokenizer}, {tokens.n_vocab:,} entries: {counts} tokens"


def of_training(ended: Result | Paused) -> str:
    """How far the training came."""
    if isinstance(ended, Paused):
        return f"paused after {ended.seconds:,.0f} s, at step {ended.step:,}"
    return (
        f"{ended.steps:,} steps, {ended.tokens_seen:,} tokens, best val loss {ended.best_val_loss:.3f} "
        f"at step {ended.best_step:,}"
    )


def of_evaluation(evaluation: Path) -> str:
    """`1.9596 bits per byte on holdout, perplexity 88.0`."""
    reported = read_scores(evaluation).reported
    return f"{reported.bits_per_byte:.4f} bits per byte on {reported.side}, perplexity {reported.perplexity:,.1f}"


def of_samples(samples: Path) -> str:
    """`6 samples, longest verbatim copy 53 characters`."""
    written = read_samples(samples)
    copied = max((sample.longest_copied for sample in written), default=0)
    return f"{len(written)} samples, longest verbatim copy {copied} characters"


def of_plots(plots: Path) -> str:
    """Where they are, from the working directory if they lie below it."""
    return str(plots.relative_to(Path.cwd()) if plots.is_relative_to(Path.cwd()) else plots)


def of_verdict(verdict: Verdict) -> str:
    """The verdict and its reason."""
    return f"{'promoted' if verdict.promoted else 'rejected'}: {verdict.reason}"


class _Relay(logging.Handler):
    """Hands records on to a run's logger, from whatever thread they come."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logging.INFO)
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Hands a record on to the flow run's logger, with the step it is about."""
        step = getattr(record, "step", "")
        self.logger.info("%s: %s", step, record.getMessage(), extra={"step": step})


@contextmanager
def of_progress(logger: Logger) -> Iterator[None]:
    """While this holds, `logger` says how far each step is."""
    relay = _Relay(logger)
    LOGGER.addHandler(relay)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(relay)

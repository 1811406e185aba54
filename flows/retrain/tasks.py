"""The steps of a retraining as Prefect tasks, and the line of text with which each step reports its result.

The tasks are a table of core functions. `is_transient` says which of their errors are retried. The `describe_`
functions write one line for the terminal and for the log in the Prefect UI. flow.py calls both.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from flows.cards.verdict import Verdict, describe_share
from flows.registry.gate import judge
from flows.registry.register import register as register_version
from flows.retrain import trainer_process
from flows.retrain.policy import Reason, find_reason
from flows.tracking.errors import is_transient
from gptcore.corpus.ingest import ingest as ingest_corpus
from gptcore.corpus.reading import count_documents
from gptcore.corpus.snapshot import Snapshot
from gptcore.evaluation import run_report
from gptcore.evaluation.run_report import read_samples, read_scores
from gptcore.progress import LOGGER
from gptcore.tokens import files
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import Paused, Result

P = ParamSpec("P")
R = TypeVar("R")
Logger = logging.Logger | logging.LoggerAdapter


def _should_retry(_task: Any, _run: Any, state: Any) -> bool:
    # Prefect does not count the trainer's deaths: trainer_process.py restarts the trainer as long as it gets further.
    return is_transient(state.result(raise_on_failure=False))


def _make_task(function: Callable[P, R], name: str) -> Task[P, R]:
    # The steps are content-addressed themselves; Prefect's cache would compare paths, not the contents of the files.
    return task(
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=[1, 4],
        retry_condition_fn=_should_retry,
    )(function)


ingest = _make_task(ingest_corpus, "ingest")
compare = _make_task(find_reason, "compare")
tokenize = _make_task(files.tokenize, "tokenize")
train = _make_task(trainer_process.train_and_report, "train")
evaluate = _make_task(run_report.evaluate_run, "evaluate")
sample = _make_task(run_report.sample_run, "sample")
plot = _make_task(run_report.plot_run, "plot")
register = _make_task(register_version, "register")
gate = _make_task(judge, "gate")


def describe_snapshot(snapshot: Snapshot) -> str:
    """Return a line like `78 documents: train 351 kB, val 31 kB, holdout 27 kB`."""
    sizes = ", ".join(f"{side} {size / 1000:,.0f} kB" for side, size in snapshot.bytes.items())
    return f"{count_documents(snapshot.documents)}: {sizes}"


def describe_reason(reason: Reason) -> str:
    """Return a line that says whether there is a reason to train, and which, or why the text looks like an accident."""
    if reason.hold is not None:
        return reason.hold
    return reason.text if reason.must_train else f"no reason to train: {reason.text}"


def describe_tokens(tokens: Tokens) -> str:
    """Return a line like `gpt2, 50,257 entries: train 104,413, val 8,990 tokens`."""
    counts = ", ".join(f"{side} {count:,}" for side, count in tokens.counts.items())
    return f"{tokens.tokenizer}, {tokens.n_vocab:,} entries: {counts} tokens"


def describe_training(ended: Result | Paused) -> str:
    """Return a line that says how far the training got."""
    if isinstance(ended, Paused):
        return f"paused after {ended.seconds:,.0f} s, at step {ended.step:,}"
    return (
        f"{ended.steps:,} steps, {ended.tokens_seen:,} tokens, best val loss {ended.best_val_loss:.3f} "
        f"at step {ended.best_step:,}"
    )


def describe_evaluation(evaluation: Path) -> str:
    """Return a line like `1.9596 bits per byte on holdout (1.0 MB of 50.3 MB, 2 percent), perplexity 88.0`."""
    reported = read_scores(evaluation).reported
    share = describe_share(reported.bytes, reported.available_bytes)
    side = f"{reported.side} ({share})" if share else reported.side
    return f"{reported.bits_per_byte:.4f} bits per byte on {side}, perplexity {reported.perplexity:,.1f}"


def describe_samples(samples: Path) -> str:
    """Return a line like `6 samples, longest verbatim copy 53 characters`."""
    written = read_samples(samples)
    copied = max((sample.longest_copied for sample in written), default=0)
    return f"{len(written)} samples, longest verbatim copy {copied} characters"


def describe_plots(plots: Path) -> str:
    """Return the directory of the plots, relative to the working directory if it is below that."""
    return str(plots.relative_to(Path.cwd()) if plots.is_relative_to(Path.cwd()) else plots)


def describe_verdict(verdict: Verdict) -> str:
    """Return a line with the verdict and its reason."""
    return f"{'promoted' if verdict.promoted else 'rejected'}: {verdict.reason}"


class _Relay(logging.Handler):
    """A handler that passes records of any thread to a flow run's logger."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logging.INFO)
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record to the flow run's logger, with the step that it is about."""
        step = getattr(record, "step", "")
        self.logger.log(record.levelno, "%s: %s", step, record.getMessage(), extra={"step": step})


@contextmanager
def relay_progress(logger: Logger) -> Iterator[None]:
    """Inside this context, log to `logger` every few seconds how far a step over a large text is."""
    relay = _Relay(logger)
    LOGGER.addHandler(relay)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(relay)

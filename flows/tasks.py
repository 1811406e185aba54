"""The steps of a retraining as Prefect tasks: a table of core functions, and which of their errors are tried again."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from flows import training
from flows.faults import is_transient
from flows.reason import weigh
from flows.releases import release
from flows.releases.gate import judge
from gptcore import corpus, data
from gptcore.judging import dossier

P = ParamSpec("P")
R = TypeVar("R")


def _is_tried_again(_task: Any, _run: Any, state: Any) -> bool:
    # The trainer's deaths are not for Prefect to count: training.py starts it again while it gets further.
    return is_transient(state.result(raise_on_failure=False))


def _step(function: Callable[P, R], name: str) -> Task[P, R]:
    # The steps are content-addressed themselves; Prefect's cache would compare paths, not what is in the files.
    return task(
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=[1, 4],
        retry_condition_fn=_is_tried_again,
    )(function)


ingest = _step(corpus.ingest, "ingest")
compare = _step(weigh, "compare")
tokenize = _step(data.tokenize, "tokenize")
train = _step(training.train_tracked, "train")
evaluate = _step(dossier.evaluate_run, "evaluate")
sample = _step(dossier.sample_run, "sample")
plot = _step(dossier.plot_run, "plot")
register = _step(release.register, "register")
gate = _step(judge, "gate")

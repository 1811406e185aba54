"""What has changed in the settings since an earlier training, as a sentence.

A training of the newest finished version is compared to find a reason to train (policy.py), and an unfinished one to
explain why it is not resumed (attempts.py).
"""

from collections.abc import Collection, Mapping
from typing import Any

from flows.config.defaults import describe_new_defaults
from flows.config.pipelines import Pipeline
from flows.tracking.runs import flatten
from gptcore.config import EXECUTION_KEYS, RunConfig
from gptcore.corpus.split import SPLIT_KEYS
from gptcore.training.resolve import find_training_version

_MAX_NAMED = 3  # changed settings that a sentence names
_READING = ("corpus.sources", "corpus.exclude", "corpus.text", "corpus.formats", "corpus.encoding")
_OTHER_SECTIONS = ("retrain.", "gate.", "evaluate.", "sample.")


def describe_changed_settings(
    pipeline: Pipeline, then: Mapping[str, Any], recorded: RunConfig | None, left_open: Collection[str] = ()
) -> str:
    """Return the settings of `pipeline` that differ from recorded ones, as in `train.seed 1 -> 2`. Empty if none does.

    `then` holds the sections that were recorded. `recorded` is the training's config.json, or None if it is unknown.
    `left_open` names the keys of `train` that are requested as `auto`, for which another value is not a change.
    """
    before, now = flatten(then), flatten(pipeline.model_dump(mode="json"))
    outside = (*_OTHER_SECTIONS, *_READING, *(f"train.{key}" for key in (*EXECUTION_KEYS, *left_open)))
    differing = [
        f"{key} {before[key]} -> {now[key]}"
        for key in now
        if key in before and before[key] != now[key] and not key.startswith(outside)
    ]
    more = f" and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
    parts = [
        ", ".join(differing[:_MAX_NAMED]) + more,
        describe_new_defaults(before, now),
        "" if recorded is None else _describe_arithmetic(recorded),
        _describe_moved_text(before, now),
    ]
    return "; ".join(filter(None, parts))


def _describe_arithmetic(recorded: RunConfig) -> str:
    then, now = recorded.training_version, find_training_version(recorded.train, recorded.start is not None)
    return "" if then == now else f"this release trains it with other arithmetic (training version {then} -> {now})"


def _describe_moved_text(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    keys = [f"corpus.{key}" for key in SPLIT_KEYS]
    if all(before[key] == now[key] for key in keys if key in before):
        return ""
    return "this moves text between train, val and holdout, so the gate scores less text that neither has learned"

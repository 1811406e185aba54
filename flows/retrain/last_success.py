"""Each pipeline's last success, and whether it is longer ago than the pipeline's schedule allows.

    successes/<pipeline>.json   {"at": "2026-03-01T02:31:07+00:00", "how": "skipped", "flow_run": "..."}

A run has succeeded if it promoted, kept the champion, paused, or had nothing to do. A run that was skipped because
another run holds the pipeline's lock has not: that other run may hang. Each pipeline has one small file, so reading it
needs neither Prefect nor MLflow.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path

from flows.config.pipelines import Pipeline
from flows.config.schedule import ScheduleConfig, iterate_due_times
from flows.state.root import StateRoot
from gptcore.errors import SourceUnavailable
from gptcore.manifest import write_atomically
from gptcore.records import parse_record, read_bytes

AWAITED = "Awaited"
"""Not a success: the pipeline has been served since then, and has yet to succeed."""
_LEAST_PATIENCE = timedelta(hours=1)
"""Shortest time without a success that is overdue. A run may take longer than the minutes between two due times."""
_PATIENCE_IN_DUE_TIMES = 2
_NAMES = {timedelta(hours=1): "hourly", timedelta(days=1): "daily", timedelta(weeks=1): "weekly"}


@dataclass(frozen=True)
class Success:
    """The end of a run that did not fail."""

    at: datetime
    how: str
    """The verdict, such as skipped, or AWAITED. Earlier releases wrote the name of a state, such as Skipped."""
    flow_run: str = ""


def record(root: StateRoot, pipeline: str, how: str, flow_run: str = "") -> None:
    """Record that a run of the pipeline has just succeeded. `how` is its verdict, such as skipped."""
    path = _path(root, pipeline)
    path.parent.mkdir(exist_ok=True)
    success = Success(datetime.now(UTC), how, flow_run)
    text = json.dumps({**asdict(success), "at": success.at.isoformat(timespec="seconds")}) + "\n"
    write_atomically(path, text)
    if (store := root.store) is not None:
        with suppress(SourceUnavailable):  # the next success will be stored
            store.put(_store_key(pipeline), text.encode())


def expect(root: StateRoot, pipelines: Iterable[Pipeline]) -> None:
    """Record AWAITED for every scheduled pipeline without a record. Call it when pipelines begin to be served."""
    for pipeline in pipelines:
        if pipeline.schedule is not None and read_last(root, pipeline.name) is None:
            record(root, pipeline.name, AWAITED)


def read_last(root: StateRoot, pipeline: str) -> Success | None:
    """Return the pipeline's newest record of any machine. None if there is no record, or if a power cut damaged it."""
    records = []
    with suppress(FileNotFoundError):
        records.append(_parse(read_bytes(_path(root, pipeline))))
    if (store := root.store) is not None and (stored := store.read(_store_key(pipeline))) is not None:
        records.append(_parse(stored.body))
    return max(filter(None, records), key=lambda success: success.at, default=None)


def measure_overdue(pipeline: Pipeline, root: StateRoot, now: datetime) -> timedelta | None:
    """Return how long the pipeline has had no success, None if it is not overdue. `now` must have a time zone.

    A pipeline is overdue from the second due time after its last success, because the run of the first one may still
    be running, but never within an hour. A pipeline without an active schedule, or that was never served, is not
    overdue. Neither is a pipeline whose record is in the future because a clock was set back.
    """
    schedule, before = pipeline.schedule, read_last(root, pipeline.name)
    if schedule is None or schedule.paused or before is None:
        return None
    since = now - before.at
    return since if since >= _LEAST_PATIENCE and now >= _compute_deadline(schedule, before.at) else None


def describe_overdue(pipeline: Pipeline, root: StateRoot, now: datetime) -> str | None:
    """Return a text like `no success for 3 days 4 h, scheduled daily`. None if the pipeline is not overdue."""
    since = measure_overdue(pipeline, root, now)
    if since is None or pipeline.schedule is None:
        return None
    return f"no success for {format_duration(since)}, scheduled {_describe_schedule(pipeline.schedule, now)}"


def format_duration(duration: timedelta) -> str:
    """Return a duration in its two largest units: `3 days 4 h`, `2 h 5 min`, `40 s`."""
    seconds = int(duration.total_seconds())
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    parts = [f"{days} day{'s' if days > 1 else ''}" if days else "", f"{hours} h" if hours else ""]
    parts.append(f"{minutes} min" if minutes and not days else "")
    return " ".join(filter(None, parts)) or f"{seconds} s"


def _compute_deadline(schedule: ScheduleConfig, after: datetime) -> datetime:
    """Return the due time by which the next success is expected. The end of time if no due time follows."""
    due = iterate_due_times(schedule, after)
    times = [next(due, None) for _ in range(_PATIENCE_IN_DUE_TIMES)]
    return times[-1] or datetime.max.replace(tzinfo=UTC)


def _describe_schedule(schedule: ScheduleConfig, now: datetime) -> str:
    """Return `daily`, `every 2 h`, or the cron expression if its times are not evenly spaced."""
    times = list(islice(iterate_due_times(schedule, now), 8))
    gaps = {later - earlier for earlier, later in pairwise(times)}
    if len(gaps) != 1:
        return f"by cron {schedule.cron!r}"
    (gap,) = gaps
    return _NAMES.get(gap) or f"every {format_duration(gap)}"


def _parse(text: bytes) -> Success | None:
    """Return the record, or None if the text is damaged."""
    with suppress(OverflowError):  # the first and the last day that Python knows have no time in some time zones
        if (success := parse_record(text, Success)) is not None:
            return replace(success, at=success.at.astimezone(UTC))
    return None


def _store_key(pipeline: str) -> str:
    """Return the key of the pipeline's record in the object store, which all machines share."""
    return f"successes/{pipeline}.json"


def _path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "successes" / f"{pipeline}.json"

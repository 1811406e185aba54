"""When each pipeline last succeeded, and whether it has gone without a success for longer than its schedule allows.

    successes/<pipeline>.json   {"at": "2026-03-01T02:31:07+00:00", "how": "Skipped", "flow_run": "..."}

A run that promoted, kept the champion, paused or had nothing to do has succeeded; one that found the pipeline's lock
taken has not: whoever holds it may hang. One small file per pipeline, so asking needs neither Prefect nor MLflow.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path

from flows.pipelines import Pipeline
from flows.service.schedule import ScheduleConfig, due_times
from flows.state import StateRoot
from gptcore.errors import SourceUnavailable

AWAITED = "Awaited"
"""Not a success: since then one is waited for."""
_LEAST_PATIENCE = timedelta(hours=1)
"""A run may well take longer than the minutes between two due times."""
_PATIENCE_IN_DUE_TIMES = 2
_NAMES = {timedelta(hours=1): "hourly", timedelta(days=1): "daily", timedelta(weeks=1): "weekly"}


@dataclass(frozen=True)
class Success:
    """The end of a run that did not fail."""

    at: datetime
    how: str
    """Name of the flow run's state, or AWAITED."""
    flow_run: str = ""


def record(root: StateRoot, pipeline: str, how: str, flow_run: str = "") -> None:
    """Notes that a run of the pipeline has succeeded just now. `how` is the name of its state, such as Skipped."""
    path = _path(root, pipeline)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    success = Success(datetime.now(UTC), how, flow_run)
    text = json.dumps({**asdict(success), "at": success.at.isoformat(timespec="seconds")}) + "\n"
    temporary.write_text(text)
    temporary.replace(path)
    if (store := root.store) is not None:
        with suppress(SourceUnavailable):  # the next success will be there
            store.put(_mirrored(pipeline), text.encode())


def expect(root: StateRoot, pipelines: Iterable[Pipeline]) -> None:
    """Counts from now on for every scheduled pipeline that has no record yet. For whoever begins to serve them."""
    for pipeline in pipelines:
        if pipeline.schedule is not None and last(root, pipeline.name) is None:
            record(root, pipeline.name, AWAITED)


def last(root: StateRoot, pipeline: str) -> Success | None:
    """The pipeline's newest record, on whichever machine; None where there is none, or a power cut left half of one."""
    found = []
    with suppress(FileNotFoundError):
        found.append(_parsed(_path(root, pipeline).read_bytes()))
    if (store := root.store) is not None and (there := store.read(_mirrored(pipeline))) is not None:
        found.append(_parsed(there.body))
    return max(filter(None, found), key=lambda success: success.at, default=None)


def overdue(pipeline: Pipeline, root: StateRoot, now: datetime) -> timedelta | None:
    """How long the pipeline has had no success, if that is longer than it should be; else None.

    It should be no longer than until the second due time after the last success (the first one's run may still be at
    work), and never less than an hour. `now` must be aware of its time zone. A pipeline without an active schedule, or
    that nobody has served yet, is never overdue; neither is one whose record lies in the future of a clock set back.
    """
    schedule, before = pipeline.schedule, last(root, pipeline.name)
    if schedule is None or schedule.paused or before is None:
        return None
    since = now - before.at
    return since if since >= _LEAST_PATIENCE and now >= _deadline(schedule, before.at) else None


def complaint(pipeline: Pipeline, root: StateRoot, now: datetime) -> str | None:
    """`no success for 3 days 4 h, scheduled daily`, if the pipeline is overdue."""
    since = overdue(pipeline, root, now)
    if since is None or pipeline.schedule is None:
        return None
    return f"no success for {in_words(since)}, scheduled {_how_often(pipeline.schedule, now)}"


def in_words(duration: timedelta) -> str:
    """`3 days 4 h`, `2 h 5 min`, `40 s`: the two largest units."""
    seconds = int(duration.total_seconds())
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    parts = [f"{days} day{'s' if days > 1 else ''}" if days else "", f"{hours} h" if hours else ""]
    parts.append(f"{minutes} min" if minutes and not days else "")
    return " ".join(filter(None, parts)) or f"{seconds} s"


def _deadline(schedule: ScheduleConfig, after: datetime) -> datetime:
    """The due time by which there should be another success; the end of time where nothing is due any more."""
    due = due_times(schedule, after)
    times = [next(due, None) for _ in range(_PATIENCE_IN_DUE_TIMES)]
    return times[-1] or datetime.max.replace(tzinfo=UTC)


def _how_often(schedule: ScheduleConfig, now: datetime) -> str:
    """`daily`, `every 2 h`; the cron expression where its times are not evenly spaced."""
    times = list(islice(due_times(schedule, now), 8))
    gaps = {later - earlier for earlier, later in pairwise(times)}
    if len(gaps) != 1:
        return f"by cron {schedule.cron!r}"
    (gap,) = gaps
    return _NAMES.get(gap) or f"every {in_words(gap)}"


def _parsed(text: bytes) -> Success | None:
    with suppress(ValueError, TypeError, KeyError):
        body = json.loads(text)
        at = datetime.fromisoformat(body.pop("at")).astimezone(UTC)
        return Success(at, **body)
    return None


def _mirrored(pipeline: str) -> str:
    """Where the record of whichever machine was last lies in the object store."""
    return f"successes/{pipeline}.json"


def _path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "successes" / f"{pipeline}.json"

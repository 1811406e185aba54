"""When a pipeline runs by itself: the key `schedule` of pipelines.yaml.

Schedules are checked and evaluated here without importing Prefect. Prefect starts the runs; last_success.py uses the
same due times to find overdue pipelines.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Annotated, Self
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from gptcore.sections import Section

_CRONITER = "flows._croniter"
"""The name under which croniter is imported on its own."""


class ScheduleConfig(Section):
    """When a pipeline runs by itself: at the times of a cron expression, or at a fixed interval."""

    cron: str | None = None
    """Minute, hour, day of the month, month and day of the week. Example: `30 2 * * *` is every night at 2:30."""
    interval: Annotated[int, Field(ge=1, le=366 * 86_400)] | None = None
    """Seconds between two runs, counted from midnight of 1 January 2020 in the time zone."""
    timezone: str = "UTC"
    """IANA name of the time zone of the times, such as Europe/Berlin. Daylight saving time is respected."""
    paused: bool = False
    """Keep the schedule, but let it start no run."""

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str | None) -> str | None:
        if cron is None:
            return None
        is_valid = _import_croniter().croniter.is_valid(cron)
        # Prefect refuses croniter's own extensions R and H.
        if not is_valid or len(cron.split()) != 5 or {"r", "h"} & set(cron.casefold().split()):
            raise ValueError(
                f"{cron!r:.80} is not a cron expression: give minute (0-59), hour (0-23), day of the month (1-31), "
                "month (1-12) and day of the week (0-6), as in '30 2 * * *'"
            )
        return cron

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (OSError, ValueError, KeyError):
            message = f"there is no time zone {timezone!r:.80}; give an IANA name such as Europe/Berlin"
            raise ValueError(message) from None
        return timezone

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Self:
        if (self.cron is None) == (self.interval is None):
            given = "neither" if self.cron is None else f"cron {self.cron!r:.80} and interval {self.interval}"
            raise ValueError(f"give one of cron and interval (given: {given})")
        return self


def iterate_due_times(schedule: ScheduleConfig, after: datetime) -> Iterator[datetime]:
    """Yield, without end and in UTC, the times after `after` at which the schedule starts a run.

    `after` must have a time zone. A paused schedule yields the same times. A cron expression that fits no day, such as
    30 February, yields none.
    """
    after, zone = after.astimezone(UTC), ZoneInfo(schedule.timezone)
    if schedule.interval is not None:
        anchor, step = interval_anchor(schedule).astimezone(UTC), timedelta(seconds=schedule.interval)
        due = anchor + (after - anchor) // step * step
        while True:
            due += step
            yield due
    croniter = _import_croniter()
    # The times have no time zone here: croniter is an hour off in a night that has 23 hours.
    times = croniter.croniter(schedule.cron, after.astimezone(zone).replace(tzinfo=None))
    with suppress(croniter.CroniterBadDateError):
        while True:
            due = times.get_next(datetime).replace(tzinfo=zone).astimezone(UTC)
            if due > after:
                yield due


def interval_anchor(schedule: ScheduleConfig) -> datetime:
    """Return the time from which an interval is counted."""
    return datetime(2020, 1, 1, tzinfo=ZoneInfo(schedule.timezone))


def _import_croniter() -> ModuleType:
    """Import the cron parser that Prefect contains and schedules with. Importing all of Prefect would take seconds."""
    if _CRONITER not in sys.modules:
        prefect = importlib.util.find_spec("prefect")
        assert prefect is not None and prefect.origin is not None, "Prefect is a dependency"
        package = Path(prefect.origin).parent / "_vendor" / "croniter"
        spec = importlib.util.spec_from_file_location(
            _CRONITER, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[_CRONITER] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_CRONITER]

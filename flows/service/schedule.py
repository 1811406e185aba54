"""When a pipeline runs by itself: the key `schedule` of pipelines.yaml, checked without importing Prefect."""

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

_WITHOUT_PREFECT = "flows._croniter"


class ScheduleConfig(Section):
    """When a pipeline runs by itself: at the times of a cron expression, or every so many seconds."""

    cron: str | None = None
    """Minute, hour, day of the month, month and day of the week, as in `30 2 * * *`: every night at half past two."""
    interval: Annotated[int, Field(ge=1, le=366 * 86_400)] | None = None
    """Seconds between two runs, counted from midnight of 1 January 2020 in the time zone."""
    timezone: str = "UTC"
    """IANA name of the time zone that the times are meant in, as in Europe/Berlin. Summer time is respected."""
    paused: bool = False
    """Keep the schedule, but start nothing by it."""

    @field_validator("cron")
    @classmethod
    def _cron_is_an_expression(cls, given: str | None) -> str | None:
        if given is None:
            return None
        is_valid = _croniter().croniter.is_valid(given)
        # Prefect refuses croniter's own extensions R and H.
        if not is_valid or len(given.split()) != 5 or {"r", "h"} & set(given.casefold().split()):
            raise ValueError(
                f"{given!r:.80} is no cron expression: give minute (0-59), hour (0-23), day of the month (1-31), "
                "month (1-12) and day of the week (0-6), as in '30 2 * * *'"
            )
        return given

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, given: str) -> str:
        try:
            ZoneInfo(given)
        except (OSError, ValueError, KeyError):
            raise ValueError(f"there is no time zone {given!r:.80}; give an IANA name such as Europe/Berlin") from None
        return given

    @model_validator(mode="after")
    def _one_of_cron_and_interval(self) -> Self:
        if (self.cron is None) == (self.interval is None):
            given = "neither" if self.cron is None else f"cron {self.cron!r:.80} and interval {self.interval}"
            raise ValueError(f"give one of cron and interval (given: {given})")
        return self


def due_times(schedule: ScheduleConfig, after: datetime) -> Iterator[datetime]:
    """The times in UTC after `after` (aware of its time zone) at which the schedule starts a run, for ever.

    Whether it is paused does not count. A cron expression that no day fits, such as 30 February, has none.
    """
    after, zone = after.astimezone(UTC), ZoneInfo(schedule.timezone)
    if schedule.interval is not None:
        anchor, step = interval_anchor(schedule).astimezone(UTC), timedelta(seconds=schedule.interval)
        due = anchor + (after - anchor) // step * step
        while True:
            due += step
            yield due
    croniter = _croniter()
    # Without a time zone: croniter is an hour off where a night has 23 hours.
    times = croniter.croniter(schedule.cron, after.astimezone(zone).replace(tzinfo=None))
    with suppress(croniter.CroniterBadDateError):
        while True:
            due = times.get_next(datetime).replace(tzinfo=zone).astimezone(UTC)
            if due > after:
                yield due


def interval_anchor(schedule: ScheduleConfig) -> datetime:
    """From when an interval is counted."""
    return datetime(2020, 1, 1, tzinfo=ZoneInfo(schedule.timezone))


def _croniter() -> ModuleType:
    """The cron parser that Prefect carries and schedules with. Importing all of Prefect for it would take seconds."""
    if _WITHOUT_PREFECT not in sys.modules:
        prefect = importlib.util.find_spec("prefect")
        assert prefect is not None and prefect.origin is not None, "Prefect is a dependency"
        package = Path(prefect.origin).parent / "_vendor" / "croniter"
        spec = importlib.util.spec_from_file_location(
            _WITHOUT_PREFECT, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[_WITHOUT_PREFECT] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_WITHOUT_PREFECT]

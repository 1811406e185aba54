"""How long a pipeline has had no success, against its schedule."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.pipelines import Pipeline
from flows.service import successes
from flows.service.schedule import ScheduleConfig
from flows.state import StateRoot

MONDAY = datetime(2026, 3, 2, 2, 40, tzinfo=UTC)


def scheduled(**schedule: object) -> Pipeline:
    return Pipeline(name="night", model_name="gpt-night", schedule=ScheduleConfig(**schedule))


@pytest.fixture
def root(tmp_path: Path) -> StateRoot:
    return StateRoot(tmp_path)


def succeeded(root: StateRoot, at: datetime) -> None:
    successes.record(root, "night", "Skipped", "an-id")
    path = root.path / "successes" / "night.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "at": at.isoformat()}))


def test_a_success_is_remembered_with_how_and_by_which_run(root: StateRoot) -> None:
    assert successes.last(root, "night") is None
    successes.record(root, "night", "Promoted", "first")
    successes.record(root, "night", "Skipped", "second")
    found = successes.last(root, "night")
    assert found is not None and (found.how, found.flow_run) == ("Skipped", "second")
    assert abs(datetime.now(UTC) - found.at) < timedelta(minutes=1)
    assert [path.name for path in (root.path / "successes").iterdir()] == ["night.json"]
    (root.path / "successes" / "night.json").write_text('{"at": "20')
    assert successes.last(root, "night") is None


@pytest.mark.parametrize(
    ("schedule", "last_fine", "first_overdue"),
    [
        ({"cron": "30 2 * * *"}, timedelta(hours=47, minutes=49), timedelta(hours=47, minutes=50)),
        ({"cron": "30 2 * * mon"}, timedelta(days=13, hours=23), timedelta(days=14)),
        ({"cron": "* * * * *"}, timedelta(minutes=59), timedelta(hours=1)),
        ({"interval": 86_400}, timedelta(hours=45, minutes=19), timedelta(hours=45, minutes=20)),
        ({"interval": 86_400, "timezone": "Europe/Berlin"}, timedelta(hours=44), timedelta(hours=44, minutes=20)),
        ({"interval": 5}, timedelta(minutes=59), timedelta(hours=1)),
    ],
)
def test_a_pipeline_is_overdue_when_two_due_times_have_passed_and_an_hour(
    root: StateRoot, schedule: dict[str, object], last_fine: timedelta, first_overdue: timedelta
) -> None:
    succeeded(root, MONDAY)
    pipeline = scheduled(**schedule)
    assert successes.overdue(pipeline, root, MONDAY + last_fine) is None
    assert successes.overdue(pipeline, root, MONDAY + first_overdue) == first_overdue


def test_summer_time_is_respected(root: StateRoot) -> None:
    saturday = datetime(2026, 3, 28, 2, tzinfo=UTC)  # the night of 29 March has 23 hours in Berlin
    succeeded(root, saturday)
    pipeline = scheduled(cron="30 4 * * *", timezone="Europe/Berlin")
    assert successes.overdue(pipeline, root, saturday + timedelta(hours=24, minutes=20)) is None
    assert successes.overdue(pipeline, root, saturday + timedelta(hours=24, minutes=30)) is not None


def test_what_is_paused_unscheduled_impossible_or_never_served_is_not_overdue(root: StateRoot) -> None:
    much_later = MONDAY + timedelta(days=400)
    daily = scheduled(cron="30 2 * * *")
    assert successes.overdue(daily, root, much_later) is None
    succeeded(root, MONDAY)
    assert successes.overdue(daily, root, much_later) == timedelta(days=400)
    assert successes.overdue(scheduled(cron="30 2 * * *", paused=True), root, much_later) is None
    assert successes.overdue(scheduled(cron="30 2 30 2 *"), root, much_later) is None
    assert successes.overdue(Pipeline(name="night", model_name="gpt-night"), root, much_later) is None


def test_whoever_serves_a_pipeline_that_never_ran_begins_to_wait_for_it_once(root: StateRoot) -> None:
    daily, by_hand = scheduled(cron="30 2 * * *"), Pipeline(name="hand", model_name="gpt-hand")
    successes.expect(root, [daily, by_hand])
    found = successes.last(root, "night")
    assert found is not None and found.how == successes.AWAITED
    assert successes.last(root, "hand") is None
    succeeded(root, MONDAY)
    successes.expect(root, [daily])
    assert successes.last(root, "night") == successes.Success(MONDAY, "Skipped", "an-id")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"cron": "30 2 * * *"}, "no success for 15 days 4 h, scheduled daily"),
        ({"cron": "0 5 * * sun"}, "no success for 15 days 4 h, scheduled weekly"),
        ({"interval": 7200}, "no success for 15 days 4 h, scheduled every 2 h"),
        ({"cron": "0 5 1,5 * *"}, "no success for 15 days 4 h, scheduled by cron '0 5 1,5 * *'"),
    ],
)
def test_the_complaint_says_how_long_and_how_often(root: StateRoot, schedule: dict[str, object], words: str) -> None:
    succeeded(root, MONDAY - timedelta(days=7))
    now = MONDAY + timedelta(days=8, hours=4)
    assert successes.complaint(scheduled(**schedule), root, now) == words
    succeeded(root, now)
    assert successes.complaint(scheduled(**schedule), root, now) is None


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        (timedelta(days=3, hours=4, minutes=9), "3 days 4 h"),
        (timedelta(days=1), "1 day"),
        (timedelta(hours=2, minutes=5), "2 h 5 min"),
        (timedelta(minutes=61, seconds=3), "1 h 1 min"),
        (timedelta(seconds=40), "40 s"),
    ],
)
def test_durations_are_said_in_their_two_largest_units(duration: timedelta, words: str) -> None:
    assert successes.in_words(duration) == words

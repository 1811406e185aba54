"""How long a pipeline has had no success, compared with its schedule."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.config.pipelines import Pipeline
from flows.config.schedule import ScheduleConfig
from flows.retrain import last_success
from flows.state.root import StateRoot

MONDAY = datetime(2026, 3, 2, 2, 40, tzinfo=UTC)


def scheduled(**schedule: object) -> Pipeline:
    return Pipeline(name="night", model_name="gpt-night", schedule=ScheduleConfig(**schedule))


@pytest.fixture
def root(tmp_path: Path) -> StateRoot:
    return StateRoot(tmp_path)


def succeeded(root: StateRoot, at: datetime) -> None:
    last_success.record(root, "night", "Skipped", "an-id")
    path = root.path / "successes" / "night.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "at": at.isoformat()}))


def test_the_last_success_is_recorded_with_its_state_and_its_flow_run(root: StateRoot) -> None:
    assert last_success.read_last(root, "night") is None
    last_success.record(root, "night", "Promoted", "first")
    last_success.record(root, "night", "Skipped", "second")
    found = last_success.read_last(root, "night")
    assert found is not None and (found.how, found.flow_run) == ("Skipped", "second")
    assert abs(datetime.now(UTC) - found.at) < timedelta(minutes=1)
    assert [path.name for path in (root.path / "successes").iterdir()] == ["night.json"]
    (root.path / "successes" / "night.json").write_text('{"at": "20')
    assert last_success.read_last(root, "night") is None


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
def test_a_pipeline_is_overdue_after_two_due_times_but_never_within_an_hour(
    root: StateRoot, schedule: dict[str, object], last_fine: timedelta, first_overdue: timedelta
) -> None:
    succeeded(root, MONDAY)
    pipeline = scheduled(**schedule)
    assert last_success.measure_overdue(pipeline, root, MONDAY + last_fine) is None
    assert last_success.measure_overdue(pipeline, root, MONDAY + first_overdue) == first_overdue


def test_summer_time_is_respected(root: StateRoot) -> None:
    saturday = datetime(2026, 3, 28, 2, tzinfo=UTC)  # the night of 29 March has 23 hours in Berlin
    succeeded(root, saturday)
    pipeline = scheduled(cron="30 4 * * *", timezone="Europe/Berlin")
    assert last_success.measure_overdue(pipeline, root, saturday + timedelta(hours=24, minutes=20)) is None
    assert last_success.measure_overdue(pipeline, root, saturday + timedelta(hours=24, minutes=30)) is not None


def test_a_pipeline_that_is_paused_unscheduled_never_due_or_never_served_is_not_overdue(root: StateRoot) -> None:
    much_later = MONDAY + timedelta(days=400)
    daily = scheduled(cron="30 2 * * *")
    assert last_success.measure_overdue(daily, root, much_later) is None
    succeeded(root, MONDAY)
    assert last_success.measure_overdue(daily, root, much_later) == timedelta(days=400)
    assert last_success.measure_overdue(scheduled(cron="30 2 * * *", paused=True), root, much_later) is None
    assert last_success.measure_overdue(scheduled(cron="30 2 30 2 *"), root, much_later) is None
    assert last_success.measure_overdue(Pipeline(name="night", model_name="gpt-night"), root, much_later) is None


def test_serving_a_scheduled_pipeline_that_never_ran_starts_its_wait_for_a_success_only_once(root: StateRoot) -> None:
    daily, by_hand = scheduled(cron="30 2 * * *"), Pipeline(name="hand", model_name="gpt-hand")
    last_success.expect(root, [daily, by_hand])
    found = last_success.read_last(root, "night")
    assert found is not None and found.how == last_success.AWAITED
    assert last_success.read_last(root, "hand") is None
    succeeded(root, MONDAY)
    last_success.expect(root, [daily])
    assert last_success.read_last(root, "night") == last_success.Success(MONDAY, "Skipped", "an-id")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"cron": "30 2 * * *"}, "no success for 15 days 4 h, scheduled daily"),
        ({"cron": "0 5 * * sun"}, "no success for 15 days 4 h, scheduled weekly"),
        ({"interval": 7200}, "no success for 15 days 4 h, scheduled every 2 h"),
        ({"cron": "0 5 1,5 * *"}, "no success for 15 days 4 h, scheduled by cron '0 5 1,5 * *'"),
    ],
)
def test_the_overdue_message_names_the_time_without_success_and_the_schedule(
    root: StateRoot, schedule: dict[str, object], words: str
) -> None:
    succeeded(root, MONDAY - timedelta(days=7))
    now = MONDAY + timedelta(days=8, hours=4)
    assert last_success.describe_overdue(scheduled(**schedule), root, now) == words
    succeeded(root, now)
    assert last_success.describe_overdue(scheduled(**schedule), root, now) is None


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
def test_durations_are_written_in_their_two_largest_units(duration: timedelta, words: str) -> None:
    assert last_success.format_duration(duration) == words

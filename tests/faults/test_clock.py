"""A clock that goes backwards: numbers and steps decide what is newer, never the time of day."""

import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from flows.config.pipelines import Pipeline
from flows.config.schedule import ScheduleConfig
from flows.operations.retention import prune
from flows.registry import champion
from flows.registry import versions as registry
from flows.registry.champion import GATE, promote, read_moves, rollback
from flows.retrain import last_success
from flows.state.root import StateRoot
from flows.tracking import reconcile
from gptcore import manifest

MODEL = "gpt-tiny"
DAY = 86_400


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that shows one hour less at each reading."""
    looks = iter(range(10**6))

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600.0 * next(looks))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    monkeypatch.setattr(champion, "datetime", Backwards)


def promoted(tiny_registry: Any, count: int) -> StateRoot:
    for version in range(1, count + 1):
        tiny_registry.register(corpus=f"night {version}")
        promote(tiny_registry.root, MODEL, str(version), "better", GATE, over=str(version - 1) if version > 1 else None)
    return tiny_registry.root


@pytest.mark.usefixtures("backwards")
def test_versions_promotions_and_rollbacks_are_ordered_by_their_numbers(tiny_registry: Any, tiny: Pipeline) -> None:
    root = promoted(tiny_registry, 4)
    versions = registry.list_versions(root, MODEL)
    assert [str(version.version) for version in versions] == ["1", "2", "3", "4"]
    created = [version.creation_timestamp for version in versions]
    assert created == sorted(created, reverse=True), "the clock has gone backwards"
    dates = [move.at for move in read_moves(root, MODEL)]
    assert dates == sorted(dates, reverse=True)
    client = MlflowClient(root.tracking_uri)
    for version in "123":
        client.set_model_version_tag(MODEL, version, "pipeline", "tiny")
    newest = registry.find_newest_finished(root, tiny)
    assert newest is not None and str(newest.version) == "3"
    for _ in range(2):  # two versions of one run key
        client.create_model_version(MODEL, versions[0].source, tags={"run_key": "again", "attempt": "1"})
    again = registry.find_by_run_key(root, MODEL, "again")
    assert again is not None and str(again.version) == "6"
    assert [rollback(root, MODEL, "x", "ann").target for _ in range(2)] == ["3", "2"]


@pytest.mark.usefixtures("backwards")
def test_retention_keeps_the_versions_with_the_highest_numbers(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 1)
    for _ in range(4):
        tiny_registry.register()
    prune(root, {MODEL: 2})
    assert [str(version.version) for version in registry.list_versions(root, MODEL)] == ["1", "4", "5"]


def test_the_newest_point_of_a_metric_is_the_one_with_the_highest_step(tiny_registry: Any) -> None:
    client = MlflowClient(tiny_registry.root.tracking_uri)
    run = client.create_run(tiny_registry.experiment).info.run_id
    client.log_batch(run, metrics=[Metric("loss", 1.0, 10_000 * DAY, 1), Metric("loss", 2.0, 9_000 * DAY, 2)])
    client.log_batch(run, metrics=[Metric("loss", 3.0, 8_000 * DAY, 3)])
    assert client.get_run(run).data.metrics["loss"] == 3.0


def test_an_unfinished_directory_dated_in_the_future_is_kept_until_it_is_old(tiny_registry: Any) -> None:
    root = tiny_registry.root
    root.corpora.mkdir(exist_ok=True)
    half = root.corpora / ".tmp-half"
    half.mkdir()
    os.utime(half, (time.time() + 30 * DAY, time.time() + 30 * DAY))
    manifest.sweep(root.corpora)
    assert half.exists()
    os.utime(half, (time.time() - 2 * DAY, time.time() - 2 * DAY))
    manifest.sweep(root.corpora)
    assert not half.exists()


def test_a_run_that_began_in_the_future_is_waited_for_only_as_long_as_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class State:
        timestamp = datetime.now(UTC) + timedelta(days=30)

    class Run:
        state = State()

    slept: list[float] = []
    monkeypatch.setattr(reconcile.time, "sleep", slept.append)
    reconcile._wait_for_start(Run())  # type: ignore[arg-type]
    assert slept == [5.0]


def test_a_success_in_the_future_raises_no_alarm_and_the_next_success_counts_again(root: StateRoot) -> None:
    daily = Pipeline(name="night", model_name="gpt-night", schedule=ScheduleConfig(cron="30 2 * * *"))
    last_success.record(root, "night", "promoted")
    now = datetime.now(UTC) - timedelta(days=3650)
    assert last_success.measure_overdue(daily, root, now) is None
    last_success.record(root, "night", "promoted")
    assert last_success.measure_overdue(daily, root, datetime.now(UTC) + timedelta(days=3)) is not None

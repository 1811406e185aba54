"""MLflow unreachable while a model trains: no metric is lost or logged twice."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as database

from flows.state.root import StateRoot
from flows.tracking.metrics import MetricsFollower, MetricsLog


@pytest.fixture
def run_id(tiny_registry: object, root: StateRoot) -> str:
    client = MlflowClient(root.tracking_uri)
    return str(client.create_run(client.create_experiment("metrics")).info.run_id)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, "the condition is not true after a minute"
        time.sleep(0.05)


def write_lines(path: Path, first: int, last: int) -> None:
    with path.open("a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "loss": 5 - step / 100, "learning_rate": 0.1, "time_ms": 1_000_000 + step}
            file.write(json.dumps(line | ({"val_loss": 4.0} if step % 10 == 0 else {})) + "\n")


def points(root: StateRoot, run_id: str, key: str) -> list[tuple[int, int]]:
    """Return (step, timestamp) in the order in which MLflow received them."""
    found = MlflowClient(root.tracking_uri).get_metric_history(run_id, key)
    return [(metric.step, metric.timestamp) for metric in found]


def expected(last: int) -> list[tuple[int, int]]:
    return [(step, 1_000_000 + step) for step in range(1, last + 1)]


@contextmanager
def locked(root: StateRoot) -> Iterator[None]:
    """Lock MLflow's database against all other writers inside the context."""
    connection = sqlite3.connect(root.path / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout of 50 ms instead of 20 s for a locked database, so that MLflow gives up often."""
    real = database.sql.text
    monkeypatch.setattr(database, "sql", SimpleNamespace(text=lambda said: real(said.replace("20000", "50"))))


@pytest.mark.slow
def test_metrics_written_while_the_database_was_locked_arrive_once_in_order_and_with_their_own_times(
    root: StateRoot, run_id: str, tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 1, 50)
    log = MetricsLog(root, run_id, path)
    with MetricsFollower(log):
        wait_until(lambda: log.last_step == 50)
        with locked(root):
            write_lines(path, 51, 400)
            wait_until(lambda: "does not take" in caplog.text)
            assert log.last_step == 50
        write_lines(path, 401, 450)
    assert points(root, run_id, "loss") == expected(450)
    assert points(root, run_id, "val_loss") == expected(450)[9::10]


def test_metrics_missing_after_a_partial_failure_are_sent_by_the_next_log(
    root: StateRoot, run_id: str, tmp_path: Path, impatient: None
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 1, 300)
    log = MetricsLog(root, run_id, path)
    taken = log.client.log_batch
    requests: list[int] = []

    def fails_at_the_second(run: str, metrics: list[Metric]) -> None:
        requests.append(len(metrics))
        if len(requests) == 2:
            with locked(root):
                taken(run, metrics=metrics)
        taken(run, metrics=metrics)

    log.client.log_batch = fails_at_the_second  # type: ignore[method-assign]
    with pytest.raises(MlflowException, match="locked"):
        log.send()
    assert 0 < len(points(root, run_id, "loss")) < 300
    MetricsLog(root, run_id, path).send()
    log.send()
    assert points(root, run_id, "loss") == expected(300)
    assert points(root, run_id, "val_loss") == expected(300)[9::10]


def test_a_resumed_training_that_writes_some_steps_again_logs_no_point_twice(
    root: StateRoot, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, 1, 120)
    log = MetricsLog(root, run_id, path)
    log.send()
    kept = path.read_text().splitlines(keepends=True)[:80]
    path.with_name("new").write_text("".join(kept))
    path.with_name("new").replace(path)
    write_lines(path, 81, 200)
    log.send()
    assert points(root, run_id, "loss") == expected(200)

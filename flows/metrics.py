"""A training's metrics on their way to MLflow: every update once, in order, with its own time.

metrics.jsonl is the buffer. Whatever MLflow does not take, because its database is locked or its server is down, is
read again from there later: by the same run, or by the next one that works on the training.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from flows.state import StateRoot
from gptcore.learning.rundir import Metrics, MetricsReader

LOGGED = (
    "loss",
    "train_loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens_seen",
    "tokens_per_second",
    "memory_mb",
)
"""What of a line of metrics.jsonl becomes an MLflow metric."""
_LINES = 1000 // len(LOGGED)
"""Lines in a request: MLflow takes 1,000 metrics. Whole lines, so that an update is there with all it has, or not."""
_PIECE_BYTES = 1024 * 1024
_POLL_SECONDS = 5.0
"""Between two requests: each costs something of itself, however few points are in it, and the training pays."""
_LONGEST_PAUSE_SECONDS = 30.0
_END_SECONDS = 10.0
_HURRIED_END_SECONDS = 3.0
_NOT_TAKEN = (MlflowException, OperationalError)  # the latter from MLflow's rollback where the connection is gone
_log = logging.getLogger(__name__)


class MetricsLog:
    """Brings lines of metrics.jsonl to a run, each update once, however often the file is read."""

    def __init__(self, root: StateRoot, run_id: str, metrics: Path) -> None:
        self.client = MlflowClient(root.tracking_uri)
        self.run_id, self.metrics = run_id, metrics
        self.reader = MetricsReader(metrics)
        self.last_step: int | None = None
        """The newest update that MLflow has. None while it has not been asked."""

    def send(self) -> None:
        """Sends all that is new in the file. Raises MlflowException, and goes on from there when it is called again."""
        try:
            if self.last_step is None:
                history = self.client.get_metric_history(self.run_id, "loss")
                self.last_step = max((metric.step for metric in history), default=0)
            while lines := self.reader.new_lines(_PIECE_BYTES):
                self._log([line for line in lines if line["step"] > self.last_step])
        except _NOT_TAKEN:
            self.reader = MetricsReader(self.metrics)
            raise

    def _log(self, lines: list[Metrics]) -> None:
        for begin in range(0, len(lines), _LINES):
            chunk = lines[begin : begin + _LINES]
            self.client.log_batch(self.run_id, metrics=list(_points(chunk)))
            self.last_step = chunk[-1]["step"]


def _points(lines: Iterable[Metrics]) -> Iterator[Metric]:
    for line in lines:
        for key in LOGGED:
            if key in line:
                yield Metric(key, line[key], line["time_ms"], line["step"])


class Following:
    """While this context lasts, a thread sends what the training writes. MLflow may come and go.

    The training does not wait for MLflow; the end of the context does, for some seconds. What is still missing then,
    whoever reports the run sends.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.has_ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="metrics to MLflow", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.has_ended.set()
        self.thread.join(_END_SECONDS if kind is None else _HURRIED_END_SECONDS)

    def _follow(self) -> None:
        pause = _POLL_SECONDS
        while not self.has_ended.wait(pause):
            pause = _POLL_SECONDS if self._is_sent() else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        deadline = time.monotonic() + _END_SECONDS
        while not self._is_sent() and time.monotonic() < deadline:
            time.sleep(1.0)

    def _is_sent(self) -> bool:
        try:
            self.log.send()
        except _NOT_TAKEN as error:
            _log.warning("MLflow does not take the metrics of run %s for now: %s", self.log.run_id, error)
            return False
        return True

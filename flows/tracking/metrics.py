"""The transfer of a training's metrics to MLflow: every update once, in order, with its own time.

metrics.jsonl is the buffer. If MLflow does not take some lines, because its database is locked or its server is down,
they are read again later: by the same run, or by the next one that resumes the training.
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

from flows.state.root import StateRoot
from gptcore.training.run_directory import MetricsLine, MetricsReader

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
"""The keys of a line of metrics.jsonl that become MLflow metrics."""
_LINES = 1000 // len(LOGGED)
"""Lines in a request, which may have 1,000 metrics. Lines are not split, so MLflow has all of an update or nothing."""
_CHUNK_BYTES = 1024 * 1024
_POLL_SECONDS = 5.0
"""Pause between two requests. Each request takes time from the training, even with few points in it."""
_LONGEST_PAUSE_SECONDS = 30.0
_END_SECONDS = 10.0
_HURRIED_END_SECONDS = 3.0
_NOT_TAKEN = (MlflowException, OperationalError)  # the second: from MLflow's rollback over a broken connection
_log = logging.getLogger(__name__)


class MetricsLog:
    """Send the lines of metrics.jsonl to a run, each update once, however often the file is read."""

    def __init__(self, root: StateRoot, run_id: str, metrics: Path) -> None:
        self.client = MlflowClient(root.tracking_uri)
        self.run_id, self.metrics = run_id, metrics
        self.reader = MetricsReader(metrics)
        self.last_step: int | None = None
        """The newest update that MLflow has. None before the first query."""

    def send(self) -> None:
        """Send all new lines of the file. Raises MlflowException; the next call continues at the first unsent line."""
        try:
            if self.last_step is None:
                history = self.client.get_metric_history(self.run_id, "loss")
                self.last_step = max((metric.step for metric in history), default=0)
            while lines := self.reader.read_new_lines(_CHUNK_BYTES):
                self._log_lines([line for line in lines if line["step"] > self.last_step])
        except _NOT_TAKEN:
            self.reader = MetricsReader(self.metrics)
            raise

    def _log_lines(self, lines: list[MetricsLine]) -> None:
        for begin in range(0, len(lines), _LINES):
            chunk = lines[begin : begin + _LINES]
            self.client.log_batch(self.run_id, metrics=list(_points(chunk)))
            self.last_step = chunk[-1]["step"]


def _points(lines: Iterable[MetricsLine]) -> Iterator[Metric]:
    for line in lines:
        for key in LOGGED:
            if key in line:
                yield Metric(key, line[key], line["time_ms"], line["step"])


class MetricsFollower:
    """Send the lines that the training writes, in a thread, inside this context. MLflow may be unreachable for a while.

    The training does not wait for MLflow. The end of the context waits for some seconds; `MetricsLog.send` sends the
    rest when the run is reported.
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
            pause = _POLL_SECONDS if self._try_send() else min(2 * pause, _LONGEST_PAUSE_SECONDS)
        deadline = time.monotonic() + _END_SECONDS
        while not self._try_send() and time.monotonic() < deadline:
            time.sleep(1.0)

    def _try_send(self) -> bool:
        try:
            self.log.send()
        except _NOT_TAKEN as error:
            _log.warning("MLflow does not take the metrics of run %s for now: %s", self.log.run_id, error)
            return False
        return True

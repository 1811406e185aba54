"""The trainer process: start the trainer on a run directory, follow it, stop it, and read how it ended.

The trainer is a child process. It has its own memory, so an out-of-memory kill costs a retry and not the flow. It holds
the other end of a pipe: if this process dies, the child saves and stops, so a run directory never has two writers. If
train.processes is more than one, there is one such child per rank. The ranks meet in a file, and none of them listens
to the network.
"""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Self
from uuid import UUID

import psutil
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.state import postgres_lock
from flows.state.console import active_console, describe_progress
from flows.state.root import StateRoot
from flows.tracking import errors, runs
from flows.tracking.metrics import MetricsFollower, MetricsLog
from gptcore.errors import GPTCoreError
from gptcore.records import open_regular, read_bytes
from gptcore.training import checkpoint
from gptcore.training.rendezvous import make_local_environments, new_store
from gptcore.training.run_directory import STOPPED, MetricsLine, MetricsReader, Paused, Result, RunDirectory

GRACE_SECONDS = 25.0
"""How long a stopped trainer may take to save. Prefect kills a cancelled flow run after 30 seconds."""
_POLL_SECONDS = 1.0
"""Time between two looks at the metrics. The flow's own work while the model trains slows the training down."""
_ERROR = "error: "
"""Prefix of the line with which the trainer reports a known error."""
_MAX_DEATHS = 3
_PEERS_SECONDS = 15.0
"""How long the other ranks may take to end after one of them has failed."""
_RANK_LOST = re.compile(r"error: rank \d+ of \d+ has lost another rank")
_RESTART_SECONDS = 1.0
_PROGRESS_SECONDS = 5.0
_LOG_SECONDS = 30.0
_AWAY_SECONDS = 60.0


class TrainerDied(GPTCoreError):
    """The trainer ended without result or reason: it was killed, or out of memory. Starting it again helps."""


class TrainerKeepsDying(GPTCoreError):
    """The trainer died several times without a new checkpoint. Restarting it once more would not help."""


def train(run: RunDirectory, on_metrics: Callable[[list[MetricsLine]], None]) -> Result | Paused:
    """Train the run directory in a child process, to the end of the training or of its session.

    `on_metrics` receives new lines of metrics.jsonl, about once a second. Raises the trainer's own error, or
    TrainerDied. If this process is interrupted, the child saves a checkpoint first.
    """
    if (result := run.read_result()) is not None:
        checkpoint.prune(run.checkpoints, keep=0)  # the trainer was killed before it did that
        on_metrics(run.read_metrics())
        return result
    reader = MetricsReader(run.metrics)
    with _Trainers(run) as trainers:
        while trainers.are_running():
            on_metrics(reader.read_new_lines())
            trainers.wait(_POLL_SECONDS)
        on_metrics(reader.read_new_lines())
    return _read_outcome(run, trainers.exit_code())


class _Trainers:
    """The trainer of a run directory or, if train.processes is more than one, the trainer of each rank.

    As a context, it ends the trainers that still run on exit.
    """

    def __init__(self, run: RunDirectory) -> None:
        """Start the trainers, which write to trainer.log."""
        processes = int(run.read_config().train.processes)
        self._store = new_store(run.path)
        ranks = make_local_environments(processes, self._store) if processes > 1 else [{}]
        # torch.distributed logs little. The trainer sets its threads itself.
        settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} if processes > 1 else {}
        command = [sys.executable, "-m", "gptcore.train", str(run.path), "--stop-at-end-of-input"]
        with open(run.path / "trainer.log", "ab", opener=open_regular) as log:
            # A session of its own: Ctrl-C in the terminal reaches only this process, which then stops the children
            # properly. psutil's Popen sleeps until the child ends; subprocess's would check twenty times a second.
            self._processes = [
                psutil.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**settings, **os.environ, **rank},
                )
                for rank in ranks
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop(GRACE_SECONDS)
        self._store.unlink(missing_ok=True)

    def are_running(self) -> bool:
        """Whether a trainer runs. If one has failed, the others, which may wait for it, are stopped first."""
        codes = [process.poll() for process in self._processes]
        if any(code not in (None, 0, STOPPED) for code in codes):
            self._stop(_PEERS_SECONDS)
        return any(process.poll() is None for process in self._processes)

    def wait(self, seconds: float) -> None:
        """Wait until all trainers have ended, but at most `seconds`."""
        psutil.wait_procs(self._processes, seconds)

    def exit_code(self) -> int:
        """Return the trainers' exit code. If ranks failed, return the lowest of their codes: a signal is negative."""
        codes = [process.poll() for process in self._processes]
        failed = sorted(code for code in codes if code not in (None, 0, STOPPED))
        return failed[0] if failed else max(code or 0 for code in codes)

    def _stop(self, seconds: float) -> None:
        """Let the trainers save and stop. Kill them if that takes longer than `seconds`."""
        # No signal: a container's stop may have signalled every process, and a second signal ends a trainer at once.
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        self.wait(seconds)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _read_outcome(run: RunDirectory, code: int) -> Result | Paused:
    """Return the result or pause of an ended trainer. Raises its error, or TrainerDied if it left none."""
    if code == 0 and (result := run.read_result()) is not None:
        return result
    if code in (0, STOPPED) and (paused := run.read_pause()) is not None:
        return paused
    if (failure := run.read_failure()) is not None:
        raise failure
    log = run.path / "trainer.log"
    lines = read_bytes(log).decode(errors="replace").strip().splitlines()
    last = next((line for line in reversed(lines) if not _RANK_LOST.match(line)), "")  # another rank says why
    if code >= 0 and last.startswith(_ERROR):  # the disk had no room for failure.json
        raise GPTCoreError(last.removeprefix(_ERROR))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise TrainerDied(f"the trainer {how}; the last line of {log}: {last or '(none)'}")


def train_with_restarts(
    run: RunDirectory, on_metrics: Callable[[list[MetricsLine]], None], warn: Callable[[str], None]
) -> Result | Paused:
    """Train like `train`, and restart a trainer that died from its last checkpoint, as long as it makes progress.

    `warn` receives a sentence about each death. Raises TrainerKeepsDying, with a diagnosis, at the third death since
    the same checkpoint.
    """
    deaths: Counter[int] = Counter()
    while True:
        try:
            return train(run, on_metrics)
        except TrainerDied as death:
            saved = run.saved_step()
            deaths[saved] += 1
            if deaths[saved] == _MAX_DEATHS:
                raise TrainerKeepsDying(_diagnose(run, saved, death)) from None
            warn(f"{death}. It starts again from step {saved}.")
        time.sleep(_RESTART_SECONDS)


def _diagnose(run: RunDirectory, saved: int, death: TrainerDied) -> str:
    """Return a text that says when the trainer died, how much memory it had, and which settings may help."""
    lines = MetricsReader(run.metrics).read_new_lines()
    last = f"after step {lines[-1]['step']}, holding {lines[-1]['memory_mb']:,.0f} MB" if lines else "before any step"
    machine = psutil.virtual_memory()
    return (
        f"the trainer died {_MAX_DEATHS} times between its checkpoint at step {saved} and the next one, this time "
        f"{last}: {death}. This machine has {machine.total / 1e6:,.0f} MB, of which {machine.available / 1e6:,.0f} are "
        "available now. If nobody kills the trainer, it runs out of memory: lower train.batch_size and raise "
        "train.accumulation as much, or make the model smaller. If it is killed now and then, save more often: "
        "lower train.checkpoint_seconds. The next run resumes from the checkpoint."
    )


def train_and_report(root: StateRoot, run: RunDirectory, mlflow_run_id: str) -> Result | Paused:
    """Train with restarts, and show the progress in the MLflow run, in a Prefect artifact, and on the terminal."""
    log = MetricsLog(root, mlflow_run_id, run.metrics)
    console, logger = active_console(), get_run_logger()

    def warn(text: str) -> None:
        logger.warning("train: %s", text, extra={"step": "train"})

    watched, shown = runs.log_system_metrics(root, mlflow_run_id), console.progress_bar() if console else nullcontext()
    with watched, MetricsFollower(log), shown as bar:
        report = ProgressReport(run.path.parent.name, logs=console is None or not console.terminal.is_terminal)

        def on_metrics(lines: list[MetricsLine]) -> None:
            postgres_lock.ensure_not_lost()
            if lines:
                report.show(lines)
                if bar:
                    bar.show(lines[-1])

        return train_with_restarts(run, on_metrics, warn)


def artifact_key(pipeline: str, kind: str) -> str:
    """Return the key of a pipeline's artifact in Prefect, such as notes-card."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{pipeline}-{kind}".lower())


class ProgressReport:
    """The progress of a pipeline's training: a progress bar in the Prefect UI, and lines in the log.

    The bar moves every 5 seconds, or pauses for a minute if Prefect is unreachable. All trainings of a pipeline have
    the same key, so that the UI shows one artifact per pipeline. A log gets a line every 30 seconds.
    """

    def __init__(self, pipeline: str, logs: bool) -> None:
        self.pipeline, self.logs = pipeline, logs
        self.id: UUID | None = None
        self.due = 0.0
        self.log_due = time.monotonic() + _LOG_SECONDS
        self.val_loss: float | None = None

    def show(self, lines: list[MetricsLine]) -> None:
        """Show the newest update. An error of Prefect does not stop the training."""
        self.val_loss = next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), self.val_loss)
        newest, now = lines[-1], time.monotonic()
        text = describe_progress(newest, self.val_loss)
        if self.logs and now >= self.log_due:
            self.log_due = now + _LOG_SECONDS
            get_run_logger().info("train: %s", text, extra={"step": "train"})
        if now < self.due and newest["progress"] < 1.0:
            return
        self.due = now + _AWAY_SECONDS
        with errors.warn_if_prefect_fails("the progress"):
            self._move(100.0 * newest["progress"], f"{self.pipeline}: {text}")
            self.due = time.monotonic() + _PROGRESS_SECONDS

    def _move(self, percent: float, text: str) -> None:
        if self.id is not None:
            update_progress_artifact(self.id, percent, description=text)
            return
        created = create_progress_artifact(percent, key=artifact_key(self.pipeline, "progress"), description=text)
        assert isinstance(created, UUID), "tasks are synchronous, so this call is"
        self.id = created

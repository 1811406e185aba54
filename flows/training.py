"""Training as a child process: start the trainer on a run directory, follow it, stop it, learn how it ended.

The child's memory is its own, so an out-of-memory kill costs a retry and not the flow. It holds the other end of a
pipe: when this process is gone, the child saves and stops, so there are never two writers.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows import tracking
from flows.command.console import active
from flows.state import StateRoot
from gptcore.errors import GPTCoreError
from gptcore.learning.rundir import STOPPED, Metrics, MetricsReader, Paused, Result, RunDirectory

GRACE_SECONDS = 25.0
"""How long a stopped trainer may take to save. Prefect kills a cancelled flow run after 30 seconds."""
_POLL_SECONDS = 0.25


class TrainerDied(GPTCoreError):
    """The trainer ended without finishing and without saying why: killed, or out of memory. Starting it again helps."""


def train(run: RunDirectory, on_metrics: Callable[[list[Metrics]], None]) -> Result | Paused:
    """Trains the run directory in a child process to its end, or to the end of its session.

    `on_metrics` gets the lines of metrics.jsonl as they come. Raises what the trainer raised, or TrainerDied. If this
    process is interrupted, the child saves first.
    """
    if (result := run.result()) is not None:
        on_metrics(run.read_metrics())
        return result
    reader = MetricsReader(run.metrics)
    process = _start(run.path)
    try:
        while process.poll() is None:
            on_metrics(reader.new_lines())
            _wait(process, _POLL_SECONDS)
        on_metrics(reader.new_lines())
    except BaseException:
        _stop(process)
        raise
    return _outcome(run, process.returncode)


def _start(path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "gptcore.train", str(path), "--stop-at-end-of-input"]
    with (path / "trainer.log").open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the child in order.
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=os.environ
        )


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    _wait(process, GRACE_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()


def _outcome(run: RunDirectory, code: int) -> Result | Paused:
    if code == 0 and (result := run.result()) is not None:
        return result
    if code == STOPPED and (paused := run.paused()) is not None:
        return paused
    if (failure := run.failure()) is not None:
        raise failure
    log = run.path / "trainer.log"
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise TrainerDied(f"the trainer {how}; its last words in {log}: {' '.join(last) or '(none)'}")


def train_tracked(root: StateRoot, run: RunDirectory, mlflow_run_id: str) -> Result | Paused:
    """`train`, with the metrics going to the MLflow run, to a Prefect progress artifact and to the terminal's bar."""
    log = tracking.MetricsLog(root, mlflow_run_id)
    console = active()
    with tracking.system_metrics(mlflow_run_id), console.bar() if console else nullcontext() as bar:
        artifact = ProgressArtifact(f"{run.path.name}-progress")

        def on_metrics(lines: list[Metrics]) -> None:
            if lines:
                log.send(lines)
                artifact.show(lines[-1])
                if bar:
                    bar.show(lines[-1])

        return train(run, on_metrics)


class ProgressArtifact:
    """A progress bar in the Prefect UI, moved at most once a second."""

    def __init__(self, key: str) -> None:
        created = create_progress_artifact(0.0, key=key, description="waiting for the first step")
        assert isinstance(created, UUID), "tasks are synchronous, so this call is"
        self.id = created
        self.moved_at = 0.0

    def show(self, line: Metrics) -> None:
        """Moves the bar to the newest update."""
        if time.monotonic() - self.moved_at < 1.0 and line["progress"] < 1.0:
            return
        self.moved_at = time.monotonic()
        text = f"step {line['step']:,} · loss {line['loss']:.3f} · {line['tokens_per_second']:,.0f} tokens/s"
        update_progress_artifact(self.id, 100.0 * line["progress"], description=text)

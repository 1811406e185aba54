"""Training as a child process: start the trainer on a run directory, follow it, stop it, learn how it ended.

The child's memory is its own, so an out-of-memory kill costs a retry and not the flow. It holds the other end of a
pipe: when this process is gone, the child saves and stops, so there are never two writers. Where train.processes is
more than one the child is torchrun, whose own children are the trainers; they hold the pipe as well.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from uuid import UUID

import psutil
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows import faults, tracking
from flows.command.console import active
from flows.metrics import Following, MetricsLog
from flows.sharing import advisory
from flows.state import StateRoot
from gptcore.errors import GPTCoreError
from gptcore.learning import checkpoint
from gptcore.learning.rundir import STOPPED, Metrics, MetricsReader, Paused, Result, RunDirectory

GRACE_SECONDS = 25.0
"""How long a stopped trainer may take to save. Prefect kills a cancelled flow run after 30 seconds."""
_POLL_SECONDS = 1.0
"""Between two looks at the metrics. Whatever the flow does while the model trains, it takes from the training."""
_ERROR = "error: "
"""How the trainer begins what it says of an error that it knows."""
_MOST_DEATHS = 3
_LAUNCHER = ("-m", "torch.distributed.run", "--standalone", f"--max-restarts={_MOST_DEATHS}", "--nproc-per-node")
_RESTART_SECONDS = 1.0
_PROGRESS_SECONDS = 5.0
_AWAY_SECONDS = 60.0


class TrainerDied(GPTCoreError):
    """The trainer ended without finishing and without saying why: killed, or out of memory. Starting it again helps."""


class TrainerKeepsDying(GPTCoreError):
    """The trainer died again and again without getting any further. Starting it once more would not help."""


def train(run: RunDirectory, on_metrics: Callable[[list[Metrics]], None]) -> Result | Paused:
    """Trains the run directory in a child process to its end, or to the end of its session.

    `on_metrics` gets the lines of metrics.jsonl as they come. Raises what the trainer raised, or TrainerDied. If this
    process is interrupted, the child saves first.
    """
    if (result := run.result()) is not None:
        checkpoint.prune(run.checkpoints, keep=0)  # of a trainer that was killed before it did
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
    finally:
        assert process.stdin is not None
        process.stdin.close()  # where torchrun alone died, its trainers are still there: they save and stop
    return _outcome(run, process.returncode)


def _start(path: Path) -> psutil.Popen:
    processes = int(RunDirectory(path).config().train.processes)
    trainer = ["-m", "gptcore.train", str(path), "--stop-at-end-of-input"]
    command = [sys.executable, *trainer] if processes == 1 else [sys.executable, *_LAUNCHER, str(processes), *trainer]
    environment = {**os.environ} if processes == 1 else _on_one_machine()
    with (path / "trainer.log").open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which then stops the child in order.
        # psutil's, which sleeps until the child ends; subprocess would look twenty times a second whether it has.
        return psutil.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment
        )


def _on_one_machine() -> dict[str, str]:
    """The environment of processes that talk to one another by the loopback interface alone, and say little of it."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "LOGLEVEL": "ERROR"}  # threads are set later
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback, **quiet, **os.environ}


def _wait(process: psutil.Popen, seconds: float) -> None:
    with suppress(psutil.TimeoutExpired):
        process.wait(seconds)


def _stop(process: psutil.Popen) -> None:
    # No signal: whoever stops this process may have sent one to every process, and a second one ends a trainer at once.
    assert process.stdin is not None
    process.stdin.close()
    _wait(process, GRACE_SECONDS)
    if process.poll() is None:
        for each in (*process.children(recursive=True), process):  # torchrun's trainers would outlive it
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _outcome(run: RunDirectory, code: int) -> Result | Paused:
    if code == 0 and (result := run.result()) is not None:
        return result
    if code in (0, STOPPED) and (paused := run.paused()) is not None:
        return paused
    if (failure := run.failure()) is not None:
        raise failure
    log = run.path / "trainer.log"
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if last.startswith("==="):  # of the table that torchrun ends with when it gives up
        last = next((line for line in reversed(lines) if line.startswith(_ERROR)), last)
    elif code >= 0 and last.startswith(_ERROR):  # there was no room for failure.json
        raise GPTCoreError(last.removeprefix(_ERROR))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise TrainerDied(f"the trainer {how}; its last words in {log}: {last or '(none)'}")


def train_on(
    run: RunDirectory, on_metrics: Callable[[list[Metrics]], None], warn: Callable[[str], None]
) -> Result | Paused:
    """`train`, which starts a trainer that died again, from its last checkpoint, as long as checkpoints come.

    `warn` is told of each death. Raises TrainerKeepsDying, with a diagnosis, at the third death since one checkpoint.
    """
    deaths: Counter[int] = Counter()
    while True:
        try:
            return train(run, on_metrics)
        except TrainerDied as death:
            saved = run.saved_step()
            deaths[saved] += 1
            if deaths[saved] == _MOST_DEATHS:
                raise TrainerKeepsDying(_diagnosis(run, saved, death)) from None
            warn(f"{death}. It starts again from step {saved}.")
        time.sleep(_RESTART_SECONDS)


def _diagnosis(run: RunDirectory, saved: int, death: TrainerDied) -> str:
    lines = run.read_metrics()
    last = f"after step {lines[-1]['step']}, holding {lines[-1]['memory_mb']:,.0f} MB" if lines else "before any step"
    machine = psutil.virtual_memory()
    return (
        f"the trainer died {_MOST_DEATHS} times between its checkpoint at step {saved} and the next one, this time "
        f"{last}: {death}. This machine has {machine.total / 1e6:,.0f} MB, of which {machine.available / 1e6:,.0f} are "
        "available now. If nobody kills it, memory is what it lacks: lower train.batch_size and raise "
        "train.accumulation as much, or make the model smaller. If it is killed now and then, save more often: "
        "train.checkpoint_seconds. The next run goes on from the checkpoint."
    )


def train_tracked(root: StateRoot, run: RunDirectory, mlflow_run_id: str) -> Result | Paused:
    """`train_on`, shown while it lasts: metrics in the MLflow run, an artifact in Prefect, the terminal's bar."""
    log = MetricsLog(root, mlflow_run_id, run.metrics)
    console, logger = active(), get_run_logger()

    def warn(text: str) -> None:
        logger.warning("train: %s", text, extra={"step": "train"})

    watched, shown = tracking.system_metrics(root, mlflow_run_id), console.bar() if console else nullcontext()
    with watched, Following(log), shown as bar:
        artifact = ProgressArtifact(f"{run.path.name}-progress")

        def on_metrics(lines: list[Metrics]) -> None:
            advisory.ensure_not_lost()
            if lines:
                artifact.show(lines[-1])
                if bar:
                    bar.show(lines[-1])

        return train_on(run, on_metrics, warn)


class ProgressArtifact:
    """A progress bar in the Prefect UI, moved every few seconds, and left alone for a while if Prefect is away."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.id: UUID | None = None
        self.due = 0.0

    def show(self, line: Metrics) -> None:
        """Moves the bar to the newest update. The training does not depend on whether it moves."""
        if time.monotonic() < self.due and line["progress"] < 1.0:
            return
        self.due = time.monotonic() + _AWAY_SECONDS
        with faults.only_shown("the progress"):
            self._move(line)
            self.due = time.monotonic() + _PROGRESS_SECONDS

    def _move(self, line: Metrics) -> None:
        percent = 100.0 * line["progress"]
        text = f"step {line['step']:,} · loss {line['loss']:.3f} · {line['tokens_per_second']:,.0f} tokens/s"
        if self.id is not None:
            update_progress_artifact(self.id, percent, description=text)
            return
        created = create_progress_artifact(percent, key=self.key, description=text)
        assert isinstance(created, UUID), "tasks are synchronous, so this call is"
        self.id = created

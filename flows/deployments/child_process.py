"""A supervised child process of `gptflow up`: it has a session and a log of its own, and a test of its health."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from gptcore.errors import GPTCoreError
from gptcore.records import open_regular

WINDOW_SECONDS = 60.0
MAX_FAILURES = 5
"""A child that fails more often than this within the window is not restarted any more."""


@dataclass
class Child:
    """A server, or the runner of the deployments."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    is_healthy: Callable[["Child"], bool]
    process: "subprocess.Popen[bytes] | None" = None
    failures: list[float] = field(default_factory=list)
    """When the process ended although nobody stopped it, in monotonic seconds: only the times within the window."""
    restarts: int = 0
    """The number of all such failures."""
    ended_at: str = ""
    """The time of the latest failure."""
    log_offset: int = 0
    """Where the log of the current process begins, in bytes."""

    def start(self) -> None:
        """Start the process. Signals from the terminal do not reach it."""
        self.log_offset = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab", opener=open_regular) as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def read_log(self) -> str:
        """Read the log of the current process."""
        with open(self.log, "rb", opener=open_regular) as log:
            log.seek(self.log_offset)
            return log.read().decode(errors="replace")

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def identity(self) -> tuple[int, float]:
        """Return the process id and the time of creation. The process must have been started."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            return self.process.pid, psutil.Process(self.process.pid).create_time()
        return self.process.pid, 0.0

    def count_failure(self) -> float:
        """Count a failure. Return the seconds to wait before a restart: 0.5, 1, 2, 4 and 4.

        Raises GPTCoreError after too many failures.
        """
        now = time.monotonic()
        self.restarts += 1
        self.ended_at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.failures = [*(at for at in self.failures if now - at < WINDOW_SECONDS), now]
        if len(self.failures) > MAX_FAILURES:
            raise GPTCoreError(
                f"{self.name} ended {len(self.failures)} times within a minute and is not restarted any more. "
                f"{self.last_lines()}"
            )
        return float(min(2 ** (len(self.failures) - 1), 8)) / 2

    def last_lines(self) -> str:
        """Return the last five lines of the log and the log's path, for an error message."""
        lines = self.read_log().strip().splitlines()[-5:]
        return f"The end of {self.log}:\n" + "\n".join(lines or ["(empty)"])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, if it is alive."""
        if self.process is not None and self.is_alive():
            self.process.send_signal(number)

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process. After that many seconds, kill the processes left in its session."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0.0))
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

"""A supervised child process: started in a session of its own, its words in a log, healthy when it says so."""

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

WINDOW_SECONDS = 60.0
MOST_DEATHS = 5
"""A child that ends more often than this within the window is given up."""


@dataclass
class Child:
    """One server, or the runner."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    is_healthy: Callable[["Child"], bool]
    process: "subprocess.Popen[bytes] | None" = None
    deaths: list[float] = field(default_factory=list)
    """When it ended unasked, as monotonic seconds: the latest times only."""
    restarts: int = 0
    """How often it ended unasked, in all."""
    ended_at: str = ""
    """When it last ended unasked."""
    log_begin: int = 0
    """Where in the log the present process begins."""

    def start(self) -> None:
        """Starts the process. Signals from the terminal do not reach it."""
        self.log_begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def said(self) -> str:
        """What the present process has written so far."""
        with self.log.open("rb") as log:
            log.seek(self.log_begin)
            return log.read().decode(errors="replace")

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def identity(self) -> tuple[int, float]:
        """Process id and time of creation. The process must have been started."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            return self.process.pid, psutil.Process(self.process.pid).create_time()
        return self.process.pid, 0.0

    def note_death(self) -> float:
        """Counts an end nobody asked for, and says how many seconds to wait. Raises GPTCoreError after too many."""
        now = time.monotonic()
        self.restarts += 1
        self.ended_at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.deaths = [*(when for when in self.deaths if now - when < WINDOW_SECONDS), now]
        if len(self.deaths) > MOST_DEATHS:
            raise GPTCoreError(
                f"{self.name} ended {len(self.deaths)} times within a minute, so it was given up. {self.last_words()}"
            )
        return float(min(2 ** (len(self.deaths) - 1), 8)) / 2

    def last_words(self) -> str:
        """The end of what it said, and where the rest is."""
        lines = self.said().strip().splitlines()[-5:]
        return f"The end of {self.log}:\n" + "\n".join(lines or ["(it said nothing)"])

    def signal(self, number: signal.Signals) -> None:
        """Signals the process alone, if it lives."""
        if self.process is not None and self.is_alive():
            self.process.send_signal(number)

    def wait(self, seconds: float) -> None:
        """Waits for the end; after that, kills whatever is left of the session."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0.0))
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

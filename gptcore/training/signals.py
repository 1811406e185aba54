"""The requests that stop a trainer: a signal, or the end of the process that started it."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A request to stop after the current update. Signal handlers and the parent's watcher only set `reason`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why to stop, for people. None: keep training."""
        self._ignores_second_signal = False

    def listen_to_signals(self, ignore_second: bool = False) -> "Stop":
        """Listen to SIGTERM and SIGINT. A second signal ends the process at once, without saving.

        With `ignore_second`, it does not: a launcher that forwards signals may deliver the same signal twice.
        """
        self._ignores_second_signal = ignore_second
        for number in SIGNALS:
            signal.signal(number, self._handle_signal)
        return self

    def listen_to_end_of_input(self) -> "Stop":
        """Stop at the end of standard input, a pipe that the parent process holds open: the parent is gone."""
        threading.Thread(target=self._wait_for_end_of_input, daemon=True).start()
        return self

    def _handle_signal(self, number: int, _: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._ignores_second_signal:
            return
        # The system handles the second signal, so that it also ends a long write. Uncommitted files do not count.
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _wait_for_end_of_input(self) -> None:
        while os.read(0, 1):
            pass
        self.reason = self.reason or "the process that started it is gone"

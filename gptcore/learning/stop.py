"""What asks a trainer to stop: a signal, or the end of the process that started it."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A request to stop after the current update. Signal handlers and the parent's watcher only set this flag."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._is_patient = False

    def on_signals(self, is_patient: bool = False) -> "Stop":
        """Listens to SIGTERM and SIGINT. A second one of them ends the process at once, saving nothing more.

        One that `is_patient` goes on saving: where a launcher passes signals on, the same one may come twice.
        """
        self._is_patient = is_patient
        for number in SIGNALS:
            signal.signal(number, self._signalled)
        return self

    def on_end_of_input(self) -> "Stop":
        """Listens to standard input, a pipe that the starting process holds open: its end means that it is gone."""
        threading.Thread(target=self._wait_for_end_of_input, daemon=True).start()
        return self

    def _signalled(self, number: int, _: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._is_patient:
            return
        for each in SIGNALS:  # by the system, so that it also ends a long write; what is not committed does not count
            signal.signal(each, signal.SIG_DFL)

    def _wait_for_end_of_input(self) -> None:
        while os.read(0, 1):
            pass
        self.reason = self.reason or "the process that started it is gone"

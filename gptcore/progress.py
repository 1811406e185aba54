"""Progress of a step over a large text, logged every 5 seconds.

The records go to the logger `gptcore.progress`. The caller of the step decides where they are shown. A step that takes
less than 5 seconds logs nothing.
"""

import logging
import time

LOGGER = logging.getLogger("gptcore.progress")

_SECONDS = 5.0
"""Seconds between two records, and before the first one."""


class Progress:
    """One pass over a text. Counts bytes and logs records such as `read 200 of 1,000 MB, 40.0 MB/s, 20 s left`."""

    def __init__(self, step: str, action: str, total_bytes: int | None = None) -> None:
        """Start the clock. `step` is an attribute of each record; `action` is the first word of its text, as in `read`.

        `total_bytes` is None if it is not known beforehand.
        """
        self._step, self._action, self._total = step, action, total_bytes
        self._done = 0
        self._started = self._last_logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count `num_bytes` more bytes as done, and log a record if one is due."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last_logged >= _SECONDS:
            self._last_logged = now
            LOGGER.info(self._describe(now - self._started), extra={"step": self._step})

    def _describe(self, seconds: float) -> str:
        rate = self._done / seconds
        if self._total is None:
            return f"{self._action} {self._done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
        left = max(0, self._total - self._done) / rate if rate else 0.0
        done, total = self._done / 1e6, self._total / 1e6
        return f"{self._action} {done:,.0f} of {total:,.0f} MB, {rate / 1e6:,.1f} MB/s, {left:,.0f} s left"

"""How far a step over a large text has come, said every few seconds through Python's logging.

Whoever runs the step decides where the records of the logger `gptcore.progress` are shown; a small text gives none.
"""

import logging
import time

LOGGER = logging.getLogger("gptcore.progress")

_SECONDS = 5.0
"""Between two records, and before the first."""


class Progress:
    """One pass over a text, told of each piece."""

    def __init__(self, step: str, doing: str, total_bytes: int | None = None) -> None:
        """`doing` begins the sentence, as in `read`; `total_bytes` where it is known beforehand."""
        self._step, self._doing, self._total = step, doing, total_bytes
        self._done = 0
        self._began = self._said = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said >= _SECONDS:
            self._said = now
            LOGGER.info(self._sentence(now - self._began), extra={"step": self._step})

    def _sentence(self, seconds: float) -> str:
        rate = self._done / seconds
        if self._total is None:
            return f"{self._doing} {self._done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
        left = max(0, self._total - self._done) / rate if rate else 0.0
        done, total = self._done / 1e6, self._total / 1e6
        return f"{self._doing} {done:,.0f} of {total:,.0f} MB, {rate / 1e6:,.1f} MB/s, {left:,.0f} s left"

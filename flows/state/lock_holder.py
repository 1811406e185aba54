"""The holder of a lock, and the error that names the holder, for both kinds of lock: locks.py and postgres_lock.py."""

from dataclasses import dataclass
from typing import Literal

Overlap = Literal["skip", "wait"]


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and since when."""

    pid: int
    since: str
    flow_run: str
    host: str = ""
    """The machine of the process, for a lock between machines."""

    def __str__(self) -> str:
        return f"pid {self.pid}{f' on {self.host}' if self.host else ''}, since {self.since}"


class LockHeld(Exception):
    """Another process holds the lock. `holder` is None if that process has not signed the lock yet."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(f"another run holds the lock ({holder or 'it has not signed the lock yet'})")
        self.holder = holder

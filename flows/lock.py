"""One lock per pipeline: the only thing that keeps two of its runs apart, however they were started.

A flow process holds `locks/<pipeline>.lock` in the state root for its whole run. It is an flock: the kernel frees it
when its holder dies, however that happens, so there is no stale lock to clean up. The file says who holds it, until the
lock is given back: who finds a name in it finds somebody who died. Where several machines share the state's database,
the holder has a lock of the same name there as well (sharing/advisory.py).
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from flows.sharing.database import Database

Overlap = Literal["skip", "wait"]
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and since when."""

    pid: int
    since: str
    flow_run: str
    host: str = ""
    """Where, if the lock is one between machines."""

    def __str__(self) -> str:
        return f"pid {self.pid}{f' on {self.host}' if self.host else ''}, since {self.since}"


class Held(Exception):
    """Another process holds the lock. `holder` is None if it has not said yet who it is."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(f"another run holds the lock ({holder or 'it has not said who it is'})")
        self.holder = holder


@contextmanager
def hold(
    path: Path, flow_run: str = "", overlap: Overlap = "skip", database: Database | None = None
) -> Iterator[Holder | None]:
    """Holds the lock while this context lasts, in `database` too, and names the holder before, if it died with it.

    A lock that is only looked at for a moment (`taken`) is not mistaken for a run: skipping takes a second. Raises Held
    if it is taken, or waits, as `overlap` says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if overlap == "wait":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            _take(file.fileno(), path)
        died = _signature(path)
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps(asdict(Holder(os.getpid(), since, flow_run))) + "\n")
        file.flush()
        here = nullcontext(died)
        try:
            with here if database is None else _advisory().hold(database, path.name, flow_run, overlap) as died:
                yield died
        finally:
            file.truncate(0)


@contextmanager
def taken(path: Path, database: Database | None = None) -> Iterator[bool]:
    """Takes the lock at once if it is free, without signing it, and says whether it could."""
    between_machines = nullcontext(True) if database is None else _advisory().taken(database, path.name)
    if not path.exists():
        with between_machines as free:
            yield free
        return
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            with between_machines as free:
                yield free


def holder(path: Path, database: Database | None = None) -> Holder | None:
    """Who holds the lock now; None if nobody does."""
    with taken(path) as free:
        if not free:
            return _signature(path)
    if database is None:
        return None
    with taken(path, database) as free:
        return None if free else _advisory().holder(database, path.name)


def _advisory() -> Any:
    from flows.sharing import advisory  # which builds on this room

    return advisory


def _take(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Held(_signature(path)) from None
        time.sleep(0.1)


def _signature(path: Path) -> Holder | None:
    with suppress(ValueError, TypeError):
        return Holder(**json.loads(path.read_text()))
    return None

"""One lock per pipeline: it alone keeps two runs of a pipeline apart, however they were started.

A flow process holds `locks/<pipeline>.lock` in the state root for its whole run. The lock is an flock: the kernel
releases it when its holder dies, in whatever way, so there is no stale lock to clean up. The file names the holder
until the holder releases the lock. So a name in a file that is not locked belongs to a holder that died. If several
machines share the state's database, the holder also takes the lock of the same name there (postgres_lock.py).
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from flows.state import postgres_lock
from flows.state.lock_holder import Holder, LockHeld, Overlap
from flows.state.postgres import PostgresDatabase
from gptcore.records import open_lock, read_record

_PATIENCE_SECONDS = 1.0
_UNSIGNED_PATIENCE_SECONDS = 60.0
"""How long `hold` waits for a lock that no run has signed. `try_lock` holds it, for example while `prune` renames."""


@contextmanager
def hold(
    path: Path, flow_run: str = "", overlap: Overlap = "skip", database: PostgresDatabase | None = None
) -> Iterator[Holder | None]:
    """Hold the lock inside this context, in `database` too. Yields the previous holder if it died with the lock.

    If another process holds the lock, `overlap` decides: "wait" waits; "skip" raises LockHeld after a second. If no run
    has signed the lock, "skip" waits for a minute, because `try_lock` holds locks only for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        if overlap == "wait":
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            _lock_patiently(file.fileno(), path)
        died = _read_signature(path)
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps(asdict(Holder(os.getpid(), since, flow_run))) + "\n")
        file.flush()
        here = nullcontext(died)
        try:
            with here if database is None else postgres_lock.hold(database, path.name, flow_run, overlap) as died:
                yield died
        finally:
            file.truncate(0)


@contextmanager
def try_lock(path: Path, database: PostgresDatabase | None = None) -> Iterator[bool]:
    """Take the lock inside this context if it is free, without signing it. Yields whether it was free."""
    between_machines = nullcontext(True) if database is None else postgres_lock.try_lock(database, path.name)
    if not path.exists():
        with between_machines as is_free:
            yield is_free
        return
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            with between_machines as is_free:
                yield is_free


def find_holder(path: Path, database: PostgresDatabase | None = None) -> Holder | None:
    """Return the process that holds the lock now; None if the lock is free."""
    with try_lock(path) as is_free:
        if not is_free:
            return _read_signature(path)
    if database is None:
        return None
    with try_lock(path, database) as is_free:
        return None if is_free else postgres_lock.read_holder(database, path.name)


def _lock_patiently(descriptor: int, path: Path) -> None:
    """Take the lock, and wait for a moment if it is held. Raises LockHeld."""
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_signature(path)
            if time.monotonic() - began > (_PATIENCE_SECONDS if holder else _UNSIGNED_PATIENCE_SECONDS):
                raise LockHeld(holder) from None
        time.sleep(0.1)


def _read_signature(path: Path) -> Holder | None:
    return read_record(path, Holder)

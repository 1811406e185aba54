"""The lock between machines: a session advisory lock of PostgreSQL, in addition to the flock of locks.py.

The lock belongs to a connection that its holder keeps open. If the holder, its machine or its network dies, the
connection is lost and the server releases the lock: at once if the connection was closed, else within `FREED_SECONDS`,
because the server is set to probe the connection that often. So there is no stale lock to clean up here either. A
holder that releases the lock writes pid 0 into the table of holders, so the next holder knows whether the previous one
died.

A holder that lost its connection is still running. It notices before the server gives the lock to another process: a
thread sends a heartbeat over the connection every two seconds, and each publication sends one more right before
(`ensure_held`). If the connection breaks, for example because the server was restarted, the holder tries for some
seconds to connect again. The lock still belongs to it if the lock is free and no other process has signed it since.

A lock can still be lost in the milliseconds between the last heartbeat and the publication. The registry's own checks
cover that: it looks for a version before it makes one, and compares the champion with the one that the gate saw.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from typing import Any

from flows.state.lock_holder import Holder, LockHeld, Overlap
from flows.state.postgres import PostgresDatabase
from gptcore.errors import GPTCoreError

_IDLE_SECONDS, _INTERVAL_SECONDS, _PROBES = 5, 3, 3
FREED_SECONDS = _IDLE_SECONDS + _INTERVAL_SECONDS * _PROBES
"""The server releases the lock of an unreachable machine this long after its last heartbeat."""
_NOTICED_MILLISECONDS = 6000
_HEARTBEAT_SECONDS = 2.0
_GIVEN_UP_SECONDS = FREED_SECONDS - 5.0
"""A lock without an answered heartbeat for this long counts as lost, which is before the server releases it."""
_RETRY_SECONDS = 0.5
_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 1.0
_UNSIGNED_PATIENCE_SECONDS = 60.0
"""How long `hold` waits for a lock that no run has signed, as in locks.py."""
_CLIENT = {
    "keepalives_idle": _IDLE_SECONDS,
    "keepalives_interval": _INTERVAL_SECONDS,
    "keepalives_count": _PROBES,
    "tcp_user_timeout": _NOTICED_MILLISECONDS,
    "application_name": "gptflow lock",
}
_SERVER = f"""
    set tcp_keepalives_idle = {_IDLE_SECONDS};
    set tcp_keepalives_interval = {_INTERVAL_SECONDS};
    set tcp_keepalives_count = {_PROBES};
    set tcp_user_timeout = {1000 * FREED_SECONDS};
"""
_KEY = "hashtextextended('gptflow lock ' || %s, 0)"
_SIGN = """
    insert into gptflow.holders values (%s, %s, %s, %s, %s) on conflict (name) do update
    set host = excluded.host, pid = excluded.pid, since = excluded.since, flow_run = excluded.flow_run
"""
_RELEASE = "update gptflow.holders set pid = 0 where name = %s and since = %s"
_held: list["_Session"] = []


class LockLost(GPTCoreError):
    """The lock between machines was lost, so the run publishes nothing more."""


@contextmanager
def hold(database: PostgresDatabase, name: str, flow_run: str, overlap: Overlap) -> Iterator[Holder | None]:
    """Hold the lock `name` inside this context. Yields the previous holder if it died with the lock.

    If the lock is held, `overlap` decides: "wait" waits, "skip" raises LockHeld. Raises also DatabaseUnreachable.
    """
    database.prepare()
    session = _Session(database, name)
    try:
        session.acquire(overlap)
        died = read_holder(database, name)
        session.sign(flow_run)
        _held.append(session)
        session.start_heartbeat()
        try:
            yield died
        finally:
            _held.remove(session)
            session.release()
    finally:
        session.close()


@contextmanager
def try_lock(database: PostgresDatabase, name: str) -> Iterator[bool]:
    """Take the lock inside this context if it is free, without signing it. Yields whether it was free."""
    database.prepare()
    session = _Session(database, name)
    try:
        yield session.try_acquire()
    finally:
        session.close()


def read_holder(database: PostgresDatabase, name: str) -> Holder | None:
    """Return the process that signed the lock last, or None if that process has released it.

    If the lock is free, the process died with it.
    """
    with database.open_cursor() as cursor:
        cursor.execute("select pid, since, flow_run, host from gptflow.holders where name = %s", (name,))
        row = cursor.fetchone()
    return Holder(*row) if row and row[0] else None


def list_locks(database: PostgresDatabase) -> list[str]:
    """Return the names of all locks that a process has ever held."""
    with database.open_cursor() as cursor:
        cursor.execute("select name from gptflow.holders order by name")
        return [name for (name,) in cursor.fetchall()]


def ensure_held() -> None:
    """Check with the server that this process still holds each of its locks. Raises LockLost."""
    make_lock_check()()


def make_lock_check() -> Callable[[], None]:
    """Return `ensure_held` for the locks that are held now. The check raises LockLost after they were released too."""
    sessions = list(_held)

    def check_locks() -> None:
        for session in sessions:
            session.send_heartbeat()
        _raise_if_lost(sessions)

    return check_locks


def ensure_not_lost() -> None:
    """Check the locks by their latest heartbeats, without a query as in `ensure_held`. Raises LockLost."""
    _raise_if_lost(_held)


def _raise_if_lost(sessions: list["_Session"]) -> None:
    for session in sessions:
        if session.loss:
            raise LockLost(
                f"the lock {session.name} was lost, because the connection to {session.database.url} broke: "
                f"{session.loss}. Another machine may be working on the pipeline by now, so this run publishes "
                "nothing. Its checkpoints stay: the next run resumes from them."
            )


class _Session:
    """A connection that takes one lock."""

    def __init__(self, database: PostgresDatabase, name: str) -> None:
        self.database, self.name = database, name
        self.loss = ""
        """Why the lock was lost; empty while it is not."""
        self.signature: tuple[str, int, str, str] | None = None
        self.heartbeat, self.is_closed = threading.Lock(), threading.Event()
        self.connection = self._connect()
        self.answered_at = time.monotonic()

    def _connect(self, **options: int) -> Any:
        connection = self.database.connect(**{**_CLIENT, **options})
        with connection.cursor() as cursor:
            cursor.execute(_SERVER)
        return connection

    def try_acquire(self) -> bool:
        """Take the lock if it is free, and return whether it was."""
        return bool(self._query(f"select pg_try_advisory_lock({_KEY})", self.name))

    def acquire(self, overlap: Overlap) -> None:
        """Take the lock, and wait for it if `overlap` is "wait". Raises LockHeld."""
        # Python handles a signal between two queries, but not while a query waits in the server.
        began = time.monotonic()
        while not self.try_acquire():
            if overlap == "skip" and (waited := time.monotonic() - began) > _PATIENCE_SECONDS:
                holder = read_holder(self.database, self.name)
                if holder is not None or waited > _UNSIGNED_PATIENCE_SECONDS:
                    raise LockHeld(holder)
            time.sleep(_WAIT_SECONDS if overlap == "wait" else _PATIENCE_SECONDS / 4)

    def sign(self, flow_run: str) -> None:
        """Write this process into the table of holders."""
        since = datetime.now().astimezone().isoformat(timespec="microseconds")
        self.signature = (socket.gethostname(), os.getpid(), since, flow_run)
        with self.connection.cursor() as cursor:
            cursor.execute(_SIGN, (self.name, *self.signature))

    def release(self) -> None:
        """Record that the holder did not die; not for a lost lock, which may have another holder by now."""
        assert self.signature is not None, "only a signed lock is released"
        if not self.loss:
            with suppress(Exception), self.connection.cursor() as cursor:
                cursor.execute(_RELEASE, (self.name, self.signature[2]))

    def start_heartbeat(self) -> None:
        """Start the thread that sends heartbeats until the session is closed or the lock is lost."""
        threading.Thread(target=self._send_heartbeats, name=f"lock {self.name}", daemon=True).start()

    def _send_heartbeats(self) -> None:
        while not self.loss and not self.is_closed.wait(_HEARTBEAT_SECONDS):
            self.send_heartbeat()

    def send_heartbeat(self) -> None:
        """Check that the connection lives, and with it the lock; open it again if it broke. Sets `loss` on failure."""
        with self.heartbeat:
            why = ""
            while not self.loss:
                try:
                    if why:
                        self._reacquire()
                    self._query("select 1")
                except Exception as error:  # of any kind: without an answer the lock may be lost
                    why = why or str(error).strip().partition("\n")[0] or "it is closed"
                    is_over = time.monotonic() - self.answered_at > _GIVEN_UP_SECONDS
                    if is_over or self.is_closed.is_set() or isinstance(error, LockLost):
                        self.loss = f"{why}; {error}" if isinstance(error, LockLost) else why
                    else:
                        time.sleep(_RETRY_SECONDS)
                else:
                    self.answered_at = time.monotonic()
                    return

    def _reacquire(self) -> None:
        """Take the lock with a new connection. Raises LockLost if another process holds it, or has held it since."""
        with suppress(Exception):
            self.connection.close()
        self.connection = self._connect(connect_timeout=2)
        is_free = self.try_acquire()
        with self.connection.cursor() as cursor:
            cursor.execute("select host, pid, since, flow_run from gptflow.holders where name = %s", (self.name,))
            if cursor.fetchone() != self.signature:
                raise LockLost("another process has taken it meanwhile")
        if not is_free:
            raise RuntimeError("the server has not released it yet")

    def _query(self, sql: str, *parameters: str) -> Any:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return cursor.fetchone()[0]

    def close(self) -> None:
        """Close the connection, with which the server releases the lock."""
        self.is_closed.set()
        with suppress(Exception), closing(self.connection):
            pass

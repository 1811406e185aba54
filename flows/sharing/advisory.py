"""The lock between machines: a session advisory lock of PostgreSQL, beside the flock that keeps processes apart.

It belongs to a connection that its holder keeps open. Whoever dies, or whose machine or network does, loses the
connection, and the server frees the lock: at once where the connection is closed, within `FREED_SECONDS` where nobody
answers any more, because the server is told to ask that often. So there is no stale lock to clean up here either. Who
gives it back says so (pid 0 in the table of holders), so the next one knows whether the one before died.

A holder that was cut off lives on. It notices before the server gives the lock to somebody else: a thread asks over the
same connection every other second, and whatever publishes asks once more right before (`ensure_held`). A connection
that broke, because the server was started again, is made good for some seconds: the lock is still the holder's if it is
free and nobody has signed it since. Between the question and the publication lie milliseconds in which a lock can still
be lost; then the registry's own checks are left: a version is looked for before it is made, and the champion is
compared with the one that the gate saw.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from typing import Any

from flows.lock import Held, Holder, Overlap
from flows.sharing.database import Database
from gptcore.errors import GPTCoreError

_IDLE_SECONDS, _INTERVAL_SECONDS, _PROBES = 5, 3, 3
FREED_SECONDS = _IDLE_SECONDS + _INTERVAL_SECONDS * _PROBES
"""How long after its last sign of life the server takes to free the lock of a machine that is gone."""
_NOTICED_MILLISECONDS = 6000
_WATCH_SECONDS = 2.0
_GIVEN_UP_SECONDS = FREED_SECONDS - 5.0
"""A lock that could not be asked for so long counts as lost: before the server frees it."""
_AGAIN_SECONDS = 0.5
_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 1.0
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
_GIVE_BACK = "update gptflow.holders set pid = 0 where name = %s and since = %s"
_held: list["_Session"] = []


class LockLost(GPTCoreError):
    """The lock between machines was lost, so nothing is published any more."""


@contextmanager
def hold(database: Database, name: str, flow_run: str, overlap: Overlap) -> Iterator[Holder | None]:
    """Holds the lock `name` while this context lasts, and gives the holder before, if that one died with it.

    Raises Held if it is taken, or waits for it, as `overlap` says. Raises also DatabaseAway.
    """
    database.prepare()
    session = _Session(database, name)
    try:
        session.take(overlap)
        died = holder(database, name)
        session.sign(flow_run)
        _held.append(session)
        session.watch()
        try:
            yield died
        finally:
            _held.remove(session)
            session.give_back()
    finally:
        session.end()


@contextmanager
def taken(database: Database, name: str) -> Iterator[bool]:
    """Takes the lock at once if it is free, without signing it, and says whether it could."""
    database.prepare()
    session = _Session(database, name)
    try:
        yield session.is_taken()
    finally:
        session.end()


def holder(database: Database, name: str) -> Holder | None:
    """Who signed the lock and has not given it back: its holder, if it is held, else somebody who died with it."""
    with database.asked() as cursor:
        cursor.execute("select pid, since, flow_run, host from gptflow.holders where name = %s", (name,))
        found = cursor.fetchone()
    return Holder(*found) if found and found[0] else None


def known(database: Database) -> list[str]:
    """The names of all locks that somebody has ever held."""
    with database.asked() as cursor:
        cursor.execute("select name from gptflow.holders order by name")
        return [name for (name,) in cursor.fetchall()]


def ensure_held() -> None:
    """Asks the server whether every lock that this process holds is still its own. Raises LockLost."""
    guard()()


def guard() -> Callable[[], None]:
    """`ensure_held` for the locks that are held now: it goes on raising LockLost when they have been given back."""
    sessions = list(_held)

    def still_held() -> None:
        for session in sessions:
            session.ask()
        _raise_lost(sessions)

    return still_held


def ensure_not_lost() -> None:
    """As `ensure_held`, by what the watching thread has found: costs nothing. Raises LockLost."""
    _raise_lost(_held)


def _raise_lost(sessions: list["_Session"]) -> None:
    for session in sessions:
        if session.lost:
            raise LockLost(
                f"the lock {session.name} was lost, because the connection to {session.database.url} broke: "
                f"{session.lost}. Another machine may work on the pipeline by now, so this run publishes nothing. What "
                "was saved stays: the next run goes on from there."
            )


class _Session:
    """A connection that takes one lock."""

    def __init__(self, database: Database, name: str) -> None:
        self.database, self.name, self.lost = database, name, ""
        self.signature: tuple[str, int, str, str] | None = None
        self.asking, self.ending = threading.Lock(), threading.Event()
        self.connection = self._connected()
        self.answered_at = time.monotonic()

    def _connected(self, **options: int) -> Any:
        connection = self.database.connect(**{**_CLIENT, **options})
        with connection.cursor() as cursor:
            cursor.execute(_SERVER)
        return connection

    def is_taken(self) -> bool:
        """Takes the lock if it is free."""
        return bool(self._asked(f"select pg_try_advisory_lock({_KEY})", self.name))

    def take(self, overlap: Overlap) -> None:
        # Asked for again and again, and not waited for in the server: a signal is heard between two questions.
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self.is_taken():
            if overlap == "skip" and time.monotonic() > deadline:
                raise Held(holder(self.database, self.name))
            time.sleep(_WAIT_SECONDS if overlap == "wait" else _PATIENCE_SECONDS / 4)

    def sign(self, flow_run: str) -> None:
        since = datetime.now().astimezone().isoformat(timespec="microseconds")
        self.signature = (socket.gethostname(), os.getpid(), since, flow_run)
        with self.connection.cursor() as cursor:
            cursor.execute(_SIGN, (self.name, *self.signature))

    def give_back(self) -> None:
        """Says that its holder did not die; not of a lock that was lost, which may have another holder by now."""
        assert self.signature is not None, "what is given back was signed"
        if not self.lost:
            with suppress(Exception), self.connection.cursor() as cursor:
                cursor.execute(_GIVE_BACK, (self.name, self.signature[2]))

    def watch(self) -> None:
        threading.Thread(target=self._watch, name=f"lock {self.name}", daemon=True).start()

    def _watch(self) -> None:
        while not self.lost and not self.ending.wait(_WATCH_SECONDS):
            self.ask()

    def ask(self) -> None:
        """Whether the connection lives, and with it the lock; sets `lost` if not, and if it cannot be made good."""
        with self.asking:
            why = ""
            while not self.lost:
                try:
                    if why:
                        self._take_back()
                    self._asked("select 1")
                except Exception as error:  # of whatever kind: who cannot ask cannot know
                    why = why or str(error).strip().partition("\n")[0] or "it is closed"
                    is_over = time.monotonic() - self.answered_at > _GIVEN_UP_SECONDS
                    if is_over or self.ending.is_set() or isinstance(error, LockLost):
                        self.lost = f"{why}; {error}" if isinstance(error, LockLost) else why
                    else:
                        time.sleep(_AGAIN_SECONDS)
                else:
                    self.answered_at = time.monotonic()
                    return

    def _take_back(self) -> None:
        """Takes the lock with a new connection. Raises LockLost if somebody else has it, or has had it since."""
        with suppress(Exception):
            self.connection.close()
        self.connection = self._connected(connect_timeout=2)
        question = "select host, pid, since, flow_run from gptflow.holders where name = %s"
        is_free = self.is_taken()
        with self.connection.cursor() as cursor:
            cursor.execute(question, (self.name,))
            if cursor.fetchone() != self.signature:
                raise LockLost("somebody else has taken it meanwhile")
        if not is_free:
            raise RuntimeError("the server has not freed it yet")

    def _asked(self, question: str, *given: str) -> Any:
        with self.connection.cursor() as cursor:
            cursor.execute(question, given)
            return cursor.fetchone()[0]

    def end(self) -> None:
        self.ending.set()
        with suppress(Exception), closing(self.connection):
            pass

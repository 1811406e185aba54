"""The HTTP server under every app that gptflow serves: uvicorn, with limits that a client cannot exceed.

A request's header must arrive in time, idle connections end, and the number of connections has a limit that leaves
files for everything else. At the limit, the connection that has been idle longest is closed for a new one. So clients
that only hold connections, or a full table of file descriptors, delay the others by a second at most.
"""

import asyncio
import errno
import json
import logging
import resource
import socket
import time
from typing import Any

import h11
import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
HEADER_SECONDS = 10.0
"""How long a request's header may take to arrive."""
_BACKLOG = 64
"""Connections that asyncio accepts at once, before any of them can be refused."""
_QUEUE = 1024
"""Connections that wait in the kernel. If this queue is full, a client tries again after a second."""
_WANTED_FILES = 4096
_RESERVED_FILES = 6 * _BACKLOG
"""Descriptors kept for connections that were accepted and not yet counted, databases and logs."""
_MIN_CONNECTIONS = 16
_REPORT_SECONDS = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(__name__)


class Config(uvicorn.Config):
    """Uvicorn's configuration with the limits. `options` are uvicorn's own."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, loop="asyncio", http=Protocol, backlog=_BACKLOG, **options)
        self.max_connections = _choose_max_connections()


class Server(uvicorn.Server):
    """Uvicorn's server. It keeps running when the process or the machine is out of file descriptors."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, with a longer queue in the kernel."""
        self._last_report = -_REPORT_SECONDS
        asyncio.get_running_loop().set_exception_handler(self.handle_loop_error)
        await super().startup(sockets)
        for listener in (listener for server in self.servers for listener in server.sockets):
            with socket.fromfd(listener.fileno(), listener.family, listener.type) as same:
                same.listen(_QUEUE)  # asyncio has one number for this queue and for _BACKLOG

    def handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Close idle connections if none can be accepted; asyncio tries again in a second. Log other errors."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _EXHAUSTED):
            loop.default_exception_handler(context)
            return
        for connection in _find_idle(self.server_state.connections)[:_BACKLOG]:
            connection.transport.abort()
        if time.monotonic() - self._last_report >= _REPORT_SECONDS:
            self._last_report = time.monotonic()
            _log.warning("no connection could be accepted (%s); idle connections were closed", error.strerror)


class Protocol(H11Protocol):
    """One connection of HTTP/1.1."""

    config: Config
    idle_since = 0.0
    """When the connection was made or its last request was answered, by the event loop's clock."""
    header_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way: no header has arrived completely, or the last request is answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch a new connection. If there are too many, close the one that has been idle longest, perhaps this one."""
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        if len(self.connections) > self.config.max_connections:
            _find_idle(self.connections)[0].transport.abort()
        self.watch_header()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self.watch_header()

    def watch_header(self) -> None:
        """Close the connection if the next request's header takes longer than HEADER_SECONDS, even if bytes arrive.

        Between two requests, uvicorn's own timer runs until the first byte.
        """
        if self.is_idle and self.transport.get_protocol() is self:  # else it is a WebSocket now
            if self.header_timer is None:
                self.header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        else:
            self.stop_watching()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with an error in the form of all other errors, and close the connection."""
        error = {"message": msg, "type": "invalid_request_error", "param": None, "code": "malformed_request"}
        body = json.dumps({"error": error}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def stop_watching(self) -> None:
        """Stop the timer."""
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def on_response_complete(self) -> None:
        """Record when the connection became idle."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of a connection that has ended."""
        self.stop_watching()
        super().connection_lost(exc)


def _find_idle(connections: Any) -> list[Protocol]:
    """Return the idle connections that are open, those that have been idle longest first."""
    own = [connection for connection in connections if isinstance(connection, Protocol)]
    idle = [connection for connection in own if connection.is_idle and not connection.transport.is_closing()]
    return sorted(idle, key=lambda connection: connection.idle_since)


def _choose_max_connections() -> int:
    """Raise the limit of open files if it is low, and return how many connections leave enough files over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    free = soft - psutil.Process().num_fds() - _RESERVED_FILES
    return max(_MIN_CONNECTIONS, min(MAX_CONNECTIONS, free))

"""The server's limits: half a header, idle connections, and a table of file descriptors that is full."""

import asyncio
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from flows.web import server as web_server
from flows.web.server import Config, Server
from tests.servers import clean, wait_for

WHOLE = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
HALF = WHOLE[:-4] + b"\r\nx-half: "
WAITING = WHOLE.replace(b"/ ", b"/waiting ", 1)


class App:
    """Answers at once, or the request of `/waiting` as soon as the test releases it."""

    def __init__(self) -> None:
        self.released, self.num_waiting = False, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_waiting += scope["path"] == "/waiting"
        while scope["path"] == "/waiting" and not self.released:
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})


@contextmanager
def served(app: App, max_connections: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Server]]:
    """Serve the app in a thread, and yield the port and the server."""
    monkeypatch.setattr(web_server, "_choose_max_connections", lambda: max_connections)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(Config(app, lifespan="off", log_config=None, timeout_keep_alive=60))
    thread = Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_for(lambda: server.started, 20)
        yield listener.getsockname()[1], server
    finally:
        app.released = server.should_exit = True
        thread.join(20)


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(sent)
    return client


def get(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20) as response:
        return bytes(response.read())


def send_until_closed(client: socket.socket, more: bytes) -> None:
    """Send a little more again and again, until the server closes the connection."""
    client.settimeout(0.05)
    for _ in range(400):
        try:
            if client.recv(1000) == b"":
                return
        except TimeoutError:
            client.sendall(more)
        except ConnectionError:
            return
    raise AssertionError("the server still waits for the header")


def test_half_a_header_ends_in_time_and_a_request_under_way_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "HEADER_SECONDS", 0.3)
    app = App()
    with served(app, 100, monkeypatch) as (port, _), connect(port, WAITING) as waiting:
        with connect(port) as silent, connect(port, HALF) as half, connect(port, WHOLE) as second:
            assert b"200 OK" in second.recv(1000)
            second.sendall(HALF)  # of the connection's second request
            for client, more in ((silent, b""), (half, b"x"), (second, b"x")):
                send_until_closed(client, more)
        app.released = True
        assert b"200 OK" in waiting.recv(1000)


def test_more_than_a_thousand_idle_connections_leave_room_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    with served(app, 20, monkeypatch) as (port, server), connect(port, WAITING) as waiting, ExitStack() as opened:
        wait_for(lambda: app.num_waiting, 20)
        idle = [opened.enter_context(connect(port, sent)) for sent in (b"", HALF, WHOLE) for _ in range(400)]
        assert get(port) == b"here" and len(idle) == 1200
        assert len(server.server_state.connections) <= 20
        app.released = True
        assert b"200 OK" in waiting.recv(1000), "a request under way is not idle"


def test_a_full_table_of_descriptors_costs_only_idle_connections(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.web.crowded", str(tmp_path), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean(), text=True) as process, ExitStack() as opened:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            wait_for(lambda: get(port) == b"here", 20)
            for _ in range(300):
                opened.enter_context(connect(port))
            assert get(port) == b"here" and process.poll() is None
        finally:
            process.kill()

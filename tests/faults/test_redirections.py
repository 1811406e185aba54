"""Servers that redirect to addresses that they may not choose: real servers, on this machine.

If a server has to be a public one, its name resolves to a public address when the code checks the address, and to this
machine when the code connects to it.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from gptcore.corpus import http
from gptcore.errors import CorpusError
from tests.corpus.test_sources import read_sources

PUBLIC = {"one.example": ["93.184.215.14"], "two.example": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c"]}
TWO_FACED = {"two-faced.example": ["93.184.215.14", "127.0.0.1"], "inside.example": ["10.1.2.3"]}


class Handler(BaseHTTPRequestHandler):
    """A server that redirects /to/ADDRESS to ADDRESS, and /again to itself. Any other path returns the text."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        location = unquote(self.path.removeprefix("/to/")) if self.path.startswith("/to/") else None
        location = "/again" if self.path == "/again" else location
        self.send_response(200 if location is None else 302)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", "4" if location is None else "0")
        self.end_headers()
        self.wfile.write(b"text" if location is None else b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of public addresses at which this machine answers."""
    resolve: Callable[..., Any] = socket.getaddrinfo

    def known(host: str, port: Any, *given: Any, **more: Any) -> Any:
        addresses = {**PUBLIC, **TWO_FACED}.get(host)
        if addresses is None:
            return resolve(host, port, *given, **more)
        if port is not None:
            return resolve("127.0.0.1", port, *given, **more)
        return [entry for address in addresses for entry in resolve(address, None)]

    monkeypatch.setattr(socket, "getaddrinfo", known)


def fetched(url: str, tmp_path: Path) -> bytes:
    found = read_sources([url], tmp_path)
    return b"".join(next(found).chunks)


def sending(server: Any, there: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{server.server_port}/to/{quote(there, safe='')}"


def test_a_server_may_redirect_within_its_network_and_to_a_wider_one(tmp_path: Path, server: Any, names: None) -> None:
    port = server.server_port
    for start, there in (
        ("127.0.0.1", "/a.txt"),
        ("127.0.0.1", f"//localhost:{port}/a.txt"),
        ("127.0.0.1", f"http://one.example:{port}/b.txt"),
        ("one.example", "../a.txt"),
        ("one.example", f"http://two.example:{port}/c.txt"),
        ("two.example", sending(server, f"http://one.example:{port}/d.txt", "one.example")),
    ):
        assert fetched(sending(server, there, start), tmp_path) == b"text"


@pytest.mark.parametrize(
    "there", ["file:///etc/passwd", "ftp://127.0.0.1/a.txt", "data:,text", "gopher://x/", "s3://x/y"]
)
def test_a_redirection_to_another_scheme_is_refused(tmp_path: Path, server: Any, there: str) -> None:
    with pytest.raises(
        CorpusError, match=r"which is not followed: only http and https addresses are\. If you want its text, write"
    ):
        fetched(sending(server, there), tmp_path)


INWARD = [
    *("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1"),
    *("10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fd00::1]", "inside.example", "two-faced.example"),
    *("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[2002:7f00:1::]"),
]


@pytest.mark.parametrize("host", INWARD)
def test_a_redirection_from_a_public_server_to_a_private_address_is_refused(
    tmp_path: Path, server: Any, names: None, host: str
) -> None:
    there = f"http://{host}:{server.server_port}/secret.txt"
    with pytest.raises(CorpusError, match="which is not followed: it is an address of a narrower network") as caught:
        fetched(sending(server, there, "one.example"), tmp_path)
    assert host in str(caught.value) and "write that address itself in corpus.sources" in str(caught.value)
    assert not [path for path in server.asked if path == "/secret.txt"]
    with pytest.raises(CorpusError, match="not followed"):  # nor by way of another public server
        fetched(sending(server, sending(server, there, "two.example"), "one.example"), tmp_path)
    assert not [path for path in server.asked if path == "/secret.txt"]


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]"])
def test_a_redirection_to_a_link_local_address_is_refused_even_from_this_machine(
    tmp_path: Path, server: Any, host: str
) -> None:
    with pytest.raises(CorpusError, match="narrower network"):
        fetched(sending(server, f"http://{host}/latest/meta-data/"), tmp_path)


def test_a_redirection_from_a_private_network_to_this_machine_is_refused(
    tmp_path: Path, server: Any, names: None
) -> None:
    with pytest.raises(CorpusError, match="narrower network"):
        fetched(sending(server, f"http://localhost:{server.server_port}/secret.txt", "inside.example"), tmp_path)


def test_an_address_that_a_redirection_may_not_reach_can_be_a_source(tmp_path: Path, server: Any, names: None) -> None:
    assert fetched(f"http://inside.example:{server.server_port}/a.txt", tmp_path) == b"text"
    assert fetched(f"http://two-faced.example:{server.server_port}/a.txt", tmp_path) == b"text"


def test_a_redirection_from_https_to_http_is_refused() -> None:
    with pytest.raises(CorpusError, match="from https to http the text could be altered"):
        http._resolve_redirection("https://a.example/x", "https://a.example/x", "http://a.example/x")
    assert (
        http._resolve_redirection("http://127.0.0.1/", "http://127.0.0.1/", "https://127.0.0.1/x")
        == "https://127.0.0.1/x"
    )


@pytest.mark.parametrize("there", ["http://[::1", "https:///x", "http://a:b/"])
def test_a_redirection_to_an_invalid_address_is_refused(tmp_path: Path, server: Any, there: str) -> None:
    with pytest.raises(CorpusError, match="which is not"):
        fetched(sending(server, there), tmp_path)


def test_a_redirection_loop_is_refused_after_ten_redirections(tmp_path: Path, server: Any) -> None:
    with pytest.raises(CorpusError, match="redirects more than 10 times"):
        fetched(f"http://127.0.0.1:{server.server_port}/again", tmp_path)
    assert len(server.asked) == 11

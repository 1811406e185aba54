"""The guard in front of an app that only says what arrived: which hosts and which pages get through."""

import asyncio
from typing import Any

import pytest

from flows.web.guard import Guard, parse_allowed_hosts

PORT = 4200
PROXY = ("gpu.example.org", "box:4200")


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(kind: str, headers: list[tuple[str, str]], guard: Guard) -> list[dict[str, Any]]:
    """Send one request or handshake, and return what is sent back."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": f"{kind}.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "method": "POST", "path": "/", "headers": encoded, "server": ("127.0.0.1", PORT)}
    asyncio.run(guard(scope, receive, send))
    return sent


def answer(headers: list[tuple[str, str]], listens_at: str = "127.0.0.1", allowed_hosts: Any = ()) -> int:
    """Return the status of an HTTP request. A WebSocket with the same headers must have the same fate."""
    guard = Guard(app, listens_at, allowed_hosts)
    start, *_ = ask("http", headers, guard)
    (first,) = ask("websocket", headers, guard)
    assert first["type"] == ("websocket.accept" if start["status"] == 200 else "websocket.close")
    return int(start["status"])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:4200", 200),
        ("localhost:4200", 200),
        ("LocalHost:4200", 200),
        ("[::1]:4200", 200),
        ("localhost", 200),
        ("localhost:14200", 200),  # a forwarded port
        ("gpu.example.org", 200),
        ("gpu.example.org:8443", 200),
        ("box:4200", 200),
        ("box:4201", 400),
        ("box", 400),
        ("evil.example:4200", 400),
        ("localhost.evil.example:4200", 400),
        ("127.0.0.1.evil.example", 400),
        ("evil.example#localhost", 400),
        ("user@localhost:4200", 400),
        ("192.168.0.7:4200", 400),
        ("0.0.0.0:4200", 400),
        ("[::1", 400),
        ("[::1]evil", 400),
        ("localhost:4200:4200", 400),
        ("localhost:x", 400),
        ("", 400),
        ("lo cal", 400),
        ("\xff", 400),
    ],
)
def test_only_loopback_names_and_allowed_hosts_are_answered(host: str, status: int) -> None:
    assert answer([("host", host)], allowed_hosts=PROXY) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:4200", 200),
        ("http://localhost:4200", 200),
        ("HTTP://LOCALHOST:4200", 200),
        ("http://[::1]:4200", 200),
        ("https://localhost:4200", 200),
        ("http://gpu.example.org", 200),
        ("https://gpu.example.org", 200),
        ("https://gpu.example.org:8443", 200),
        ("http://box:4200", 200),
        ("http://localhost:4201", 403),  # another server of this machine
        ("http://localhost", 403),
        ("http://box", 403),
        ("https://evil.example", 403),
        ("http://evil.example:4200", 403),
        ("http://gpu.example.org.evil.example", 403),
        ("ftp://localhost:4200", 403),
        ("chrome-extension://abcdefghijklmnop", 403),
        ("null", 403),
        ("", 400),
        ("http://[", 400),
        ("http://[::1", 400),
        ("http://localhost:99999999", 400),
        ("http://localhost:x", 400),
        ("http://localhost:4200/", 400),
        ("http://user@localhost:4200", 400),
        ("http://localhost:4200 http://evil.example", 400),
        ("localhost:4200", 400),
        ("//localhost:4200", 400),
        ("file://", 400),
        ("\xff", 400),
    ],
)
def test_only_pages_of_this_server_and_of_allowed_hosts_are_answered(origin: str, status: int) -> None:
    assert answer([("host", "127.0.0.1:4200"), ("origin", origin)], allowed_hosts=PROXY) == status


def test_a_page_may_use_the_loopback_address_that_it_came_from() -> None:
    """A browser on another machine sees a forwarded port."""
    assert answer([("host", "localhost:14200"), ("origin", "http://localhost:14200")]) == 200
    assert answer([("host", "localhost:14200"), ("origin", "http://localhost:14201")]) == 403
    assert answer([("host", "evil.example"), ("origin", "http://evil.example")]) == 400


def test_a_server_on_the_network_answers_to_its_addresses_but_not_to_any_name() -> None:
    page = ("origin", "http://192.168.0.7:4200")
    for listens_at in ("0.0.0.0", "192.168.0.7", "::"):
        assert answer([("host", "192.168.0.7:4200")], listens_at) == 200
        assert answer([("host", "[fe80::1]:4200")], listens_at) == 200
        assert answer([("host", "192.168.0.7:4200"), page], listens_at) == 200
        assert answer([("host", "192.168.0.8:4200"), page], listens_at) == 403
        assert answer([("host", "evil.example:4200")], listens_at) == 400
    assert answer([("host", "gpu-box:4200")], "gpu-box") == 200


def test_missing_and_repeated_headers_are_malformed() -> None:
    host, origin = ("host", "localhost:4200"), ("origin", "http://localhost:4200")
    assert answer([]) == 400
    assert answer([host, host]) == 400
    assert answer([host, origin, origin]) == 400
    assert answer([host, origin, ("origin", "null")]) == 400


def test_no_other_site_may_show_a_page_in_a_frame() -> None:
    start, _ = ask("http", [("host", "localhost")], Guard(app))
    assert (b"x-frame-options", b"SAMEORIGIN") in start["headers"]


def test_allowed_hosts_are_names_without_scheme_and_wildcard() -> None:
    assert parse_allowed_hosts(" GPU.example.org, box:4200 ,") == PROXY
    assert parse_allowed_hosts("") == ()
    for wrong in ("*", "https://box", "box/", "*.example.org", "box:"):
        with pytest.raises(ValueError, match="NAME or NAME:PORT"):
            parse_allowed_hosts(wrong)

"""The guard around every server that gptflow starts: it keeps web pages in a browser from using the server.

A browser on this machine can reach 127.0.0.1, and a web page of any site can make it send requests there. The browser
names the page's site as Origin. After DNS rebinding (the site's own name suddenly means 127.0.0.1) it names the site as
Host. So the guard checks both headers of every HTTP request and every WebSocket handshake. It also forbids other sites
to show the server's pages in a frame, where they could trick a person into a click. Programs send no Origin, and are
not stopped by it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
_HOST = r"(?P<name>[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
_ORIGIN = rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>{_HOST})"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_POLICY_VIOLATION = 1008
"""The code that closes a refused WebSocket. The server answers its handshake with 403."""


def parse_allowed_hosts(text: str) -> tuple[str, ...]:
    """Return the entries of a comma-separated list of NAME or NAME:PORT. Raises ValueError for anything else."""
    entries = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not re.fullmatch(_HOST, entry):
            raise ValueError(f"{entry!r} is not a host (expected NAME or NAME:PORT, without a scheme and without *)")
    return entries


@dataclass(frozen=True)
class _Refusal:
    status: int
    code: str
    message: str


class Guard:
    """Passes on the requests of programs and of the server's own pages, and refuses all others.

    A Host must be a name of this machine's loopback interface, with any port, as after forwarding. `allowed_hosts` adds
    names, such as that of a reverse proxy: NAME with any port, or NAME:PORT. If the server listens beyond loopback
    (`listens_at`), any IP address is accepted too: DNS rebinding needs a name. An Origin must be the Host itself, a
    loopback name with this server's port, or an allowed host.
    """

    def __init__(self, app: ASGIApp, listens_at: str = "127.0.0.1", allowed_hosts: Collection[str] = ()) -> None:
        self.app, self.allowed_hosts = app, frozenset(allowed_hosts)
        self.network_address = None if is_loopback(listens_at) else listens_at.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request or handshake on, or refuse it with 400 or 403."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif refusal := self.check(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.code})
            else:
                error = {"message": refusal.message, "type": "permission_error", "param": None, "code": refusal.code}
                await JSONResponse({"error": error}, refusal.status)(scope, receive, send)
        else:
            await self.app(scope, receive, send if scope["type"] == "websocket" else _forbid_frames(send))

    def check(self, scope: Scope) -> _Refusal | None:
        """Return why the request is refused; None if it is not."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = re.fullmatch(_HOST, hosts[0].lower()) if len(hosts) == 1 else None
        if host is None:
            return _Refusal(400, "malformed_host", "the request needs one Host header: a name, and perhaps a port")
        if not self.is_own(host["name"], host["port"]):
            message = f"this server does not answer as {host[0]!r:.100} (expected localhost or 127.0.0.1). If that is "
            return _Refusal(400, "foreign_host", message + "its name, start it with --allowed-hosts and the name")
        if not origins or origins == ["null"]:
            return _refuse_origin("null") if origins else None
        origin = re.fullmatch(_ORIGIN, origins[0].lower()) if len(origins) == 1 else None
        if origin is None:
            return _Refusal(400, "malformed_origin", "the Origin header must be SCHEME://HOST or SCHEME://HOST:PORT")
        port = int(origin["port"] or _DEFAULT_PORTS.get(origin["scheme"], 0))
        is_page_of_host = origin["host"] == host[0]
        is_page_of_server = origin["name"] in LOOPBACK and port == (scope.get("server") or (None, None))[1]
        is_allowed = not self.allowed_hosts.isdisjoint((origin["name"], f"{origin['name']}:{port}"))
        if origin["scheme"] not in _DEFAULT_PORTS or not (is_page_of_host or is_page_of_server or is_allowed):
            return _refuse_origin(origins[0])
        return None

    def is_own(self, name: str, port: str | None) -> bool:
        """Whether a Host header names this server."""
        ports = (port,) if port else _DEFAULT_PORTS.values()
        if name in LOOPBACK or not self.allowed_hosts.isdisjoint((name, *(f"{name}:{port}" for port in ports))):
            return True
        return self.network_address is not None and (name == self.network_address or _is_address(name.strip("[]")))


def is_loopback(host: str) -> bool:
    """Whether a server that listens at `host`, a name or an address, can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _refuse_origin(origin: str) -> _Refusal:
    return _Refusal(403, "cross_origin", f"this server does not answer requests of web pages from {origin:.100}")


def _forbid_frames(send: Send) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("x-frame-options", "SAMEORIGIN")
        await send(message)

    return send_with_header

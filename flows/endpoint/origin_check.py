"""A middleware that keeps a web page in someone's browser from using a server on the same machine.

A page can send requests to 127.0.0.1. Its browser then sends the page's own host as Origin or, after DNS rebinding, as
Host. Both headers are checked. app.py also refuses a body that is not sent as JSON, because a page may send other
types without a preflight request.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.endpoint.protocol import error_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def allowed_hosts(host: str) -> list[str]:
    """Return the Host headers to accept if the server listens at `host`: the names of this machine, or `*` for any."""
    return [*LOOPBACK, "[::1]", host] if host in LOOPBACK or host.startswith("127.") else ["*"]


class SameOrigin:
    """Refuses requests of web pages from other origins."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it with 403."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            message = f"this server does not answer requests of web pages from {origin}"
            refusal = JSONResponse(error_body(message, "permission_error", code="cross_origin"), 403)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

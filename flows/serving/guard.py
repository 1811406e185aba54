"""What a web page in somebody's browser must not do: drive a server on their machine.

A page can send requests to 127.0.0.1. Its browser names the page's own host as Origin or, after DNS rebinding, as Host:
both are looked at. A body that is not sent as JSON is refused too: that is what a page may send without asking first.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.serving.protocol import error_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hosts_of(host: str) -> list[str]:
    """The names under which a server that listens at `host` may be asked: of this machine, or any."""
    return [*LOOPBACK, "[::1]", host] if host in LOOPBACK or host.startswith("127.") else ["*"]


class SameOrigin:
    """Refuses requests of pages that came from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            message = f"requests of web pages from {origin} are not answered"
            refusal = JSONResponse(error_body(message, "permission_error", code="cross_origin"), 403)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

"""Who may use the endpoint, and what is logged about every request.

`AccessLog` is around everything else, so that refusals of the guard and of `KeyCheck` are logged too.
"""

import hmac
import json
import logging
import os
import re
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.endpoint.metrics import Metrics
from flows.endpoint.protocol import error_body
from gptcore.errors import ConfigError

KEY_VARIABLE = "GPTFLOW_API_KEY"
_WITHOUT_KEY = ("/health", "/")
"""Paths that need no key: what watches the server need not know it, and the page asks its reader for it."""
_PROBES = ("/health", "/metrics")
"""Paths that programs ask for all the time. Only their failures are logged."""
_REQUEST_ID = r"[A-Za-z0-9._-]{1,64}"
_FIELDS = "gptflow.log"
_MAX_LOGGED_PATH = 200
_log = logging.getLogger(__name__)


def read_key(file: Path | None) -> str | None:
    """Return the key in the file, else that in GPTFLOW_API_KEY, else None.

    Raises ConfigError if there are both, if the file cannot be read, or if the key is empty or cannot be sent.
    """
    value = os.environ.get(KEY_VARIABLE)
    if file is None and value is None:
        return None
    origin = KEY_VARIABLE if file is None else str(file)
    if file is not None:
        if value is not None:
            raise ConfigError(f"{file} has a key and {KEY_VARIABLE} is set too. Leave one of them out.")
        try:
            value = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"the key in {file} cannot be read: {reason}.") from None
    key = (value or "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"{origin} has no key (expected letters, digits and signs of ASCII, without spaces).")
    return key


def add_to_log(scope: Scope, **fields: Any) -> None:
    """Add fields to what is logged about a request when it ends."""
    scope.setdefault(_FIELDS, {}).update(fields)


class KeyCheck:
    """Refuses requests without the key, with 401."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it has the key or needs none."""
        if scope["type"] != "http" or scope["path"] in _WITHOUT_KEY or self.has_key(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        message = "the request has no valid key: send the server's key as Authorization: Bearer KEY"
        body = error_body(message, "invalid_request_error", code="invalid_api_key")
        await JSONResponse(body, 401, {"www-authenticate": "Bearer"})(scope, receive, send)

    def has_key(self, headers: Headers) -> bool:
        """Whether the headers have the key. The time that this takes does not depend on the key's characters."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key)


class AccessLog:
    """Gives each request an id, and logs one JSON object when the answer has been sent or the client is gone.

    The id is the client's X-Request-ID if there is one. The answer has it as X-Request-ID too. An error is logged with
    its message.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(_REQUEST_ID, given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 500
        scope[_FIELDS] = {}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif status >= 400 and message.get("body"):
                add_to_log(scope, **_read_error(message["body"]))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.metrics.count_http(scope["path"], status)
            if scope["path"] not in _PROBES or status >= 400:
                _log.info("%s", _format(scope, request_id, status, time.perf_counter() - began))


def _read_error(body: bytes) -> dict[str, Any]:
    """Return the message of an answer with an error."""
    try:
        return {"error": str(json.loads(body)["error"]["message"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _format(scope: Scope, request_id: str, status: int, seconds: float) -> str:
    """Return the line of the log. JSON escapes whatever could break the line."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": request_id,
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"][:_MAX_LOGGED_PATH],
        "status": status,
        "seconds": round(seconds, 4),
        **scope.get(_FIELDS, {}),
    }
    return json.dumps(record)

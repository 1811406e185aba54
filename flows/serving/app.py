"""The endpoint: its routes, and what every request must be."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.serving.completion import Completion, EventStream
from flows.serving.following import Following
from flows.serving.guard import SameOrigin, hosts_of
from flows.serving.protocol import Refused, error_body, parse
from flows.serving.writer import Writer

MOST_BODY_BYTES = 2**20
BODY_SECONDS = 30.0
"""How long a request's body may take to arrive."""
_log = logging.getLogger(__name__)


def create_app(following: Following, writer: Writer, most_tokens: int, host: str = "127.0.0.1") -> FastAPI:
    """The endpoint of what `following` serves. `most_tokens` bounds max_tokens; `host` is where it will listen."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        writer.start(asyncio.get_running_loop())
        yield
        writer.end("the server has stopped")

    app = FastAPI(title="gptflow", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(SameOrigin)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts_of(host), www_redirect=False)
    app.add_exception_handler(Refused, _refusal)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _own_error)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse(_health(following, writer), 200 if writer.takes_orders else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(following)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(following, name)
        return _described(following)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(await _body(request))
        _check_name(following, asked.model)
        if asked.max_tokens > most_tokens:
            raise Refused(f"max_tokens is {asked.max_tokens}; this server writes at most {most_tokens}", "max_tokens")
        writing = await Completion.of(asked, following.served, writer.most)
        writing.begin(writer)
        return EventStream(writing) if asked.stream else await writing.whole(request)

    return app


def _check_name(following: Following, name: str) -> None:
    if name not in (names := following.names):
        message = f"the model {name!r:.100} is not served here; {names[0]} is"
        raise Refused(message, "model", status=404, code="model_not_found")


def _described(following: Following) -> dict[str, Any]:
    served = following.served
    about = {"id": following.names[0], "object": "model", "created": served.created, "owned_by": "gptflow"}
    return {**about, "version": served.version, "context_length": served.loaded.model.context_length}


def _health(following: Following, writer: Writer) -> dict[str, Any]:
    writing, waiting = writer.counts
    return {
        "status": "ok" if writer.takes_orders else "stopping",
        "model": following.names[0],
        "version": following.served.version,
        "problem": following.problem,
        "writing": writing,
        "waiting": waiting,
    }


async def _body(request: Request) -> bytes:
    """Raises Refused for what is no JSON by its type, too large, or too slow."""
    if (kind := request.headers.get("content-type", "").partition(";")[0].strip().lower()) != "application/json":
        raise Refused(f"the content type is {kind or 'missing'}; send application/json", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise Refused(f"the body is larger than {MOST_BODY_BYTES} bytes", status=413)
    except TimeoutError:
        raise Refused(f"the body did not arrive within {BODY_SECONDS:.0f} s", status=408) from None
    return bytes(body)


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    line = f"{request.method} {request.url.path}: {error.status}, {error}"
    _log.info("%s", line.encode("unicode_escape").decode())  # a line stays one, whatever was asked for
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. There are /v1/completions, /v1/models and /health"
    code, headers = error.detail.lower().replace(" ", "_"), error.headers
    return JSONResponse(error_body(message, "invalid_request_error", code=code), error.status_code, headers)


async def _own_error(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(f"the server failed: {type(error).__name__}", "server_error"), 500)

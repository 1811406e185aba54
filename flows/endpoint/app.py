"""The endpoint's routes, and the checks that every request passes. See server.py for the process around it."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from flows.endpoint import openapi, page
from flows.endpoint.access import AccessLog, KeyCheck
from flows.endpoint.completion import Completion, EventStream
from flows.endpoint.followed_version import FollowedVersion
from flows.endpoint.metrics import CONTENT_TYPE
from flows.endpoint.protocol import RequestError, error_body, parse
from flows.endpoint.scheduler import Scheduler
from flows.web.guard import Guard

MAX_BODY_BYTES = 2**20
BODY_SECONDS = 30.0
"""How long a request's body may take to arrive."""


def create_app(
    followed: FollowedVersion,
    scheduler: Scheduler,
    max_tokens: int,
    host: str = "127.0.0.1",
    allowed_hosts: Collection[str] = (),
    key: str | None = None,
    has_page: bool = True,
) -> FastAPI:
    """Return the application that serves `followed`, behind the guard and, if there is a key, the check of it.

    A request may ask for up to `max_tokens` tokens per text. `host` is the address at which the server will listen, and
    `allowed_hosts` are other names by which clients reach it. `has_page` serves the page for people at `/`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start(asyncio.get_running_loop())
        yield
        scheduler.stop("the server has stopped")

    app = FastAPI(title="gptflow", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    # The one that is added last is called first.
    if key is not None:
        app.add_middleware(KeyCheck, key=key)
    app.add_middleware(Guard, listens_at=host, allowed_hosts=allowed_hosts)
    app.add_middleware(AccessLog, metrics=scheduler.metrics)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_other_error)

    _add_status(app, followed, scheduler)
    if has_page:
        app.add_api_route("/", page.make_response)
        app.add_api_route("/card", lambda: PlainTextResponse(followed.current.card))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe_model(followed)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(followed, name)
        return _describe_model(followed)

    @app.post("/v1/completions")
    async def completions(http_request: Request) -> Response:
        request = parse(await _read_body(http_request))
        _check_name(followed, request.model)
        if request.max_tokens > max_tokens:
            message = f"max_tokens is {request.max_tokens}; this server generates at most {max_tokens} per text"
            raise RequestError(message, "max_tokens")
        completion = await Completion.create(request, followed.current, scheduler)
        completion.submit(http_request.scope)
        return EventStream(completion) if request.stream else await completion.respond(http_request)

    return app


def _add_status(app: FastAPI, followed: FollowedVersion, scheduler: Scheduler) -> None:
    """Add the routes that say how the server does and what it can do."""

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse(_describe_health(followed, scheduler), 200 if scheduler.accepts_requests else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(scheduler.metrics.render(followed, *scheduler.counts), media_type=CONTENT_TYPE)

    @app.get("/openapi.json")
    async def description() -> dict[str, Any]:
        return openapi.describe()


def _check_name(followed: FollowedVersion, name: str) -> None:
    if name not in (names := followed.names):
        message = f"the model {name!r:.100} is not served here (expected {names[0]})"
        raise RequestError(message, "model", status=404, code="model_not_found")


def _describe_model(followed: FollowedVersion) -> dict[str, Any]:
    current = followed.current
    described = {"id": followed.names[0], "object": "model", "created": current.created, "owned_by": "gptflow"}
    return {**described, "version": current.version, "context_length": current.loaded.model.context_length}


def _describe_health(followed: FollowedVersion, scheduler: Scheduler) -> dict[str, Any]:
    running, waiting = scheduler.counts
    return {
        "status": "ok" if scheduler.accepts_requests else "stopping",
        "model": followed.names[0],
        "version": followed.current.version,
        "problem": followed.problem,
        "writing": running,
        "waiting": waiting,
    }


async def _read_body(http_request: Request) -> bytes:
    """Read the body. Raises RequestError if its type is not JSON, or if it is too large or too slow."""
    kind = http_request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type is {kind or 'missing'}; send application/json", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http_request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS:.0f} s", status=408) from None
    return bytes(body)


async def _answer_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_http_error(http_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    route = f"{http_request.method} {http_request.url.path}"
    message = f"{route}: {error.detail}. /openapi.json describes what this server answers"
    code, headers = error.detail.lower().replace(" ", "_"), error.headers
    return JSONResponse(error_body(message, "invalid_request_error", code=code), error.status_code, headers)


async def _answer_other_error(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(f"the server failed: {type(error).__name__}", "server_error"), 500)

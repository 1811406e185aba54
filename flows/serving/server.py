"""`gptflow serve-model`: the endpoint as a process, from the port that it takes to the second Ctrl-C.

What takes seconds to import is imported once the port is taken.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

import uvicorn

from flows.state import StateRoot
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from flows.serving.writer import Writer

GRACE_SECONDS = 20.0
"""How long texts under way may take to end when the server stops."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    host: str
    port: int
    max_concurrent: int
    max_queue: int
    max_tokens: int
    quantize: str | None


def serve(root: StateRoot, uri: str, options: Options) -> None:
    """Serves what `uri` names, with or without models:/ in front, until SIGINT or SIGTERM.

    Raises UnknownVersion, GPTCoreError if the port is taken, and what is wrong with the version.
    """
    _say_short_lines()
    listener = _listener(options.host, options.port)
    Thread(target=import_module, args=("gptcore.writing.batch",)).start()  # torch, while MLflow is imported
    from flows.serving.app import create_app
    from flows.serving.following import Following
    from flows.serving.writer import Writer

    following = Following(root, uri if uri.startswith("models:/") else f"models:/{uri}", options.quantize)
    writer = Writer(options.max_concurrent, options.max_queue)
    app = create_app(following, writer, options.max_tokens, options.host)
    following.start()
    _Server(_config(app), writer, f"{following.served.id} is served at {_url(listener)}").run([listener])
    _log.info("stopped")


class _Server(uvicorn.Server):
    """Uvicorn's, with our signals: the first one stops in order, the second at once; the exit code is ours."""

    def __init__(self, config: uvicorn.Config, writer: "Writer", greeting: str) -> None:
        super().__init__(config)
        self.writer, self.greeting = writer, greeting

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _log.info("%s; Ctrl-C stops it", self.greeting)

    def stop(self, *_: Any) -> None:
        """What a signal does."""
        if self.should_exit:
            os.write(2, b"ended\n")
            os._exit(130)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.writer.refuse()
        writing, waiting = self.writer.counts
        _log.info("stopping; %d texts under way and %d that wait have %.0f s", writing, waiting, GRACE_SECONDS)
        asyncio.get_running_loop().call_later(
            GRACE_SECONDS, self.writer.end, "the server stops: the text is not finished"
        )
        await super().shutdown(sockets)


def _config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
    )


def _listener(host: str, port: int) -> socket.socket:
    """Takes the port; nobody is answered before everything is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise GPTCoreError(
            f"port {port} on {host} cannot be used: {error.strerror}. Choose another with --port, or --host."
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _say_short_lines() -> None:
    """What the endpoint says goes to stderr, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("flows.serving")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False

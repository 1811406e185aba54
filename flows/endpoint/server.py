"""`gptflow serve-model`: the endpoint as a process, from taking the port to the second Ctrl-C.

The port is taken first. Only then are the packages imported that take seconds to import.
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

from flows.state.root import StateRoot
from flows.web.server import Config, Server
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from flows.endpoint.scheduler import Scheduler

GRACE_SECONDS = 20.0
"""How long running texts may take to end when the server stops."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    host: str
    port: int
    allowed_hosts: tuple[str, ...]
    """Names besides those of loopback by which clients reach the server."""
    max_concurrent: int
    max_queue: int
    max_tokens: int
    device: str
    """Where the model computes: cpu, cuda, cuda:N, mps or auto."""
    quantize: str | None
    key: str | None = None
    """The key that clients must send, or None if they need none."""
    page: bool = True
    """Whether `/` is a page for people."""


def serve(root: StateRoot, uri: str, options: Options) -> None:
    """Serve the version that `uri` names until SIGINT or SIGTERM. `models:/` in front of the URI may be left out.

    Raises UnknownVersion if there is no such version, CheckpointError if its files are missing or damaged,
    DeviceMissing, and GPTCoreError if the port is taken.
    """
    _configure_logging()
    listener = _bind(options.host, options.port)
    Thread(target=import_module, args=("gptcore.generation.batch",)).start()  # imports torch beside MLflow
    from flows.endpoint.app import create_app
    from flows.endpoint.followed_version import FollowedVersion
    from flows.endpoint.scheduler import Scheduler

    followed = FollowedVersion(root, complete_uri(uri), options.device, options.quantize)
    scheduler = Scheduler(max_running=options.max_concurrent, max_waiting=options.max_queue)
    app = create_app(
        followed, scheduler, options.max_tokens, options.host, options.allowed_hosts, options.key, options.page
    )
    followed.start()
    greeting = f"{followed.current.id} is served at {_url_of(listener)}, on {followed.current.loaded.device}"
    _Server(_uvicorn_config(app), scheduler, greeting).run([listener])
    _log.info("stopped")


def complete_uri(uri: str) -> str:
    """Return the URI with `models:/`, and a bare NAME with the alias that it stands for, so that it is followed."""
    name = uri.removeprefix("models:/")
    return f"models:/{name}" if "@" in name or "/" in name else f"models:/{name}@champion"


class _Server(Server):
    """Our server with signals and exit codes. The first signal stops it in order, the second at once."""

    def __init__(self, config: uvicorn.Config, scheduler: "Scheduler", greeting: str) -> None:
        super().__init__(config)
        self.scheduler, self.greeting = scheduler, greeting

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _log.info("%s; Ctrl-C stops it", self.greeting)

    def stop(self, *_: Any) -> None:
        """Handle a signal."""
        if self.should_exit:
            os.write(2, b"stopped at once\n")
            os._exit(130)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more texts, and give those under way GRACE_SECONDS to end."""
        self.scheduler.stop_accepting()
        running, waiting = self.scheduler.counts
        _log.info("stopping; %d texts under way and %d waiting texts have %.0f s", running, waiting, GRACE_SECONDS)
        reason = "the server is stopping, so the text is not finished"
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.scheduler.stop, reason)
        await super().shutdown(sockets)


def _uvicorn_config(app: Any) -> uvicorn.Config:
    return Config(
        app,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
    )


def _bind(host: str, port: int) -> socket.socket:
    """Take the port. Clients can connect only after everything is loaded."""
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


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _configure_logging() -> None:
    """Send the endpoint's log as short lines to stderr, and nowhere else. The lines about requests are bare JSON."""
    for name, form in (("flows.endpoint", "%(asctime)s  %(message)s"), ("flows.endpoint.access", "%(message)s")):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

"""A Prefect server for one command, where neither `gptflow up` nor PREFECT_API_URL offers one.

Prefect can start such a server itself, but only once its client and its server are imported, which takes seconds. Here
it starts first, so that it gets ready while they are. It ends with the command, also when that is killed.
"""

import asyncio
import atexit
import gc
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType

from flows.service.children import Child
from flows.service.servers import answers
from flows.state import StateRoot
from gptcore.errors import GPTCoreError

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_FOLLOW_SECONDS = 1.0
_WARM_UP_SECONDS = 10.0
_TICK_SECONDS = 1.0


def start_temporary_server(root: StateRoot) -> Child:
    """Starts a server that lives until this process ends, and lets PREFECT_API_URL name it.

    To be called before Prefect is imported: what Prefect has left to send when the process ends, it sends first.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    api = f"http://{HOST}:{port}/api"
    own = {
        # As Prefect's own temporary server: without a UI, and without services that a single run has no use for.
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # The hundred kinds of blocks that a UI would offer; who saves a block registers its kind.
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
        # Nobody looks at its events, streams its logs or has automations in it; what task runs become it records.
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "0",
        "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "0",
        "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "0",
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "0",
    }
    server = Child(
        name="Prefect's temporary server",
        command=(sys.executable, "-m", "flows.service.temporary", str(port)),
        log=root.logs / "prefect-temporary.log",
        environment={**os.environ, **own, "PYTHONSAFEPATH": "1"},
        is_healthy=lambda _: answers(f"{api}/health"),
    )
    server.start()
    atexit.register(_stop, server)
    os.environ["PREFECT_API_URL"] = api
    return server


def wait_until_ready(server: Child) -> None:
    """Raises GPTCoreError, with its last words, if the server ends or does not answer."""
    deadline = time.monotonic() + _START_SECONDS
    while not server.is_healthy(server):
        if not server.is_alive() or time.monotonic() > deadline:
            raise GPTCoreError(f"{server.name} does not answer. {server.last_words()}")
        time.sleep(0.05)
    _warm_up(os.environ["PREFECT_API_URL"])


def _warm_up(api: str) -> None:
    """Asks for something: what the first requests have to make takes half a second, and imports may still go on."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(f"{api}/flow_runs/filter", b'{"limit": 1}', {"Content-Type": "application/json"})
    for request in (urllib.request.Request(f"{api}/admin/version"), asked):
        with suppress(OSError), direct.open(request, timeout=_WARM_UP_SECONDS):
            pass


@contextmanager
def no_heartbeats() -> Iterator[None]:
    """While this holds, flow runs send none. Nobody listens here, and a run waits up to a second for the last one."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def serve(port: int) -> None:
    """Serves Prefect's API until the process that started this one is gone, or SIGTERM."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    gc.disable()  # imports and migrations make no garbage, and looking for it takes a fifth of their time
    import uvicorn
    from prefect.server.api import server

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()

        async def main_loop(self) -> None:
            """As uvicorn's own, which looks ten times a second whether it shall end."""
            told, loop = asyncio.Event(), asyncio.get_running_loop()

            def end(number: int, frame: FrameType | None) -> None:
                self.handle_exit(number, frame)
                loop.call_soon_threadsafe(told.set)

            signal.signal(signal.SIGTERM, end)
            while not await self.on_tick(0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(told.wait(), _TICK_SECONDS)

    server.background_worker = _no_worker
    Server(uvicorn.Config(server.create_app(), host=HOST, port=port, log_level="error", lifespan="on")).run()


@asynccontextmanager
async def _no_worker(*_: object, **__: object) -> AsyncIterator[None]:
    """Instead of the one that takes up Prefect's housekeeping. It looks for some twenty times a second."""
    yield


def _stop(server: Child) -> None:
    server.signal(signal.SIGTERM)
    server.wait(_STOP_SECONDS)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_FOLLOW_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

"""A Prefect server for a single command, used if neither `gptflow up` nor PREFECT_API_URL provides one.

Prefect can start such a server itself, but only after its client and its server are imported, which takes seconds. This
server starts first and gets ready during those imports. It ends with the command, even if the command is killed.
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
from pathlib import Path
from types import FrameType

from flows.deployments.child_process import Child
from flows.state.databases import prefect_database
from flows.state.root import StateRoot
from flows.state.servers import answers
from gptcore.errors import GPTCoreError

HOST = "127.0.0.1"
_START_SECONDS = 300.0
"""Long, because several servers may start at once on a busy machine, and one of them creates the database for all."""
_STOP_SECONDS = 5.0
_PARENT_CHECK_SECONDS = 1.0
_WARM_UP_SECONDS = 10.0
_TICK_SECONDS = 1.0


def start_temporary_server(root: StateRoot) -> Child:
    """Start a server that lives until this process ends, and set PREFECT_API_URL to its address.

    Call this before Prefect is imported. Then the server stops at exit only after Prefect has sent its last messages.
    Raises DatabaseBroken if the server's database cannot be used.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    api = f"http://{HOST}:{port}/api"
    settings = {
        # As in Prefect's own temporary server: no UI, and no services that a single run does not use.
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # The hundred types of blocks that a UI would offer. Saving a block registers its type.
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
        # Nobody looks at this server's events, streams its logs or has automations on it. It still records task runs.
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "0",
        "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "0",
        "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "0",
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "0",
    }
    environment = {**os.environ, **settings, "PYTHONSAFEPATH": "1"}
    home = ""
    if (database := root.find_prefect_database(environment)) is not None:
        database.check()
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database.url
        home = str(database.path.parent)
    server = Child(
        name="Prefect's temporary server",
        command=(sys.executable, "-m", "flows.deployments.ephemeral_server", str(port), home),
        log=root.logs / "prefect-temporary.log",
        environment=environment,
        is_healthy=lambda _: answers(f"{api}/health"),
    )
    server.start()
    atexit.register(_stop, server)
    os.environ["PREFECT_API_URL"] = api
    return server


def wait_until_ready(server: Child) -> None:
    """Wait until the server answers. Raises GPTCoreError with the end of its log if it ends or never answers."""
    deadline = time.monotonic() + _START_SECONDS
    while not server.is_healthy(server):
        if not server.is_alive() or time.monotonic() > deadline:
            raise GPTCoreError(f"{server.name} does not answer. {server.last_lines()}")
        time.sleep(0.05)
    _warm_up(os.environ["PREFECT_API_URL"])


def _warm_up(api: str) -> None:
    """Send two requests. The server's first requests take half a second more, and imports may still be running."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    version = urllib.request.Request(f"{api}/admin/version")
    runs = urllib.request.Request(f"{api}/flow_runs/filter", b'{"limit": 1}', {"Content-Type": "application/json"})
    for request in (version, runs):
        with suppress(OSError), direct.open(request, timeout=_WARM_UP_SECONDS):
            pass


@contextmanager
def disable_heartbeats() -> Iterator[None]:
    """Let flow runs send no heartbeats. This server does not use them, and a run waits up to a second for its last."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def serve(port: int, home: str) -> None:
    """Serve Prefect's API until SIGTERM, or until the parent process has ended.

    First creates or migrates the server's database in the directory `home`. If `home` is empty, the server uses another
    database, which gptflow leaves alone.
    """
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    gc.disable()  # imports and migrations make no garbage, and a fifth of their time would go into looking for it
    from prefect.server.api import server

    from flows.web.guard import Guard
    from flows.web.server import Config, Server

    if home:
        prefect_database(Path(home)).prepare()

    class TemporaryServer(Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()

        async def main_loop(self) -> None:
            """Do what uvicorn's loop does, which checks ten times a second whether it should end."""
            stopped, loop = asyncio.Event(), asyncio.get_running_loop()

            def stop(number: int, frame: FrameType | None) -> None:
                self.handle_exit(number, frame)
                loop.call_soon_threadsafe(stopped.set)

            signal.signal(signal.SIGTERM, stop)
            while not await self.on_tick(0):
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), _TICK_SECONDS)

    server.background_worker = _skip_background_worker
    app = Guard(server.create_app(), HOST)
    TemporaryServer(Config(app, host=HOST, port=port, log_level="error", lifespan="on")).run()


@asynccontextmanager
async def _skip_background_worker(*_: object, **__: object) -> AsyncIterator[None]:
    """Replace the worker that does Prefect's housekeeping and looks for tasks twenty times a second."""
    yield


def _stop(server: Child) -> None:
    server.signal(signal.SIGTERM)
    server.wait(_STOP_SECONDS)


def _stop_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Serve at the port and on the database that the command line names."""
    try:
        serve(int(sys.argv[1]), sys.argv[2])
    except GPTCoreError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

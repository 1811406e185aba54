"""A Prefect server for one command, where neither `gptflow up` nor PREFECT_API_URL offers one.

Prefect can start such a server itself, but only once its client and its server are imported, which takes seconds. Here
it starts first, so that it gets ready while they are. It ends with the command, also when that is killed.
"""

import atexit
import gc
import os
import signal
import socket
import sys
import threading
import time

from flows.service.children import Child
from flows.service.servers import answers
from flows.state import StateRoot
from gptcore.errors import GPTCoreError

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_FOLLOW_SECONDS = 0.5


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
        time.sleep(0.1)


def serve(port: int) -> None:
    """Serves Prefect's API until the process that started this one is gone, or SIGTERM."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    gc.disable()  # imports and migrations make no garbage, and looking for it takes a fifth of their time
    import uvicorn
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()

    Server(uvicorn.Config(create_app(), host=HOST, port=port, log_level="error", lifespan="on")).run()


def _stop(server: Child) -> None:
    server.signal(signal.SIGTERM)
    server.wait(_STOP_SECONDS)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_FOLLOW_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve(int(sys.argv[1]))

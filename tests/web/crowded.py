"""A real server process with few file descriptors, which logs like gptflow's commands: python crowded.py LOGS FILES."""

import logging
import resource
import socket
import sys
from pathlib import Path
from typing import Any, cast

from flows.cli.options import redirect_library_logs
from flows.web.server import Config, Server


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})


class Root:
    logs = Path(sys.argv[1])


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    redirect_library_logs(cast(Any, Root()))
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # so that the log's file is opened late
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    Server(Config(app, lifespan="off", log_config=None)).run([listener])

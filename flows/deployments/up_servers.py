"""The servers of `gptflow up` as programs: Prefect's and MLflow's own apps behind our guard.

`prefect server start` answers every web page in a browser on this machine, and `mlflow server` answers some. Here both
apps have the settings that those commands would give them, and run in our own server (flows/web).
"""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flows.web.guard import LOOPBACK, Guard, parse_allowed_hosts

HOST = "127.0.0.1"
_MODULE = "flows.deployments.up_servers"


def prefect_command(port: int, allowed_hosts: Sequence[str]) -> list[str]:
    """Return Python's arguments that start Prefect's server."""
    return ["-m", _MODULE, "prefect", ",".join(allowed_hosts), str(port)]


def mlflow_command(port: int, allowed_hosts: Sequence[str], store: str, artifacts: str) -> list[str]:
    """Return Python's arguments that start MLflow's server on the backend `store`, with its files in `artifacts`."""
    stores = ["--backend-store-uri", store, "--artifacts-destination", artifacts]
    address = ["--host", HOST, "--port", str(port), "--workers", "1"]
    own_checks = _describe_hosts_to_mlflow(allowed_hosts) if allowed_hosts else []
    return ["-m", _MODULE, "mlflow", ",".join(allowed_hosts), "server", *stores, *address, *own_checks]


def serve_prefect(allowed_hosts: Sequence[str], port: int) -> None:
    """Serve Prefect's API and UI with all of its services until SIGTERM, as `prefect server start` does."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    from flows.web.server import Config, Server

    settings = get_current_settings().server
    config = Config(
        Guard(create_app(final=True), HOST, allowed_hosts),
        host=HOST,
        port=port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )
    Server(config).run()


def serve_mlflow(allowed_hosts: Sequence[str], arguments: Sequence[str]) -> None:
    """Do what `mlflow` does with these arguments, but serve its app in this process until SIGTERM."""
    import mlflow.server
    from mlflow.cli import cli

    def serve(command: Sequence[str], extra_env: dict[str, str], **_: Any) -> NoReturn:
        """Serve the app that `command` of uvicorn names. MLflow would start the command as a process."""
        from uvicorn.importer import import_from_string

        from flows.web.server import Config, Server

        os.environ.update(extra_env)
        app = import_from_string(command[-1])
        app = app() if "--factory" in command else app
        port = int(command[command.index("--port") + 1])
        Server(Config(Guard(app, HOST, allowed_hosts), host=HOST, port=port)).run()
        sys.exit()

    mlflow.server._exec_cmd = serve
    cli(arguments)


def _describe_hosts_to_mlflow(allowed_hosts: Sequence[str]) -> list[str]:
    """Return the options for MLflow's own checks, which run behind the guard and must not refuse what it accepts."""
    names = sorted({*LOOPBACK, *(re.sub(r":[0-9]+$", "", entry) for entry in allowed_hosts)})
    # MLflow compares an entry with a * as a pattern, in which [ is special, and any other entry as it is.
    hosts = [host for name in names for host in (name, f"{name.replace('[', '[[]')}:*")]
    origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts]
    return ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]


def main() -> None:
    """Run one of the servers."""
    name, hosts, *arguments = sys.argv[1:]
    allowed_hosts = parse_allowed_hosts(hosts)
    if name == "prefect":
        serve_prefect(allowed_hosts, int(arguments[0]))
    else:
        serve_mlflow(allowed_hosts, arguments)


if __name__ == "__main__":
    main()

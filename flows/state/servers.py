"""The addresses of the servers of `gptflow up`: its lock and its record in the state root.

`gptflow up` holds the lock while it is up. It writes the record, with its addresses and processes, when all servers are
healthy. Starting and restarting them is in flows/deployments/up.py.
"""

import json
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path

from pydantic import PositiveInt

from flows.state import locks
from gptcore.manifest import write_atomically
from gptcore.records import read_record


@dataclass(frozen=True)
class Servers:
    """The content of up.json."""

    prefect: str
    """URL of Prefect's UI."""
    mlflow: str
    """URL of MLflow's UI."""
    processes: dict[str, tuple[PositiveInt, float]] = field(default_factory=dict)
    """Process id of each child, and when it was created. Only the two together identify a process forever."""
    restarts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How often each child that ended unasked was restarted, and when it last ended."""

    @property
    def prefect_api(self) -> str:
        return f"{self.prefect}/api"


def up_lock(home: Path) -> Path:
    """Return the path of the lock that `gptflow up` holds while it is up."""
    return home / "up.lock"


def find_running_servers(home: Path) -> Servers | None:
    """Return the servers of this state root's `gptflow up`, if it is up and Prefect answers."""
    if locks.find_holder(up_lock(home)) is None:
        return None
    servers = read_servers(home)
    return servers if servers is not None and answers(f"{servers.prefect_api}/health") else None


def read_servers(home: Path) -> Servers | None:
    """Return the record of the last `gptflow up`, which may have ended; None if there is none, or a damaged one."""
    return read_record(home / "up.json", Servers)


def write_servers(home: Path, servers: Servers) -> None:
    """Write up.json."""
    write_atomically(home / "up.json", json.dumps(asdict(servers), indent=1) + "\n")


def answers(url: str, seconds: float = 2) -> bool:
    """Whether a GET of the URL succeeds within that time. Proxies of the environment are not used."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError, HTTPException), direct.open(url, timeout=seconds) as response:
        return bool(response.status == 200)
    return False

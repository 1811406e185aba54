"""Where the servers of `gptflow up` are: its lock and its record in the state root.

The lock says whether it is up; the record, written when everything is healthy, says where, and which processes it has.
"""

import json
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows import lock


@dataclass(frozen=True)
class Servers:
    """What up.json says."""

    prefect: str
    """URL of Prefect's UI."""
    mlflow: str
    """URL of MLflow's UI."""
    processes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Process id of each child, and when it was created: the two together name a process for ever."""
    restarts: dict[str, tuple[int, str]] = field(default_factory=dict)
    """How often each child that ended unasked was started again, and when it last ended."""

    @property
    def prefect_api(self) -> str:
        return f"{self.prefect}/api"


def up_lock(home: Path) -> Path:
    """What `gptflow up` holds while it is up."""
    return home / "up.lock"


def running_servers(home: Path) -> Servers | None:
    """The servers of the `gptflow up` of this state root, if it is up and Prefect answers."""
    if lock.holder(up_lock(home)) is None:
        return None
    servers = recorded(home)
    return servers if servers is not None and answers(f"{servers.prefect_api}/health") else None


def recorded(home: Path) -> Servers | None:
    """What the last `gptflow up` wrote down, whether it still runs or not."""
    with suppress(FileNotFoundError):
        about: dict[str, Any] = json.loads((home / "up.json").read_text())
        processes = {name: (pid, created) for name, (pid, created) in about.pop("processes").items()}
        restarts = {name: (times, last) for name, (times, last) in about.pop("restarts", {}).items()}
        return Servers(**about, processes=processes, restarts=restarts)
    return None


def record(home: Path, servers: Servers) -> None:
    """Writes up.json, at once or not at all."""
    temporary = home / ".tmp-up.json"
    temporary.write_text(json.dumps(asdict(servers), indent=1) + "\n")
    temporary.replace(home / "up.json")


def answers(url: str, seconds: float = 2) -> bool:
    """Whether a GET of the URL succeeds within that time."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), direct.open(url, timeout=seconds) as response:
        return bool(response.status == 200)
    return False

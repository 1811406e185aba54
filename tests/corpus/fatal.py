"""Work that kills its process a given number of times."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fatal:
    """A shard. `die` returns its number."""

    directory: Path
    number: int
    times: int
    num_bytes: int = 1


def die(shard: Fatal) -> int:
    """Kill this process until the shard has killed `times` processes. The directory has a file for each kill."""
    died = len(list(shard.directory.glob(f"{shard.number}-*")))
    if died < shard.times:
        (shard.directory / f"{shard.number}-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shard.number

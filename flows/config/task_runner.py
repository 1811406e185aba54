"""The key `task_runner` of pipelines.yaml: what works on the shards of a large corpus.

See flows/retrain/task_runners.py for what each value starts.
"""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

PROCESSES = "processes"


def _check_name(name: str) -> str:
    if name in (PROCESSES, "dask", "ray"):
        return name
    try:
        parts = urlsplit(name)
        has_address = parts.hostname is not None and parts.port is not None
    except ValueError:
        has_address = False
    is_plain = has_address and "@" not in name and not any((parts.path.strip("/"), parts.query, parts.fragment))
    if is_plain and parts.scheme in ("tcp", "tls", "ray"):
        return name
    # An address with an @ may hold a password, so it is not repeated.
    problem = "an address holds no credentials" if "@" in name else f"given: {name!r:.80}"
    raise ValueError(
        "must be processes, dask, ray, a Dask scheduler as in tcp://HOST:8786 (or tls://), or a Ray cluster as in "
        f"ray://HOST:10001 ({problem})"
    )


TaskRunnerName = Annotated[str, AfterValidator(_check_name)]
"""A valid value of the key `task_runner`."""

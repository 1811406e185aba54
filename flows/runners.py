"""Who works on the shards of a large corpus: the key `task_runner` of pipelines.yaml.

    processes            local processes, of gptcore itself: the default
    dask, ray            a cluster of the run's own, of local processes, on 127.0.0.1 and without a dashboard
    tcp://HOST:8786      a Dask scheduler that is there already (also tls://)
    ray://HOST:10001     a Ray cluster that is there already

With Dask and Ray every shard is a task of the flow run, mapped by Prefect. Up to 256 MiB of text start none of them.
Workers on other machines need gptflow installed, Prefect's server within reach, and the state root and local sources
under the same paths. Nothing is imported here before it is needed.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from gptcore.errors import ConfigError
from gptcore.text.workers import Map, by_processes

PROCESSES = "processes"
_ENGINES = {"dask": "dask", "tcp": "dask", "tls": "dask", "ray": "ray"}
_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


def _known(given: str) -> str:
    if given in (PROCESSES, "dask", "ray"):
        return given
    try:
        parts = urlsplit(given)
        has_place = parts.hostname is not None and parts.port is not None
    except ValueError:
        has_place = False
    is_plain = has_place and "@" not in given and not any((parts.path.strip("/"), parts.query, parts.fragment))
    if is_plain and parts.scheme in ("tcp", "tls", "ray"):
        return given
    raise ValueError(
        "must be processes, dask, ray, a Dask scheduler as in tcp://HOST:8786 (or tls://), or a Ray cluster as in "
        f"ray://HOST:10001{'; an address holds no credentials' if '@' in given else f' (given: {given!r:.80})'}"
    )


TaskRunnerName = Annotated[str, AfterValidator(_known)]
"""What the key may be."""


def check(task_runner: str) -> None:
    """Whether the engine's package is installed: raises ConfigError if not. Nothing is imported or asked."""
    engine = _engine(task_runner)
    if engine is not None and importlib.util.find_spec(_PACKAGES[engine]) is None:
        raise ConfigError(
            f"task_runner: {task_runner} needs the package {_PACKAGES[engine].replace('_', '-')}, which is not "
            f"installed: pip install 'gptflow[{engine}]'"
        )


def _engine(task_runner: str) -> str | None:
    return _ENGINES.get(task_runner.partition("://")[0])


@contextmanager
def opened(task_runner: str) -> Iterator[Map]:
    """The map of a task runner. A cluster of its own starts with the first shards and ends with this context.

    Raises ConfigError, and with the first shards ClusterAway.
    """
    check(task_runner)
    engine = _engine(task_runner)
    if engine is None:
        yield by_processes
        return
    from flows.clusters import Cluster

    with Cluster(engine, task_runner if "://" in task_runner else None) as cluster:
        yield cluster

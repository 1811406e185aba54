"""Task runners process the shards of a large corpus: the key `task_runner` of pipelines.yaml chooses one.

    processes            local processes, started by gptcore: the default
    dask, ray            a cluster of the run's own, of local processes, on 127.0.0.1 and without a dashboard
    tcp://HOST:8786      a Dask scheduler that runs already (also tls://)
    ray://HOST:10001     a Ray cluster that runs already

With Dask and Ray every shard is a task of the flow run. A corpus of up to 256 MiB of text needs no task runner.
Workers on other machines need gptflow, access to Prefect's server, and the state root and local sources under the same
paths. This module imports Dask and Ray only when a pipeline uses them.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from gptcore.errors import ConfigError
from gptcore.processes import MapShards, map_in_processes

_ENGINES = {"dask": "dask", "tcp": "dask", "tls": "dask", "ray": "ray"}
_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


def check(task_runner: str) -> None:
    """Raise ConfigError if the engine's package is not installed. Nothing is imported, and no cluster is contacted."""
    engine = _engine(task_runner)
    if engine is not None and importlib.util.find_spec(_PACKAGES[engine]) is None:
        raise ConfigError(
            f"task_runner: {task_runner} needs the package {_PACKAGES[engine].replace('_', '-')}, which is not "
            f"installed: pip install 'gptflow[{engine}]'"
        )


def _engine(task_runner: str) -> str | None:
    """Return "dask" or "ray", None for local processes."""
    return _ENGINES.get(task_runner.partition("://")[0])


@contextmanager
def open_task_runner(task_runner: str) -> Iterator[MapShards]:
    """Yield a task runner's `MapShards`. A cluster of the run's own starts with the first shards and stops on exit.

    Raises ConfigError here, and ClusterUnreachable when the first shards are mapped.
    """
    check(task_runner)
    engine = _engine(task_runner)
    if engine is None:
        yield map_in_processes
        return
    from flows.retrain.clusters import Cluster

    with Cluster(engine, task_runner if "://" in task_runner else None) as cluster:
        yield cluster

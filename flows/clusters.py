"""Shards worked on by a Dask or a Ray cluster: each is a Prefect task of the flow run, wherever it is computed.

Prefect tries a shard again whose storage failed for a moment; Dask and Ray do so themselves where a worker died. A
cluster of the run's own starts when there are shards, on 127.0.0.1, and ends with the run.
"""

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from gptcore.errors import GPTCoreError, SourceUnavailable
from gptcore.manifest import is_out_of_space
from gptcore.progress import Progress
from gptcore.text.workers import Shard, cpus

_ANSWER_SECONDS = 10.0
_OWN_RAY = {
    # Its name aside, it says whether there may be other machines: without them, all ports are those of 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

S = TypeVar("S", bound=Shard)
R = TypeVar("R")


class ClusterAway(GPTCoreError):
    """A scheduler does not answer, or a cluster does not start."""


def _is_tried_again(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | SourceUnavailable) and not is_out_of_space(error)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[1, 4],
    retry_condition_fn=_is_tried_again,
)
def work(function: Callable[[S], R], shard: S) -> R:
    """One shard. Workers import no more of flows than this module."""
    return function(shard)


class Cluster:
    """Maps shards with tasks of the present flow run: see `gptcore.text.workers.Map`."""

    def __init__(self, engine: str, address: str | None) -> None:
        """Without an address it is a cluster of its own. Nothing is started or asked yet."""
        self._engine, self._address = engine, address
        self._stack = ExitStack()
        self._runner: TaskRunner[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Prefect sends the parameters of a task along with those that it calls: to them it is a cluster not begun."""
        return Cluster, (self._engine, self._address)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, step: str, doing: str, function: Callable[[S], R], shards: Sequence[S]) -> list[R]:
        """Raises ClusterAway if there is no cluster to be had."""
        runner = self.begin()
        progress = Progress(step, doing, sum(shard.num_bytes for shard in shards))
        named: Any = work.with_options(name=f"{step}: {doing}")
        futures = runner.map(named, {"function": unmapped(function), "shard": list(shards)})
        made: list[R] = []
        try:
            for future, shard in zip(futures, shards):
                made.append(future.result())
                progress.add(shard.num_bytes)
        except BaseException:
            _cancel(futures)
            raise
        return made

    def begin(self) -> TaskRunner[Any]:
        """Prefect's task runner, with the cluster that it needs. Raises ClusterAway."""
        if self._runner is None:
            self._runner = self._stack.enter_context(self._started())
        return self._runner

    def _started(self) -> TaskRunner[Any]:
        if self._address is not None:
            _check_answers(self._address)
        start = _dask if self._engine == "dask" else _ray
        try:
            return start(self._address, self._stack)
        except (OSError, ConnectionError, RuntimeError) as error:
            where = self._address or "a cluster of its own"
            raise ClusterAway(f"task_runner: {self._engine} does not start ({where}): {error}") from error


def _cancel(futures: Iterable[PrefectFuture[Any]]) -> None:
    """What has not begun need not. What has, leaves a part for the next run, or nothing."""
    for future in futures:
        cancel = getattr(getattr(future, "wrapped_future", None), "cancel", None)
        if cancel is not None:
            with suppress(Exception):
                cancel()


def _check_answers(address: str) -> None:
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterAway(
            f"task_runner: nothing answers at {address}: {error}. Start the cluster, or mend the address."
        ) from None


def _dask(address: str | None, stack: ExitStack) -> TaskRunner[Any]:
    import distributed
    from prefect_dask import DaskTaskRunner

    logging.getLogger("distributed").setLevel(logging.ERROR)
    if address is None:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptflow-dask-"))
        cluster = distributed.LocalCluster(
            n_workers=cpus(),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            worker_dashboard_address=None,
            local_directory=scratch,
            silence_logs=logging.ERROR,
        )
        address = stack.enter_context(cluster).scheduler_address
    return DaskTaskRunner(address=address, client_kwargs={"timeout": _ANSWER_SECONDS})


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """A user's own values win."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _ray(address: str | None, stack: ExitStack) -> TaskRunner[Any]:
    if address is not None:
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=address)
    stack.enter_context(_environment(_OWN_RAY | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}))
    import ray
    from prefect_ray import RayTaskRunner

    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptflow-ray-"))
    stack.callback(ray.shutdown)
    ray.init(
        num_cpus=cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=scratch,
    )
    return RayTaskRunner()

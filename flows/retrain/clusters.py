"""Shards of a large corpus on a Dask or Ray cluster: each shard is a Prefect task of the flow run.

Prefect retries a shard after a temporary storage error. If a worker dies, Dask and Ray retry its shard themselves. A
cluster of the run's own starts with the first shards, on 127.0.0.1, and stops at the end of the run. See
task_runners.py for the configuration.
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
from gptcore.processes import Shard, count_cpus
from gptcore.progress import Progress

_ANSWER_SECONDS = 10.0
_OWN_RAY = {
    # Despite its name, it allows or forbids other machines. Without them, Ray listens on 127.0.0.1 only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

S = TypeVar("S", bound=Shard)
R = TypeVar("R")


class ClusterUnreachable(GPTCoreError):
    """The address of a cluster does not answer, or a cluster does not start."""


def _should_retry(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | SourceUnavailable) and not is_out_of_space(error)


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[1, 4],
    retry_condition_fn=_should_retry,
)
def work(function: Callable[[S], R], shard: S) -> R:
    """Process one shard. Workers import no other module of flows."""
    return function(shard)


class Cluster:
    """A `gptcore.processes.MapShards` that runs each shard as a task of the current flow run."""

    def __init__(self, engine: str, address: str | None) -> None:
        """Use the cluster at `address`, or a cluster of the run's own if it is None. Nothing starts or connects yet."""
        self._engine, self._address = engine, address
        self._stack = ExitStack()
        self._runner: TaskRunner[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a cluster that has not started: Prefect sends it to the workers as a parameter of a task."""
        return Cluster, (self._engine, self._address)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, step: str, action: str, function: Callable[[S], R], shards: Sequence[S]) -> list[R]:
        """Call `function` with each shard and return the results in order. Raises ClusterUnreachable."""
        runner = self.start()
        progress = Progress(step, action, sum(shard.num_bytes for shard in shards))
        named_task: Any = work.with_options(name=f"{step}: {action}")
        futures = runner.map(named_task, {"function": unmapped(function), "shard": list(shards)})
        results: list[R] = []
        try:
            for future, shard in zip(futures, shards):
                results.append(future.result())
                progress.add(shard.num_bytes)
        except BaseException:
            _cancel(futures)
            raise
        return results

    def start(self) -> TaskRunner[Any]:
        """Return Prefect's task runner, after starting the cluster if necessary. Raises ClusterUnreachable."""
        if self._runner is None:
            self._runner = self._stack.enter_context(self._start())
        return self._runner

    def _start(self) -> TaskRunner[Any]:
        if self._address is not None:
            _check_answers(self._address)
        start_runner = _start_dask if self._engine == "dask" else _start_ray
        try:
            return start_runner(self._address, self._stack)
        except (OSError, ConnectionError, RuntimeError) as error:
            address = self._address or "a cluster of its own"
            raise ClusterUnreachable(f"task_runner: {self._engine} does not start ({address}): {error}") from error


def _cancel(futures: Iterable[PrefectFuture[Any]]) -> None:
    """Cancel the shards that have not started. A started one leaves its result for the next run, or nothing."""
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
        raise ClusterUnreachable(
            f"task_runner: nothing answers at {address}: {error}. Start the cluster, or fix the address."
        ) from None


def _start_dask(address: str | None, stack: ExitStack) -> TaskRunner[Any]:
    import distributed
    from prefect_dask import DaskTaskRunner

    logging.getLogger("distributed").setLevel(logging.ERROR)
    if address is None:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptflow-dask-"))
        cluster = distributed.LocalCluster(
            n_workers=count_cpus(),
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
def _set_environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside this context, except those that the user has set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _start_ray(address: str | None, stack: ExitStack) -> TaskRunner[Any]:
    if address is not None:
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(address=address)
    stack.enter_context(_set_environment(_OWN_RAY | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}))
    import ray
    from prefect_ray import RayTaskRunner

    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gptflow-ray-"))
    stack.callback(ray.shutdown)
    ray.init(
        num_cpus=count_cpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=scratch,
    )
    return RayTaskRunner()

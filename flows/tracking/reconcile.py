"""Runs that a crash left open: Prefect or MLflow calls them running, although no process works on them.

A retraining is ended only while this process holds the lock of its pipeline, so never a live one, wherever it was
started. The other flows do not hold that lock. Their runs belong to a deployment, and the environment of their process
contains the run's id. If a whole machine is lost, with the worker that would report the end of a run, then the next run
of the pipeline reports it.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.notifications.notify import send_failure
from flows.state.lock_holder import Holder
from flows.state.root import StateRoot

_UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
_PAGE = 200
_STARTING = timedelta(seconds=5)
"""A younger run may not have taken its lock yet."""
_NO_PROCESS = "No process worked on this run any more when gptflow started."
RETRAIN = "retrain"
OPERATIONS = ["promote", "rollback", "prune", "watch"]
"""The names of the flows that do not hold a pipeline's lock."""


def reconcile(client: SyncPrefectClient, root: StateRoot) -> list[str]:
    """End the runs that a crash left open: as Crashed in Prefect, as KILLED in MLflow. Return a line about each."""
    return [*_end_prefect_runs(client, root), *close_orphans(root)]


def close_orphans(root: StateRoot) -> list[str]:
    """End, as KILLED, the MLflow runs that no process works on any more. Return a line about each."""
    return list(_end_mlflow_runs(root))


def end_dead_run(holder: Holder) -> str | None:
    """End, as Crashed, the retraining that died with a pipeline's lock, and send the notification of a failure.

    The run that holds the lock now calls this, and continues even if Prefect fails. Return a line about the dead run;
    None if Prefect has seen that run end, or never knew it.
    """
    why = f"It held the lock of its pipeline ({holder}) and never released it: its process or its machine died."
    with get_client(sync_client=True) as client, suppress(ObjectNotFound, ValueError, httpx.HTTPError):
        run_id = UUID(holder.flow_run)
        if (crashed := _end(client, run_id, why)) is not None:
            send_failure(client.read_flow_run(run_id), crashed)
            return f"the previous run, {run_id}, ended as Crashed: {why}"
    return None


def _end_prefect_runs(client: SyncPrefectClient, root: StateRoot) -> Iterator[str]:
    # The runs are listed before the lock is taken. `_end` reads a run again under the lock, as it may have ended since.
    for run in _list_unfinished(client, FlowFilter(name=FlowFilterName(any_=[RETRAIN]))):
        pipeline = str(run.parameters.get("pipeline"))
        _wait_for_start(run)
        with root.try_lock(root.lock_path(pipeline)) as is_free:
            if is_free and (crashed := _end(client, run.id)) is not None:
                send_failure(run, crashed)
                yield f"crashed    Prefect run {run.id} of {pipeline}"
    for run in _list_unfinished(client, FlowFilter(name=FlowFilterName(any_=OPERATIONS))):
        _wait_for_start(run)
        if root.tag in run.tags and not _has_process(run.id) and _end(client, run.id) is not None:
            yield f"crashed    Prefect run {run.id}, {run.name}"


def _list_unfinished(client: SyncPrefectClient, flows: FlowFilter) -> list[FlowRun]:
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))
    return client.read_flow_runs(flow_filter=flows, flow_run_filter=FlowRunFilter(state=state), limit=_PAGE)


def _wait_for_start(run: FlowRun) -> None:
    """Wait until the run is old enough to have its process and its lock. No later check would find it."""
    assert run.state is not None, "the query selects by state"
    left = _STARTING - (datetime.now(UTC) - run.state.timestamp)
    time.sleep(min(max(left, timedelta()), _STARTING).total_seconds())


def _end(client: SyncPrefectClient, run_id: UUID, why: str = _NO_PROCESS) -> State[None] | None:
    """End the run as Crashed, and return that state; None if the run has ended by itself."""
    state = client.read_flow_run(run_id).state
    if state is None or state.type not in _UNFINISHED:
        return None
    crashed: State[None] = Crashed(message=why)
    client.set_flow_run_state(run_id, crashed, force=True)
    return crashed


def _has_process(run_id: UUID) -> bool:
    """Whether a process on this machine works on the flow run."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id):
                return True
    return False


def _end_mlflow_runs(root: StateRoot) -> Iterator[str]:
    client = MlflowClient(root.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ACTIVE_ONLY)]
    for run in _list_running(client, experiments):
        pipeline = run.data.tags.get("pipeline")
        if pipeline is None:
            continue
        with root.try_lock(root.lock_path(pipeline)) as is_free:
            if is_free and client.get_run(run.info.run_id).info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
                yield f"killed     MLflow run {run.info.run_id} of {pipeline}"


def _list_running(client: MlflowClient, experiments: list[str]) -> list[Run]:
    if not experiments:
        return []
    return list(client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=_PAGE))

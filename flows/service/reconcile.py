"""What a crash left unsaid: runs that Prefect or MLflow still calls running, though no process is behind them.

A retraining is touched only while the lock of its pipeline is held here, so never one that is alive, wherever it was
started. The other flows hold no such lock; theirs are runs of a deployment, and their process carries the run's id.
Where a whole machine is lost, with the worker that would tell of a run's end, the next run of the pipeline does it.
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

from flows.lock import Holder
from flows.service.notify import tell_end
from flows.state import StateRoot

_UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
_PAGE = 200
_STARTING = timedelta(seconds=5)
"""A run this young may not have come to its lock yet."""
_NO_PROCESS = "No process was behind it any more when gptflow started."
RETRAIN = "retrain"
OPERATIONS = ["promote", "rollback", "prune", "watch"]
"""The flows that hold no pipeline's lock, by name."""


def reconcile(client: SyncPrefectClient, root: StateRoot) -> list[str]:
    """Ends the runs that a crash left: as Crashed in Prefect, as KILLED in MLflow. Returns a line about each."""
    return [*_prefect_runs(client, root), *close_orphans(root)]


def close_orphans(root: StateRoot) -> list[str]:
    """Ends, as KILLED, the MLflow runs that no process works on any more. Returns a line about each."""
    return list(_mlflow_runs(root))


def end_dead(holder: Holder) -> str | None:
    """Ends, as Crashed, the retraining that died with a pipeline's lock, and tells whoever is told of failures.

    For the run that holds the lock now, which goes on whatever Prefect answers. Returns a line about it; None where
    Prefect has seen it end, or never knew it.
    """
    why = f"It held the lock of its pipeline ({holder}) and never gave it back: its process, or the machine, is gone."
    with get_client(sync_client=True) as client, suppress(ObjectNotFound, ValueError, httpx.HTTPError):
        run_id = UUID(holder.flow_run)
        if (crashed := _end(client, run_id, why)) is not None:
            tell_end(client.read_flow_run(run_id), crashed)
            return f"the run before, {run_id}, ended as Crashed: {why}"
    return None


def _prefect_runs(client: SyncPrefectClient, root: StateRoot) -> Iterator[str]:
    # Listed before the lock is taken: a run that ends meanwhile is asked for again, under the lock.
    for run in _unfinished(client, FlowFilter(name=FlowFilterName(any_=[RETRAIN]))):
        pipeline = str(run.parameters.get("pipeline"))
        _let_start(run)
        with root.taken(root.lock(pipeline)) as free:
            if free and (crashed := _end(client, run.id)) is not None:
                tell_end(run, crashed)
                yield f"crashed    Prefect run {run.id} of {pipeline}"
    for run in _unfinished(client, FlowFilter(name=FlowFilterName(any_=OPERATIONS))):
        _let_start(run)
        if root.tag in run.tags and not _has_process(run.id) and _end(client, run.id) is not None:
            yield f"crashed    Prefect run {run.id}, {run.name}"


def _unfinished(client: SyncPrefectClient, flows: FlowFilter) -> list[FlowRun]:
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))
    return client.read_flow_runs(flow_filter=flows, flow_run_filter=FlowRunFilter(state=state), limit=_PAGE)


def _let_start(run: FlowRun) -> None:
    """Waits until the run is old enough to have its process and its lock. Nobody would look at it again later."""
    assert run.state is not None, "it was found by its state"
    left = _STARTING - (datetime.now(UTC) - run.state.timestamp)
    time.sleep(min(max(left, timedelta()), _STARTING).total_seconds())


def _end(client: SyncPrefectClient, run_id: UUID, why: str = _NO_PROCESS) -> State[None] | None:
    """Ends the run as Crashed, and returns that state; None if it has ended by itself."""
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


def _mlflow_runs(root: StateRoot) -> Iterator[str]:
    client = MlflowClient(root.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ACTIVE_ONLY)]
    for run in _running(client, experiments):
        pipeline = run.data.tags.get("pipeline")
        if pipeline is None:
            continue
        with root.taken(root.lock(pipeline)) as free:
            if free and client.get_run(run.info.run_id).info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
                yield f"killed     MLflow run {run.info.run_id} of {pipeline}"


def _running(client: MlflowClient, experiments: list[str]) -> list[Run]:
    return (
        list(client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=_PAGE)) if experiments else []
    )

"""What a crash left unsaid: runs that Prefect or MLflow still calls running, though no process is behind them.

A run is touched only while the lock of its pipeline is held here, so never one that is alive, wherever it was started.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Crashed

from flows.lock import taken
from flows.service.notify import tell_end
from flows.state import StateRoot

_UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
_PAGE = 200
_STARTING = timedelta(seconds=5)
"""A run this young may not have come to its lock yet."""


def reconcile(client: SyncPrefectClient, root: StateRoot) -> list[str]:
    """Ends the runs that a crash left: as Crashed in Prefect, as KILLED in MLflow. Returns a line about each."""
    return [*_prefect_runs(client, root), *close_orphans(root)]


def close_orphans(root: StateRoot) -> list[str]:
    """Ends, as KILLED, the MLflow runs that no process works on any more. Returns a line about each."""
    return list(_mlflow_runs(root))


def _prefect_runs(client: SyncPrefectClient, root: StateRoot) -> Iterator[str]:
    # Listed before the lock is taken: a run that ends meanwhile is asked for again, under the lock.
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))),
        limit=_PAGE,
    )
    for run in runs:
        pipeline = str(run.parameters.get("pipeline"))
        with taken(root.lock(pipeline)) as free:
            if free and _is_orphaned(client.read_flow_run(run.id)):
                crashed: State[None] = Crashed(message="No process was behind it any more when gptflow started.")
                client.set_flow_run_state(run.id, crashed, force=True)
                tell_end(run, crashed)
                yield f"crashed    Prefect run {run.id} of {pipeline}"


def _is_orphaned(run: FlowRun) -> bool:
    state = run.state
    return state is not None and state.type in _UNFINISHED and datetime.now(UTC) - state.timestamp > _STARTING


def _mlflow_runs(root: StateRoot) -> Iterator[str]:
    client = MlflowClient(root.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(ViewType.ACTIVE_ONLY)]
    for run in _running(client, experiments):
        pipeline = run.data.tags.get("pipeline")
        if pipeline is None:
            continue
        with taken(root.lock(pipeline)) as free:
            if free and client.get_run(run.info.run_id).info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
                yield f"killed     MLflow run {run.info.run_id} of {pipeline}"


def _running(client: MlflowClient, experiments: list[str]) -> list[Run]:
    return (
        list(client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=_PAGE)) if experiments else []
    )

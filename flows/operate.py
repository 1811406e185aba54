"""What people do to a registry by hand, as small Prefect flows: their parameters are the forms in the UI.

They do what `gptflow promote`, `rollback` and `prune` do, by the same code: champion.py and prune.py.
"""

from typing import Annotated, Any

from prefect import Flow, State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows.pipelines import PipelinesFile
from flows.releases import champion
from flows.releases import prune as retention
from flows.service.schedule import ScheduleConfig
from flows.state import state_root

ModelName = Annotated[str, Field(min_length=1)]
Reason = Annotated[str, Field(min_length=1, max_length=2000)]


@flow(name="promote", flow_run_name="promote {model} {version}", persist_result=False)
def promote(model: ModelName, version: Annotated[int, Field(ge=1)], reason: Reason) -> State[None]:
    """Makes a version the champion, whatever the gate said.

    Args:
        model: Registered model, such as gpt-quickstart.
        version: Number of the version that is to be champion.
        reason: Why. It stays in the log of moves.
    """
    move = champion.promote(state_root().create(), model, str(version), reason, by=_asker())
    if move is None:
        return Completed(name="Unchanged", message=f"version {version} is the champion of {model} already")
    return Completed(name="Promoted", message=f"{model}: version {move.source or '(none)'} -> {move.target}: {reason}")


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False)
def rollback(model: ModelName, reason: Reason) -> State[None]:
    """Goes back to the previous champion. What is rolled back does not become champion again by itself.

    Args:
        model: Registered model, such as gpt-quickstart.
        reason: Why. It stays in the log of moves.
    """
    move = champion.rollback(state_root().create(), model, reason, by=_asker())
    return Completed(
        name="Rolled back", message=f"{model}: version {move.source or '(none)'} -> {move.target}: {reason}"
    )


@flow(name="prune", persist_result=False)
def prune(keep: dict[str, Annotated[int, Field(ge=1, le=10_000)]], dry_run: bool = False) -> State[None]:
    """Frees the files of versions that are neither new nor within reach of a rollback, and what only they needed.

    Args:
        keep: How many of its newest versions each registered model keeps.
        dry_run: Only list what would be freed.
    """
    freed = retention.prune(state_root().create(), keep, dry_run)
    for line in freed.lines():
        get_run_logger().info(line)
    return Completed(message=freed.summary(dry_run))


OPERATIONS: tuple[Flow[..., State[None]], ...] = (promote, rollback, prune)
"""Every flow here."""


SCHEDULES = {prune.name: ScheduleConfig(cron="0 12 * * *")}
"""What runs by itself: retention every noon (UTC), when the trainings of the night are over."""


def registered_parameters(operation: Flow[..., Any], file: PipelinesFile) -> dict[str, Any]:
    """The parameters that the deployment of an operation begins with."""
    return {"keep": file.keep()} if operation is prune else {}


def _asker() -> str:
    return f"Prefect flow run {flow_run.name}"

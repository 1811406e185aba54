"""The operations promote, rollback and prune as small Prefect flows: Prefect's UI shows their parameters as forms.

They do the same as `gptflow promote`, `rollback` and `prune`, with the same code: champion.py and retention.py.
"""

from typing import Annotated, Any

from prefect import Flow, State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows.config.pipelines import PipelinesFile
from flows.config.schedule import ScheduleConfig
from flows.notifications.events import send_former_state_name
from flows.notifications.verdicts import write_message
from flows.operations import retention
from flows.registry import champion
from flows.registry.moves import Move
from flows.state.root import StateRoot, state_root

ModelName = Annotated[str, Field(min_length=1)]
Reason = Annotated[str, Field(min_length=1, max_length=2000)]


@flow(
    name="promote",
    flow_run_name="promote {model} {version}",
    persist_result=False,
    on_completion=[send_former_state_name],
)
def promote(model: ModelName, version: Annotated[int, Field(ge=1)], reason: Reason) -> State[None]:
    """Make a version the champion, whatever the gate decided.

    Args:
        model: Registered model, such as gpt-quickstart.
        version: Number of the version to promote.
        reason: Why the champion changes. The log of moves keeps it.
    """
    move = champion.promote(_open_registry(), model, str(version), reason, by=_requester())
    if move is None:
        return Completed(message=write_message("unchanged", f"version {version} is the champion of {model} already"))
    return _complete("promoted", model, move)


@flow(name="rollback", flow_run_name="rollback {model}", persist_result=False, on_completion=[send_former_state_name])
def rollback(model: ModelName, reason: Reason) -> State[None]:
    """Go back to the previous champion. The gate does not promote the version again that is rolled back.

    Args:
        model: Registered model, such as gpt-quickstart.
        reason: Why the champion changes. The log of moves keeps it.
    """
    move = champion.rollback(_open_registry(), model, reason, by=_requester())
    return _complete("rolled back", model, move)


@flow(name="prune", persist_result=False)
def prune(keep: dict[str, Annotated[int, Field(ge=1, le=10_000)]], dry_run: bool = False) -> State[None]:
    """Delete old versions that no rollback can reach, with all files that only they need.

    Args:
        keep: Number of newest versions to keep, for each registered model.
        dry_run: Only list what would be deleted.
    """
    freed = retention.prune(_open_registry(), keep, dry_run)
    for line in freed.lines():
        get_run_logger().info(line)
    return Completed(message=freed.summary(dry_run))


OPERATIONS: tuple[Flow[..., State[None]], ...] = (promote, rollback, prune)
"""Every flow of this module."""

SCHEDULES = {prune.name: ScheduleConfig(cron="0 12 * * *")}
"""Default schedules: retention runs every noon (UTC), when the trainings of the night are over."""


def build_parameters(operation: Flow[..., Any], file: PipelinesFile) -> dict[str, Any]:
    """Return the default parameters of an operation's deployment."""
    return {"keep": file.keep()} if operation is prune else {}


def _complete(verdict: str, model: str, move: Move) -> State[None]:
    text = f"{model}: version {move.source or '(none)'} -> {move.target}: {move.reason}"
    return Completed(message=write_message(verdict, text))


def _open_registry() -> StateRoot:
    root = state_root().prepare()
    root.prepare_registry()
    return root


def _requester() -> str:
    """Return the name of this flow run, for the log of moves."""
    return f"Prefect flow run {flow_run.name}"

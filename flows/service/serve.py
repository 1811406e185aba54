"""Deployments from pipelines.yaml: what is registered on the Prefect server, what changed there, and serving it.

There is one deployment of the flow `retrain` per pipeline, named after it, with all the pipeline's values as its
parameters, so that the form in the UI shows them; one of each operation; and one of `watch`, where some pipeline asks
for it. They carry two tags: `gptflow`, and the id of the state root that they belong to, which moves with it. A
deployment with both tags that the file no longer names is deleted. (Two states served on one server share deployments
of the same name: the later one's values stand there.) Sending the same deployments to a work pool stands in deploy.py.
"""

import asyncio
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any, cast

import click
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows import watch as watching
from flows.operate import OPERATIONS, SCHEDULES, registered_parameters
from flows.pipelines import Pipeline, PipelinesFile
from flows.retrain import retrain
from flows.service import deployed, registration, successes
from flows.service.reconcile import reconcile
from flows.service.registration import Registered
from flows.service.schedule import ScheduleConfig, interval_anchor
from flows.service.triggers import TriggerConfig
from flows.service.up import READY
from flows.state import StateRoot
from gptcore import manifest

TAG = "gptflow"


@dataclass(frozen=True)
class Pool:
    """A work pool whose workers run the deployments, instead of this process."""

    work_pool_name: str
    job_variables: dict[str, Any]


def serve(file: PipelinesFile, root: StateRoot, limit: int, must_reconcile: bool) -> None:
    """Registers the deployments of the file, says what changed, and runs what is due, at most `limit` at once.

    With `must_reconcile`, runs that a crash left are ended first. Returns when it is told to stop. Raises ConfigError
    for a wrong file, before anything is registered.
    """
    # Flow runs inherit the working directory and import from it first: there must be no other flows/ in it.
    os.chdir(root.path)
    wanted = deployments(file, root)
    runner = Runner(limit=limit, pause_on_shutdown=False)
    lines = []
    if must_reconcile:
        with get_client(sync_client=True) as client:
            lines = reconcile(client, root)
    there, changes = register(wanted, root)
    lines += changes
    successes.expect(root, map(file.pipeline, file.names()))
    for deployment in there:
        runner.add_deployment(cast(RunnerDeployment, deployment))
    click.echo("\n".join([*lines, f"{READY} {len(wanted)} deployments, at most {limit} runs at once"]))
    asyncio.run(runner.start())


def deployments(file: PipelinesFile, root: StateRoot, pool: Pool | None = None) -> list[RunnerDeployment]:
    """What the file asks for, to be run here or by a work pool, and writes down what is to be watched.

    Raises ConfigError.
    """
    pipelines = [file.pipeline(name) for name in file.names()]
    asked = [_of_pipeline(pipeline) for pipeline in pipelines]
    asked += [
        _Asked(
            operation, operation.name, registered_parameters(operation, file), schedule=SCHEDULES.get(operation.name)
        )
        for operation in OPERATIONS
    ]
    if watching.register(root, pipelines):
        schedule = ScheduleConfig(interval=file.watch_seconds)
        asked.append(_Asked(watching.watch, watching.watch.name, {}, schedule=schedule))
    return [_deployment(one, root, pool) for one in asked]


def register(wanted: list[RunnerDeployment], root: StateRoot) -> tuple[list[Registered], list[str]]:
    """Brings the deployments to the server. Returns them, and a line about each that is or was there."""
    there, gone = registration.register(wanted, [TAG, root.tag])
    lines = [f"{one.change:<9}  {one.name}" for one in there]
    return there, [*lines, *(f"removed    {name}" for name in gone)]


@dataclass(frozen=True)
class _Asked:
    """One deployment, as the file asks for it."""

    flow: Flow[..., Any]
    name: str
    parameters: dict[str, Any]
    description: str | None = None
    """Default: the flow's docstring."""
    tags: tuple[str, ...] = ()
    schedule: ScheduleConfig | None = None
    triggers: tuple[TriggerConfig, ...] = ()


def _of_pipeline(pipeline: Pipeline) -> _Asked:
    parameters = deployed.parameters(pipeline, set(retrain.parameters.properties))
    description = f"Retrains {pipeline.model_name} on {', '.join(pipeline.corpus.sources)}."
    return _Asked(retrain, pipeline.name, parameters, description, pipeline.tags, pipeline.schedule, pipeline.triggers)


@cache
def _template(flow: Flow[..., Any]) -> RunnerDeployment:
    """A deployment of the flow with its form, which takes a tenth of a second to make."""
    template = flow.to_deployment(flow.name, enforce_parameter_schema=True, entrypoint_type=EntrypointType.MODULE_PATH)
    assert isinstance(template, RunnerDeployment), "no event loop runs here"
    return template


@cache
def _form(flow: Flow[..., Any]) -> str:
    """Names the form."""
    return manifest.sha256_of(flow.parameters.model_dump(mode="json"))


def _deployment(asked: _Asked, root: StateRoot, pool: Pool | None) -> RunnerDeployment:
    tags = sorted({TAG, root.tag, *asked.tags})
    described = asked.schedule.model_dump() if asked.schedule else None
    triggers = [trigger.awaited(asked.name) for trigger in asked.triggers]
    where = {} if pool is None else asdict(pool)
    description = asked.description or asked.flow.description
    registered = [asked.parameters, described, triggers, tags, description, _form(asked.flow), where]
    values = {
        "name": asked.name,
        "parameters": asked.parameters,
        "schedules": [_schedule(asked.schedule)] if asked.schedule else [],
        "triggers": [_trigger(asked.name, *awaited) for awaited in triggers],
        "tags": tags,
        "description": description,
        # It names what is registered: equal versions need no change.
        "version": manifest.sha256_of(registered)[:12],
        # Said in so many words, a deployment is taken back from a pool that it was sent to.
        "work_pool_name": None,
        **where,
    }
    return _template(asked.flow).model_copy(update=values)


def _trigger(pipeline: str, event: str, resource: str) -> DeploymentEventTrigger:
    match: dict[str, str | list[str]] = {"prefect.resource.id": resource}
    return DeploymentEventTrigger(name=f"{pipeline} on {event} of {resource}", expect={event}, match=match)


def _schedule(asked: ScheduleConfig) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=_times(asked), active=not asked.paused)


def _times(asked: ScheduleConfig) -> CronSchedule | IntervalSchedule:
    if asked.cron is not None:
        return CronSchedule(cron=asked.cron, timezone=asked.timezone)
    assert asked.interval is not None, "a schedule has a cron expression or an interval"
    anchor, every = interval_anchor(asked), timedelta(seconds=asked.interval)
    return IntervalSchedule(interval=every, anchor_date=anchor, timezone=asked.timezone)

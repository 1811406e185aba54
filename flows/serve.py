"""Deployments from pipelines.yaml: what is registered on the Prefect server, what changed there, and serving it.

There is one deployment of the flow `retrain` per pipeline, named after it, with all the pipeline's values as its
parameters, so that the form in the UI shows them; and one of each operation. They carry two tags: `gptflow`, and the
id of the state root that they belong to, which moves with it. A deployment with both tags that the file no longer names
is deleted. (Two states served on one server share deployments of the same name: the later one's values stand there.)
"""

import asyncio
import os
from datetime import timedelta
from typing import Any

import click
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType

from flows import deployed, successes
from flows.operate import OPERATIONS, registered_parameters
from flows.pipelines import Pipeline, PipelinesFile
from flows.reconcile import reconcile
from flows.retrain import retrain
from flows.schedule import ScheduleConfig, interval_anchor
from flows.state import StateRoot
from flows.up import READY
from gptcore import manifest

TAG = "gptflow"


def serve(file: PipelinesFile, root: StateRoot, limit: int, must_reconcile: bool) -> None:
    """Registers the deployments of the file, says what changed, and runs what is due, at most `limit` at once.

    With `must_reconcile`, runs that a crash left are ended first. Returns when it is told to stop. Raises ConfigError
    for a wrong file, before anything is registered.
    """
    # Flow runs inherit the working directory and import from it first: there must be no other flows/ in it.
    os.chdir(root.path)
    wanted = deployments(file, root)
    runner = Runner(limit=limit, pause_on_shutdown=False)
    with get_client(sync_client=True) as client:
        lines = reconcile(client, root) if must_reconcile else []
        lines += changes(client, wanted, root)
    successes.expect(root, map(file.pipeline, file.names()))
    for deployment in wanted:
        runner.add_deployment(deployment)
    click.echo("\n".join([*lines, f"{READY} {len(wanted)} deployments, at most {limit} runs at once"]))
    asyncio.run(runner.start())


def deployments(file: PipelinesFile, root: StateRoot) -> list[RunnerDeployment]:
    """What the file asks for. Raises ConfigError."""
    pipelines = [_of_pipeline(file.pipeline(name), root) for name in file.names()]
    return pipelines + [
        _of_operation(operation, registered_parameters(operation, file), root) for operation in OPERATIONS
    ]


def changes(client: SyncPrefectClient, wanted: list[RunnerDeployment], root: StateRoot) -> list[str]:
    """A line about each deployment that is or was there. Those that are no longer wanted are deleted."""
    tags = DeploymentFilterTags(all_=[TAG, _home(root)])
    found = client.read_deployments(deployment_filter=DeploymentFilter(tags=tags))
    there = {deployment.name: deployment for deployment in found}
    lines = []
    for deployment in wanted:
        before = there.pop(deployment.name, None)
        is_same = before is not None and before.version == deployment.version
        lines.append(f"{'added' if before is None else 'unchanged' if is_same else 'changed':<9}  {deployment.name}")
    for name, gone in sorted(there.items()):
        client.delete_deployment(gone.id)
        lines.append(f"removed    {name}")
    return lines


def _of_pipeline(pipeline: Pipeline, root: StateRoot) -> RunnerDeployment:
    parameters = deployed.parameters(pipeline, set(retrain.parameters.properties))
    description = f"Retrains {pipeline.model_name} on {', '.join(pipeline.corpus.sources)}."
    tags = sorted({TAG, _home(root), *pipeline.tags})
    return _deployment(retrain, pipeline.name, parameters, tags, description, pipeline.schedule)


def _of_operation(operation: Flow[..., Any], parameters: dict[str, Any], root: StateRoot) -> RunnerDeployment:
    assert operation.description is not None, "its docstring"
    return _deployment(operation, operation.name, parameters, [TAG, _home(root)], operation.description, None)


def _deployment(
    flow: Flow[..., Any],
    name: str,
    parameters: dict[str, Any],
    tags: list[str],
    description: str,
    schedule: ScheduleConfig | None,
) -> RunnerDeployment:
    described = schedule.model_dump() if schedule else None
    deployment = flow.to_deployment(
        name=name,
        parameters=parameters,
        schedules=[_schedule(schedule)] if schedule else [],
        tags=tags,
        description=description,
        # It names what is registered: equal versions need no change.
        version=manifest.sha256_of([parameters, described, tags, description, flow.parameters.model_dump(mode="json")])[
            :12
        ],
        enforce_parameter_schema=True,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment), "no event loop runs here"
    return deployment


def _schedule(asked: ScheduleConfig) -> Schedule:
    options: dict[str, Any] = {"timezone": asked.timezone, "active": not asked.paused}
    if asked.cron is not None:
        return Cron(asked.cron, **options)
    assert asked.interval is not None, "a schedule has a cron expression or an interval"
    return Interval(timedelta(seconds=asked.interval), anchor_date=interval_anchor(asked), **options)


def _home(root: StateRoot) -> str:
    return f"home:{root.id}"

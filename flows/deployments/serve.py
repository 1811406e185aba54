"""The deployments that pipelines.yaml asks for, and `gptflow serve`, which registers and runs them.

There is one deployment of the flow `retrain` per pipeline. It has the pipeline's name and all of the pipeline's values
as its parameters, so that the form in Prefect's UI shows them. There is one deployment per operation (promote, rollback
and prune), and one of `watch` if a pipeline needs it.

Every deployment carries two tags: `gptflow` and the id of its state root, which stays the same if the state root is
moved. A deployment with both tags that the file no longer names is deleted. Two state roots on one server share the
deployments of the same name: the values that were registered last win. See work_pool.py for sending the deployments to
a work pool.
"""

import asyncio
import os
import signal
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any, cast

import click
import psutil
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import ParameterSchema

from flows.config.pipelines import Pipeline, PipelinesFile, TriggerConfig
from flows.config.schedule import ScheduleConfig, interval_anchor
from flows.deployments.form import build_form
from flows.deployments.sync import PAUSED, sync_deployments
from flows.deployments.up import READY, stop_flow_runs
from flows.operations.flows import OPERATIONS, SCHEDULES, build_parameters
from flows.retrain import last_success
from flows.retrain import watch as watching
from flows.retrain.flow import retrain
from flows.retrain.parameters import build_flow_parameters
from flows.state.root import StateRoot
from flows.tracking.reconcile import reconcile
from gptcore import manifest

TAG = "gptflow"


@dataclass(frozen=True)
class Pool:
    """A work pool whose workers run the deployments instead of this process."""

    work_pool_name: str
    job_variables: dict[str, Any]


class _Runner(Runner):
    """A runner of deployments whose flow runs save and report before it stops."""

    def stop_in_order(self, number: int, _frame: object) -> None:
        """Stop the flow runs, wait for them, and exit. Meanwhile the event loop waits, so that no run starts.

        Ctrl-C has reached the flow runs already: they are in the terminal's foreground too. A second signal would
        interrupt them while they save.
        """
        stop_flow_runs(psutil.Process(), must_signal=number == signal.SIGTERM)
        sys.exit(0)

    def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
        """Stop in order. Prefect installs this as its handler, which would end the flow runs without a grace."""
        self.stop_in_order(signal.SIGTERM, None)


def serve(
    file: PipelinesFile, root: StateRoot, limit: int, must_reconcile: bool, reset_schedules: bool = False
) -> None:
    """Register the deployments of the file, print what changed, and run what is due, at most `limit` runs at once.

    With `must_reconcile`, runs that a crash left unfinished are ended first. With `reset_schedules`, the file decides
    which schedules are paused, not a person who used the server since. Returns after SIGTERM or SIGINT. Raises
    ConfigError for a wrong file, before anything is registered.
    """
    # Flow runs inherit the working directory and import from it first: there must be no other flows/ in it.
    os.chdir(root.path)
    wanted = build_deployments(file, root)
    runner = _Runner(limit=limit, pause_on_shutdown=False)
    lines = []
    if must_reconcile:
        with get_client(sync_client=True) as client:
            lines = reconcile(client, root)
    result = sync_deployments(wanted, [TAG, root.tag], reset_schedules)
    last_success.expect(root, map(file.pipeline, file.names()))
    for deployment in result.deployments:
        runner.add_deployment(cast(RunnerDeployment, deployment))
    ready = f"{READY} {len(wanted)} deployments, at most {limit} runs at once"
    click.echo("\n".join([*lines, *result.lines(), ready]))
    signal.signal(signal.SIGINT, runner.stop_in_order)
    asyncio.run(runner.start())


def build_deployments(file: PipelinesFile, root: StateRoot, pool: Pool | None = None) -> list[RunnerDeployment]:
    """Return the deployments that the file asks for, to be run by this process or by a work pool.

    Also stores which pipelines the flow `watch` has to look at. Raises ConfigError for a wrong file.
    """
    pipelines = [file.pipeline(name) for name in file.names()]
    specs = [_pipeline_spec(pipeline) for pipeline in pipelines]
    for operation in OPERATIONS:
        parameters = build_parameters(operation, file)
        specs.append(_Spec(operation, operation.name, parameters, schedule=SCHEDULES.get(operation.name)))
    if watching.register(root, pipelines):
        schedule = ScheduleConfig(interval=file.watch_seconds)
        specs.append(_Spec(watching.watch, watching.watch.name, {}, schedule=schedule))
    return [_build_deployment(spec, root, pool) for spec in specs]


@dataclass(frozen=True)
class _Spec:
    """A deployment as the file asks for it."""

    flow: Flow[..., Any]
    name: str
    parameters: dict[str, Any]
    description: str | None = None
    """Default: the flow's docstring."""
    tags: tuple[str, ...] = ()
    schedule: ScheduleConfig | None = None
    triggers: tuple[TriggerConfig, ...] = ()


def _pipeline_spec(pipeline: Pipeline) -> _Spec:
    return _Spec(
        flow=retrain,
        name=pipeline.name,
        parameters=build_flow_parameters(pipeline, set(retrain.parameters.properties)),
        description=f"Retrains {pipeline.model_name} on {', '.join(pipeline.corpus.sources)}.",
        tags=pipeline.tags,
        schedule=pipeline.schedule,
        triggers=pipeline.triggers,
    )


_ENTRY_MODULES = {
    "flows.retrain.flow": "flows.retrain",
    "flows.retrain.watch": "flows.watch",
    "flows.operations.flows": "flows.operate",
}
"""The module names by which servers and workers know the flows. They stay the same if the code moves."""


@cache
def _make_template(flow: Flow[..., Any]) -> RunnerDeployment:
    """Return a deployment of the flow with its form. Making the form takes a tenth of a second."""
    template = flow.to_deployment(flow.name, enforce_parameter_schema=True, entrypoint_type=EntrypointType.MODULE_PATH)
    assert isinstance(template, RunnerDeployment), "no event loop runs here"
    template._parameter_openapi_schema = ParameterSchema(**build_form(flow.parameters.model_dump(mode="json")))
    template.entrypoint = f"{_ENTRY_MODULES[flow.fn.__module__]}.{flow.fn.__name__}"
    return template


@cache
def _hash_form(flow: Flow[..., Any]) -> str:
    """Return a digest of the form, which changes if a parameter of the flow changes."""
    return manifest.sha256_of(build_form(flow.parameters.model_dump(mode="json")))


def _build_deployment(spec: _Spec, root: StateRoot, pool: Pool | None) -> RunnerDeployment:
    tags = sorted({TAG, root.tag, *spec.tags})
    schedule = spec.schedule.model_dump() if spec.schedule else None
    triggers = [trigger.awaited_event(spec.name) for trigger in spec.triggers]
    pool_values = {} if pool is None else asdict(pool)
    description = spec.description or spec.flow.description
    registered = [spec.parameters, schedule, triggers, tags, description, _hash_form(spec.flow), pool_values]
    values = {
        "name": spec.name,
        "parameters": spec.parameters,
        "schedules": [_build_schedule(spec.schedule)] if spec.schedule else [],
        "triggers": [_build_trigger(spec.name, event, resource) for event, resource in triggers],
        "tags": tags,
        "description": description,
        # A digest of what is registered. If the server has the same version, nothing has to be sent.
        "version": manifest.sha256_of(registered)[:12] + (PAUSED if spec.schedule and spec.schedule.paused else ""),
        "paused": False,
        # An explicit None takes a deployment back from the pool that it was sent to.
        "work_pool_name": None,
        **pool_values,
    }
    return _make_template(spec.flow).model_copy(update=values)


def _build_trigger(pipeline: str, event: str, resource: str) -> DeploymentEventTrigger:
    match: dict[str, str | list[str]] = {"prefect.resource.id": resource}
    return DeploymentEventTrigger(name=f"{pipeline} on {event} of {resource}", expect={event}, match=match)


def _build_schedule(schedule: ScheduleConfig) -> DeploymentScheduleCreate:
    times: CronSchedule | IntervalSchedule
    if schedule.cron is not None:
        times = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    else:
        assert schedule.interval is not None, "a schedule has a cron expression or an interval"
        times = IntervalSchedule(
            interval=timedelta(seconds=schedule.interval),
            anchor_date=interval_anchor(schedule),
            timezone=schedule.timezone,
        )
    return DeploymentScheduleCreate(schedule=times, active=not schedule.paused)

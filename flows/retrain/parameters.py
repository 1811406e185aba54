"""The parameters of a deployed run: those of its deployment, overridden field by field by those of the run.

Prefect replaces a whole section if any of its fields is given, and fills the other fields with the schema's defaults.
So this module merges the sections itself, from the plain values that the deployment and the run carry.
"""

from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from flows.config.pipelines import Pipeline, check_pipeline, merge
from gptcore.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """The pipeline that a flow run retrains."""

    pipeline: Pipeline
    has_other_sources: bool = False
    """Whether the run's corpus.sources are not those of its deployment."""


def read_request() -> Request | None:
    """Return the request of this flow run. None if no deployment started the run. Raises ConfigError."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        return None
    try:
        with get_client(sync_client=True) as client:
            registered = client.read_deployment(run.deployment_id).parameters
    except ObjectNotFound:  # the deployment was deleted meanwhile; the run carries all parameters itself
        registered = {}
    pipeline = merge_parameters(registered, run.parameters)
    own_sources = registered.get("corpus", {}).get("sources", list(pipeline.corpus.sources))
    return Request(pipeline, has_other_sources=own_sources != list(pipeline.corpus.sources))


def merge_parameters(registered: dict[str, Any], given: dict[str, Any]) -> Pipeline:
    """Return the pipeline of a deployment's parameters, overridden by a run's parameters. Raises ConfigError."""
    layers = [{key: value for key, value in layer.items() if key != "pipeline"} for layer in (registered, given)]
    name = given.get("pipeline", registered.get("pipeline"))
    values = {key: value for key, value in merge(layers).items() if key in Pipeline.model_fields}
    pipeline, problems = check_pipeline({"name": name, **values})
    if pipeline is None:
        raise ConfigError("\n".join(f"{'.'.join(map(str, path))}: {problem}" for path, problem in problems))
    return pipeline


def build_flow_parameters(pipeline: Pipeline, names: set[str]) -> dict[str, Any]:
    """Return a pipeline as plain parameters of its flow, which takes the parameters `names`."""
    values = pipeline.model_dump(mode="json", include=names)
    return {"pipeline": pipeline.name, **values}

"""What a deployed run was asked for: what its deployment registered, and over it, field by field, what was given.

Prefect replaces a whole section when any of its fields is given, and fills the rest with the schema's defaults. So the
sections are merged here instead, from the plain values that the deployment and the run carry.
"""

from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from flows.pipelines import Pipeline, merge
from gptcore.errors import ConfigError
from gptcore.sections import check


def asked() -> tuple[Pipeline, bool] | None:
    """The pipeline that this flow run was asked to retrain, and whether its sources are not the deployment's own.

    None if no deployment started it. Raises ConfigError.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        return None
    try:
        with get_client(sync_client=True) as client:
            registered = client.read_deployment(run.deployment_id).parameters
    except ObjectNotFound:  # the deployment is gone since: the run carries all that was asked for
        registered = {}
    pipeline = merged(registered, run.parameters)
    own_sources = registered.get("corpus", {}).get("sources", list(pipeline.corpus.sources))
    return pipeline, own_sources != list(pipeline.corpus.sources)


def merged(registered: dict[str, Any], given: dict[str, Any]) -> Pipeline:
    """The pipeline of a deployment's parameters with a run's parameters over them. Raises ConfigError."""
    layers = [{key: value for key, value in layer.items() if key != "pipeline"} for layer in (registered, given)]
    name = given.get("pipeline", registered.get("pipeline"))
    values = {key: value for key, value in merge(layers).items() if key in Pipeline.model_fields}
    pipeline, problems = check(Pipeline, {"name": name, **values})
    if pipeline is None:
        raise ConfigError("\n".join(f"{'.'.join(map(str, path))}: {what}" for path, what in problems))
    return pipeline


def parameters(pipeline: Pipeline, names: set[str]) -> dict[str, Any]:
    """A pipeline as the parameters of its flow: all its values that the flow takes, `names`, as plain data."""
    values = pipeline.model_dump(mode="json", include=names)
    return {"pipeline": pipeline.name, **values}

"""The deployments of pipelines.yaml on a work pool: workers run them, on whatever machines they are.

Workers import flows by module path, so gptflow must be installed where they run; the state root and local sources must
be there under the same paths as here.
"""

import os
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from flows.pipelines import PipelinesFile
from flows.service import successes
from flows.service.serve import Pool, deployments, register
from flows.state import OPT_OUTS, StateRoot
from gptcore.errors import ConfigError, GPTCoreError


def deploy(file: PipelinesFile, root: StateRoot, work_pool: str, image: str | None) -> None:
    """Registers the deployments of the file on an existing work pool, and says what changed.

    Raises ConfigError if there is no such pool, or it takes no image; GPTCoreError if Prefect does not answer.
    """
    api = os.environ["PREFECT_API_URL"]
    try:
        with get_client(sync_client=True) as client:
            _check_pool(client, work_pool, image)
        wanted = deployments(file, root, Pool(work_pool, job_variables(root, image)))
        _, lines = register(wanted, root)
    except httpx.TransportError as error:
        raise GPTCoreError(f"Prefect at {api} does not answer: {error}. Start it, or mend PREFECT_API_URL.") from None
    successes.expect(root, map(file.pipeline, file.names()))
    click.echo("\n".join([*lines, f"{len(wanted)} deployments on the work pool {work_pool}"]))


def _check_pool(client: SyncPrefectClient, name: str, image: str | None) -> None:
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        there = ", ".join(sorted(pool.name for pool in client.read_work_pools())) or "none"
        raise ConfigError(
            f"--work-pool {name}: there is no such pool; there are: {there}. `prefect work-pool create {name} --type "
            "process` makes one for workers on this machine."
        ) from None
    variables = pool.base_job_template.get("variables", {}).get("properties", {})
    if image is not None and "image" not in variables:
        raise ConfigError(f"--image {image}: the work pool {name} is of type {pool.type}, which runs no images")


def job_variables(root: StateRoot, image: str | None) -> dict[str, Any]:
    """What a worker gives to every flow run: where the state is, and that nothing leaves the machine.

    Anyone who may look at the server reads this, so a tracking server's password must come from the worker's own
    environment. So must Prefect's address: a worker's way to the server need not be ours.
    """
    if urlsplit(root.tracking_uri).password:
        raise ConfigError(
            "MLFLOW_TRACKING_URI holds a password, which every deployment would show. Give the address without "
            "it here, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to the workers."
        )
    environment = {**OPT_OUTS, "GPTFLOW_HOME": str(root.path), "MLFLOW_TRACKING_URI": root.tracking_uri}
    return {"env": environment, **({"image": image} if image else {})}

"""The deployments of pipelines.yaml on a work pool: workers run them, on whatever machines they are.

Workers import flows by module path, so gptflow must be installed where they run, or in the image that they start; the
state root and local sources must be there under the same paths as here. The folder deploy/ has an image, the pools'
templates, and a page that says how.
"""

import os
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound

from flows.pipelines import PipelinesFile
from flows.service import successes
from flows.service.serve import Pool, deployments, register
from flows.state import OPT_OUTS, StateRoot
from gptcore.errors import ConfigError, GPTCoreError

_REFUSED = (401, 403)
_HERE = ("localhost", "127.0.0.1", "::1")
_PASSED_ON = (
    "GPTFLOW_DATABASE",
    "GPTFLOW_ARTIFACTS",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
"""Where things are, which the runs must know as well. Keys and passwords are given to the workers' side instead."""


def deploy(file: PipelinesFile, root: StateRoot, work_pool: str, image: str | None) -> None:
    """Registers the deployments of the file on an existing work pool, and says what changed.

    Raises ConfigError if there is no such pool, it takes no image or needs one, or its runs could not reach what they
    need; GPTCoreError if Prefect does not answer, or refuses.
    """
    api = os.environ["PREFECT_API_URL"]
    try:
        with get_client(sync_client=True) as client:
            pool = _pool(client, work_pool)
        _check_image(pool, image)
        _check_reach(pool, root)
        wanted = deployments(file, root, Pool(work_pool, job_variables(root, image)))
        _, lines = register(wanted, root)
    except httpx.TransportError as error:
        raise GPTCoreError(f"Prefect at {api} does not answer: {error}. Start it, or mend PREFECT_API_URL.") from None
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in _REFUSED:
            raise
        raise GPTCoreError(
            f"Prefect at {api} refuses with {error.response.status_code}: set PREFECT_API_AUTH_STRING or "
            "PREFECT_API_KEY to what it asks for, of someone who may change deployments."
        ) from None
    successes.expect(root, map(file.pipeline, file.names()))
    click.echo("\n".join([*lines, f"{len(wanted)} deployments on the work pool {work_pool}"]))


def _pool(client: SyncPrefectClient, name: str) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        there = ", ".join(sorted(pool.name for pool in client.read_work_pools())) or "none"
        raise ConfigError(
            f"--work-pool {name}: there is no such pool; there are: {there}. `prefect work-pool create {name} --type "
            "process` makes one for workers on this machine; deploy/README.md has those of Docker and Kubernetes."
        ) from None


def _check_image(pool: WorkPool, image: str | None) -> None:
    variables = pool.base_job_template.get("variables", {}).get("properties", {})
    if "image" not in variables:
        if image is not None:
            raise ConfigError(
                f"--image {image}: the work pool {pool.name} is of type {pool.type}, which runs no images"
            )
    elif image is None and not variables["image"].get("default"):
        raise ConfigError(
            f"--work-pool {pool.name}: its runs live in containers ({pool.type}), so give --image IMAGE, with gptflow "
            "installed. Prefect's own image has none. deploy/README.md says how to build it."
        )


def _check_reach(pool: WorkPool, root: StateRoot) -> None:
    """What is local here is not local in a pod."""
    if pool.type != "kubernetes":
        return
    uri = root.tracking_uri
    if urlsplit(uri).hostname in _HERE:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI is {uri}, which in a pod of the work pool {pool.name} means the pod itself. Give the "
            "address by which pods reach the server."
        )
    if uri.startswith("sqlite:"):
        click.echo(
            "warning: MLflow's database is a SQLite file in the state root, which pods on several nodes cannot share "
            "safely. Set MLFLOW_TRACKING_URI to a tracking server.",
            err=True,
        )


def job_variables(root: StateRoot, image: str | None) -> dict[str, Any]:
    """What a worker gives to every flow run: where the state is, and that nothing leaves the machine.

    Anyone who may look at the server reads this, so a tracking server's password must come from the worker's own
    environment, or from a secret of its pool. So must Prefect's address: a worker's way to the server need not be ours.
    """
    given = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment = {**OPT_OUTS, "GPTFLOW_HOME": str(root.path), "MLFLOW_TRACKING_URI": root.tracking_uri, **given}
    for name, value in environment.items():
        if urlsplit(value).password:
            raise ConfigError(
                f"{name} holds a password, which every deployment would show. Give the address without it here, and "
                "to the workers MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY."
            )
    return {"env": environment, **({"image": image} if image else {})}

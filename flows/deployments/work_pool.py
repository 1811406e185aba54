"""`gptflow deploy`: the deployments of pipelines.yaml on a work pool, whose workers run them on any machine.

Workers import flows by module path, so gptflow must be installed on their machines, or in the image that they start.
The state root and local sources must have the same paths there as here. The folder deploy/ has an image, templates for
pools, and instructions.
"""

import os
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound

from flows.config.pipelines import PipelinesFile
from flows.deployments.serve import TAG, Pool, build_deployments
from flows.deployments.sync import sync_deployments
from flows.retrain import last_success
from flows.state.root import OPT_OUTS, StateRoot
from gptcore.errors import ConfigError, GPTCoreError

_UNAUTHORIZED = (401, 403)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PASSED_ON = (
    "GPTFLOW_DATABASE",
    "GPTFLOW_ARTIFACTS",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
"""Addresses that runs need as well. Keys and passwords are given to the workers' environment instead."""


def deploy(
    file: PipelinesFile, root: StateRoot, work_pool: str, image: str | None, reset_schedules: bool = False
) -> None:
    """Register the deployments of the file on an existing work pool, and print what changed.

    With `reset_schedules`, the file decides which schedules are paused, not a person who used the server since.

    Raises ConfigError if there is no such pool, if the image is missing or superfluous, or if runs could not reach
    their servers. Raises GPTCoreError if Prefect does not answer, or refuses.
    """
    api = os.environ["PREFECT_API_URL"]
    try:
        with get_client(sync_client=True) as client:
            pool = _read_pool(client, work_pool)
        _check_image(pool, image)
        _check_addresses(pool, root)
        wanted = build_deployments(file, root, Pool(work_pool, build_job_variables(root, image)))
        result = sync_deployments(wanted, [TAG, root.tag], reset_schedules)
    except httpx.TransportError as error:
        raise GPTCoreError(
            f"Prefect at {api} does not answer: {error}. Start it, or correct PREFECT_API_URL."
        ) from None
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in _UNAUTHORIZED:
            raise
        raise GPTCoreError(
            f"Prefect at {api} refuses with {error.response.status_code}: set PREFECT_API_AUTH_STRING or "
            "PREFECT_API_KEY to the credentials of a user who may change deployments."
        ) from None
    last_success.expect(root, map(file.pipeline, file.names()))
    click.echo("\n".join([*result.lines(), f"{len(wanted)} deployments on the work pool {work_pool}"]))


def _read_pool(client: SyncPrefectClient, name: str) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        existing = ", ".join(sorted(pool.name for pool in client.read_work_pools())) or "none"
        raise ConfigError(
            f"--work-pool {name}: there is no such pool (existing pools: {existing}). `prefect work-pool create {name} "
            "--type process` creates a pool for workers on this machine. See deploy/README.md for pools of Docker and "
            "Kubernetes."
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
            f"--work-pool {pool.name}: its runs live in containers ({pool.type}), so give --image IMAGE with gptflow "
            "installed. Prefect's own image does not have it. See deploy/README.md for how to build an image."
        )


def _check_addresses(pool: WorkPool, root: StateRoot) -> None:
    """Raise ConfigError if an address is local to this machine, because a pod cannot reach it."""
    if pool.type != "kubernetes":
        return
    uri = root.tracking_uri
    if urlsplit(uri).hostname in _LOOPBACK:
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


def build_job_variables(root: StateRoot, image: str | None) -> dict[str, Any]:
    """Return what a worker gives to every flow run: the addresses of the state, opt-outs of telemetry, and the image.

    Every user of the Prefect server can read these variables. So the password of a tracking server must come from the
    worker's own environment, or from a secret of its pool. Prefect's address comes from there too: a worker may reach
    the server by another address. Raises ConfigError if an address contains a password.
    """
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment = {**OPT_OUTS, "GPTFLOW_HOME": str(root.path), "MLFLOW_TRACKING_URI": root.tracking_uri, **passed_on}
    for name, value in environment.items():
        if urlsplit(value).password:
            raise ConfigError(
                f"{name} contains a password, which every deployment would show. Give the address without it here, and "
                "give the workers MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY."
            )
    return {"env": environment, **({"image": image} if image else {})}

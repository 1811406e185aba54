"""The folder deploy/: Prefect's own worker code renders our templates, and Kubernetes and Docker accept the result."""

import asyncio
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deployments.up import RUN_GRACE_SECONDS
from flows.deployments.work_pool import build_job_variables
from flows.retrain.trainer_process import GRACE_SECONDS
from flows.state.root import StateRoot
from gptcore.errors import ConfigError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
PREFECTS_GRACE_SECONDS = 30
"""Prefect kills a flow run so long after it was asked to stop."""
NEEDED = {
    *("GPTFLOW_HOME", "MLFLOW_TRACKING_URI", "GPTFLOW_DATABASE", "GPTFLOW_ARTIFACTS", "PREFECT_API_URL"),
    *("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT__FLOW_RUN_ID"),
}
# Prefect requires these keys in the pod's specification. Kubernetes does not know them there and drops them.
PREFECTS_OWN = {"parallelism", "completions"}


@pytest.fixture
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The job variables that `gptflow deploy --image` registers with a deployment while its environment has secrets."""
    for name in ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("GPTFLOW_DATABASE", "postgresql://ann@db/gptflow")
    monkeypatch.setenv("GPTFLOW_ARTIFACTS", "s3://models/gptflow")
    return build_job_variables(StateRoot(tmp_path), "gptflow:1")


def rendered(kind: str, values: dict[str, Any]) -> Any:
    """Return the job's configuration as the worker of this kind prepares it."""
    if kind == "docker":
        from prefect_docker.worker import DockerWorkerJobConfiguration as Configuration
    else:
        from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration as Configuration
    template = json.loads((FOLDER / kind / "base-job-template.json").read_text())
    with temporary_settings({PREFECT_API_URL: "http://prefect:4200/api"}):
        configuration = asyncio.run(Configuration.from_template_and_values(template, values))
        configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="night"))
    return configuration


def strictly(kind: str, body: Any, at: str = "") -> None:
    """Check the body against Kubernetes' own schema: known keys, values of the right type, nothing missing."""
    from kubernetes_asyncio.client import models

    if listed := re.fullmatch(r"list\[(.*)\]", kind):
        assert isinstance(body, list), f"{at} is not a list"
        for index, item in enumerate(body):
            strictly(listed[1], item, f"{at}[{index}]")
    elif mapped := re.fullmatch(r"dict\((.*), (.*)\)", kind):
        assert isinstance(body, dict), f"{at} is not a mapping"
        for key, value in body.items():
            strictly(mapped[2], value, f"{at}.{key}")
    elif (model := getattr(models, kind, None)) is not None:
        known = {model.attribute_map[name]: wanted for name, wanted in model.openapi_types.items()}
        extra = PREFECTS_OWN if kind == "V1PodSpec" else set()
        assert body.keys() - known.keys() <= extra, f"{at}: {kind} has no {body.keys() - known.keys()}"
        for key in body.keys() & known.keys():
            strictly(known[key], body[key], f"{at}.{key}")
        own = {name: body.get(key) for name, key in model.attribute_map.items()}
        model(**own)  # raises if something required is missing
    elif at.endswith((".cpu", ".memory", ".storage", ".sizeLimit", ".nvidia.com/gpu")):
        assert re.fullmatch(r"\d+(\.\d+)?(m|[KMGT]i?)?", str(body)), f"{at} is not a quantity: {body}"
    elif kind != "object":  # Kubernetes' type for a port's number or name
        assert isinstance(body, {"str": str, "int": int, "bool": bool}[kind]), f"{at} is not of type {kind}: {body!r}"


def test_kubernetes_accepts_the_job_which_has_time_to_save_and_contains_no_secret(
    variables: dict[str, Any],
) -> None:
    job = rendered("kubernetes", variables).job_manifest
    strictly("V1Job", job)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        GRACE_SECONDS < PREFECTS_GRACE_SECONDS and pod["terminationGracePeriodSeconds"] >= PREFECTS_GRACE_SECONDS + 15
    )
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment.keys() >= NEEDED and "hush" not in json.dumps(job)
    # With this setting Prefect lets an evicted run save, and restarts it elsewhere.
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert (container["image"], container["args"]) == ("gptflow:1", ["prefect", "flow-run", "execute"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes[mounts["/state"]]["persistentVolumeClaim"]["claimName"] == "gptflow-state"
    assert container["envFrom"][0]["secretRef"]["name"] == "gptflow"
    chosen = {**variables, "gpus": 4, "memory_limit": "512Gi", "node_selector": {"pool": "h200"}}
    pod = rendered("kubernetes", chosen).job_manifest["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert (limits, pod["nodeSelector"]) == ({"memory": "512Gi", "nvidia.com/gpu": 4}, {"pool": "h200"})


def test_docker_accepts_the_container_which_has_shared_memory_and_contains_no_secret(
    variables: dict[str, Any],
) -> None:
    from docker.models.containers import _create_container_args

    made = rendered("docker", variables)
    more = made.container_create_kwargs
    asked = {"image": made.image, "command": made.command, "environment": made.env, "volumes": made.volumes, **more}
    given = _create_container_args({**asked, "version": "1.41"})  # raises for an unknown argument
    assert given["host_config"]["ShmSize"] == 8 * 2**30 and given["stop_signal"] == "SIGTERM"
    assert given["host_config"]["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert given["host_config"]["Binds"] == ["/srv/gptflow:/srv/gptflow"]
    assert made.env.keys() >= NEEDED and "hush" not in json.dumps(given)
    assert rendered("docker", {**variables, "device_requests": []}).container_create_kwargs["device_requests"] == []


def test_kubernetes_accepts_the_manifests_and_they_fit_together() -> None:
    from flows.cli import deploy

    kinds, images, commands = {}, set(), []
    for file in sorted((FOLDER / "kubernetes").glob("*.yaml")):
        for body in yaml.safe_load_all(file.read_text()):
            schema = "RbacV1Subject" if body["kind"] == "Subject" else f"V1{body['kind']}"
            strictly(schema, body, file.name)
            kinds.setdefault(body["kind"], set()).add(body["metadata"]["name"])
            for container in body.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
                images.add(container["image"])
                commands.append(container["args"])
    template = json.loads((FOLDER / "kubernetes" / "base-job-template.json").read_text())["variables"]["properties"]
    assert kinds["PersistentVolumeClaim"] == {template["state_claim"]["default"]}
    assert len(images) == 1 and {"prefect", "mlflow"} == kinds["Service"]
    (registering,) = (command[2:] for command in commands if command[:2] == ["gptflow", "deploy"])
    deploy.make_context("deploy", registering)  # raises for an unknown option


def test_the_image_finds_the_files_it_copies_runs_as_an_ordinary_user_and_lets_a_run_save() -> None:
    text = re.sub(r"\\\n(\s*#.*\n)*", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    copied = [source for word, *rest in lines if word == "COPY" and "--from=build" not in rest for source in rest[:-1]]
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    for source in copied:
        assert (ROOT / source).exists() and any(fnmatch(source, pattern) for pattern in allowed), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = (line[1].removeprefix("EXTRAS=").split(",") for line in lines if line[1].startswith("EXTRAS="))
    assert set(asked) <= extras.keys() and "constraints.txt" in copied
    assert ["USER", "1000:1000"] in lines and ["STOPSIGNAL", "SIGTERM"] in lines
    environment = dict(word.split("=", 1) for line in lines if line[0] == "ENV" for word in line[1:])
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert RUN_GRACE_SECONDS < PREFECTS_GRACE_SECONDS


@pytest.mark.parametrize(
    ("name", "value"),
    [("MLFLOW_TRACKING_URI", "https://ann:hush@example.org"), ("AWS_ENDPOINT_URL", "http://ann:hush@store:9000")],
)
def test_no_password_is_shown_with_a_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} contains a password.* give the workers") as refused:
        build_job_variables(StateRoot(tmp_path), image=None)
    assert "hush" not in str(refused.value)

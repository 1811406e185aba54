"""That the pinned versions of Prefect, FastAPI and SQLAlchemy really schedule. With a wrong pair, nothing says so."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.pipelines import Pipeline
from flows.state import OPT_OUTS

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API URL of a real Prefect server with all its services."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **OPT_OUTS, "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    try:
        wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=5).status == 200, 120, process)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(is_true, seconds: float, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if is_true():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s")


def test_a_cron_deployment_gets_scheduled_runs_with_the_pipelines_parameters(server: str, tiny: Pipeline) -> None:
    program = f"""
import json, time
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from flows.pipelines import Pipeline
from flows.retrain import retrain
from prefect.types.entrypoint import EntrypointType
tiny = Pipeline.model_validate_json({tiny.model_dump_json()!r})
sections = {{name: getattr(tiny, name) for name in ("corpus", "model", "train", "sample", "gate")}}
deployment = retrain.to_deployment(
    name="tiny", cron="* * * * *", parameters={{"pipeline": "tiny", "model_name": "gpt-tiny", **sections}},
    entrypoint_type=EntrypointType.MODULE_PATH,
)
identity = deployment.apply()
with get_client(sync_client=True) as client:
    for _ in range(120):
        runs = [run for run in client.read_flow_runs() if run.deployment_id == identity]
        if runs:
            break
        time.sleep(1)
    assert len(runs) >= 2, runs
    assert {{run.state.type.value for run in runs}} == {{"SCHEDULED"}}
    assert runs[0].parameters["train"]["max_steps"] == 60, runs[0].parameters
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr

"""That the pinned versions of Prefect, FastAPI and SQLAlchemy really schedule. With a wrong pair, nothing says so."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.pipelines import Pipeline
from tests.flows.servers import Prefect, clean, prefect_server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prefect]:
    with prefect_server(tmp_path) as server:
        yield server


def test_a_cron_deployment_gets_scheduled_runs_with_the_pipelines_parameters(server: Prefect, tiny: Pipeline) -> None:
    program = f"""
import json, time
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from flows.pipelines import SECTIONS, Pipeline
from flows.retrain import retrain
from prefect.types.entrypoint import EntrypointType
tiny = Pipeline.model_validate_json({tiny.model_dump_json()!r})
sections = {{name: getattr(tiny, name) for name in SECTIONS}}
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
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean(PREFECT_API_URL=server.url),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr

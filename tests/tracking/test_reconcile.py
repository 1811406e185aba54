"""Runs that a crash left behind: the next start marks dead runs as crashed and leaves live runs alone."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flows.state.root import StateRoot
from flows.tracking import reconcile
from tests.servers import clean

pytestmark = pytest.mark.usefixtures("prefect_server", "tiny_registry")


@pytest.fixture
def client() -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def left(client: Any, flow: Any, **more: Any) -> UUID:
    """Create a flow run that Prefect believes to be running, and return its id."""
    from prefect.states import Running

    return client.create_flow_run(flow, state=Running(), **more).id


def state(client: Any, run: UUID) -> str:
    return client.read_flow_run(run).state.type.value


@pytest.mark.slow
def test_an_operation_of_this_state_is_marked_as_crashed_if_no_process_works_on_it(
    client: Any, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.operations.flows import prune

    monkeypatch.setattr(reconcile, "_STARTING", timedelta(0))
    tags = [root.prepare().tag]
    dead, foreign, alive = left(client, prune, tags=tags), left(client, prune), left(client, prune, tags=tags)
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=clean(PREFECT__FLOW_RUN_ID=str(alive))
    )
    try:
        (line,) = reconcile.reconcile(client, root)
    finally:
        process.communicate(b"\n")
    assert str(dead) in line
    assert [state(client, run) for run in (dead, foreign, alive)] == ["CRASHED", "RUNNING", "RUNNING"]


@pytest.mark.slow
def test_a_run_that_died_a_moment_ago_is_not_left_running_forever(
    client: Any, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.retrain.flow import retrain

    monkeypatch.setattr(reconcile, "_STARTING", timedelta(seconds=2))
    run = left(client, retrain, parameters={"pipeline": "night"})
    reconcile.reconcile(client, root)
    assert state(client, run) == "CRASHED"

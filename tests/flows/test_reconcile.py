"""Runs that a crash left, found at a start: which are ended, and which are alive."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flows.service import reconcile
from flows.state import StateRoot
from tests.flows.servers import clean

pytestmark = pytest.mark.usefixtures("prefect_server", "tiny_registry")


@pytest.fixture
def client() -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def left(client: Any, flow: Any, **more: Any) -> UUID:
    """A flow run that Prefect calls running."""
    from prefect.states import Running

    return client.create_flow_run(flow, state=Running(), **more).id


def state(client: Any, run: UUID) -> str:
    return client.read_flow_run(run).state.type.value


@pytest.mark.slow
def test_an_operation_is_ended_where_no_process_is_behind_it_and_it_belongs_to_this_state(
    client: Any, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.operate import prune

    monkeypatch.setattr(reconcile, "_STARTING", timedelta(0))
    tags = [root.create().tag]
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
def test_a_run_that_died_a_moment_ago_is_not_left_running_for_ever(
    client: Any, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.retrain import retrain

    monkeypatch.setattr(reconcile, "_STARTING", timedelta(seconds=2))
    run = left(client, retrain, parameters={"pipeline": "night"})
    reconcile.reconcile(client, root)
    assert state(client, run) == "CRASHED"

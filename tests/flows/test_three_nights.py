"""Three nights by cron: a change, none, a change. Nobody starts anything by hand.

That the pinned versions of Prefect, FastAPI and SQLAlchemy really schedule is shown here alone; with a wrong pair,
nothing says so.
"""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.releases.registry import champion_of, versions
from flows.state import StateRoot
from tests.fixtures import prose
from tests.flows.servers import Up, wait_for, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def nights(up: Up) -> list[dict[str, Any]]:
    """The runs that the schedule has started and that have ended, oldest first."""
    ended = [run for run in up.prefect.runs() if run["state"]["type"] == "COMPLETED" and run["auto_scheduled"]]
    return sorted(ended, key=lambda run: run["expected_start_time"])


def registered(root: StateRoot) -> list[tuple[int, str]]:
    """Each version, and the flow run that made it."""
    return [(int(version.version), version.tags["prefect_flow_run_id"]) for version in versions(root, "gpt-tiny")]


def test_a_schedule_retrains_when_the_text_has_changed_and_only_then(up: Up, root: StateRoot, project: Path) -> None:
    write(project, tiny={"schedule": {"cron": "* * * * *"}})
    up.start()
    wait_for(lambda: len(nights(up)) == 1, 120)
    (first,) = nights(up)
    assert first["state"]["name"] == "Promoted" and registered(root) == [(1, first["id"])]

    wait_for(lambda: len(nights(up)) == 2, 120)
    second = nights(up)[1]
    assert second["state"]["name"] == "Skipped" and "lock" not in second["state"]["message"]
    assert registered(root) == [(1, first["id"])]
    (project / "text" / "two.txt").write_text(prose(2, num_words=9000))

    wait_for(lambda: len(nights(up)) == 3, 120)
    third = nights(up)[2]
    assert third["state"]["name"] in ("Promoted", "Kept champion")
    assert registered(root) == [(1, first["id"]), (2, third["id"])]
    old, new = versions(root, "gpt-tiny")
    assert old.tags["corpus_sha256"] != new.tags["corpus_sha256"]
    champion = champion_of(root, "gpt-tiny")
    assert champion is not None
    assert str(champion.version) == ("2" if third["state"]["name"] == "Promoted" else "1")
    client = MlflowClient(root.tracking_uri)
    assert [client.get_run(version.run_id).info.status for version in (old, new)] == ["FINISHED", "FINISHED"]

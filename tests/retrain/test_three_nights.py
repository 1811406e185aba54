"""Three nights by cron: with a change, without one, with a change. Nothing is started by hand.

Only this test shows that the pinned versions of Prefect, FastAPI and SQLAlchemy really schedule runs. A wrong pair of
versions reports no error.
"""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.registry.versions import find_champion, list_versions
from flows.state.root import StateRoot
from tests.servers import Up, wait_for
from tests.tiny import prose, write_pipelines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def nights(up: Up) -> list[dict[str, Any]]:
    """Return the runs that the schedule has started and that have ended, oldest first."""
    ended = [run for run in up.prefect.runs() if run["state"]["type"] == "COMPLETED" and run["auto_scheduled"]]
    return sorted(ended, key=lambda run: run["expected_start_time"])


def registered(root: StateRoot) -> list[tuple[int, str]]:
    """Return each version and the flow run that made it."""
    return [(int(version.version), version.tags["prefect_flow_run_id"]) for version in list_versions(root, "gpt-tiny")]


def test_a_schedule_retrains_only_when_the_text_has_changed(up: Up, root: StateRoot, project: Path) -> None:
    write_pipelines(project, tiny={"schedule": {"cron": "* * * * *"}})
    up.start()
    wait_for(lambda: len(nights(up)) == 1, 240)
    (first,) = nights(up)
    assert up.prefect.verdict(first["id"]) == "promoted" and registered(root) == [(1, first["id"])]

    wait_for(lambda: len(nights(up)) == 2, 240)
    second = nights(up)[1]
    assert up.prefect.verdict(second["id"]) == "skipped" and "lock" not in second["state"]["message"]
    assert registered(root) == [(1, first["id"])]
    (project / "text" / "two.txt").write_text(prose(2, num_words=9000))

    wait_for(lambda: len(nights(up)) == 3, 240)
    third = nights(up)[2]
    verdict = up.prefect.verdict(third["id"])
    assert verdict in ("promoted", "rejected")
    assert registered(root) == [(1, first["id"]), (2, third["id"])]
    old, new = list_versions(root, "gpt-tiny")
    assert old.tags["corpus_sha256"] != new.tags["corpus_sha256"]
    champion = find_champion(root, "gpt-tiny")
    assert champion is not None
    assert str(champion.version) == ("2" if verdict == "promoted" else "1")
    client = MlflowClient(root.tracking_uri)
    assert [client.get_run(version.run_id).info.status for version in (old, new)] == ["FINISHED", "FINISHED"]

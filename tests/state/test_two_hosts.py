"""Two machines with one state: one is cut off during training, and the other takes the lock and resumes."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.state.postgres import parse
from tests.servers import wait_for
from tests.state import hosts, objects, postgres
from tests.tiny import write_project

pytestmark = pytest.mark.deep


def is_at_its_lock(project: Path) -> bool:
    path = project / "mlruns" / "locks" / "tiny.lock"
    return path.exists() and path.stat().st_size > 0


def test_a_host_that_is_cut_off_stops_and_publishes_nothing_while_the_other_resumes_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"max_steps": 7000, "eval_every": 1000, "checkpoint_steps": 200, "learning_rate": 0.003}
    projects = [tmp_path / "one", tmp_path / "two"]
    for project in projects:
        project.mkdir()
        write_project(project, train=train, overlap="wait")
    first, second = (project / "run.log" for project in projects)
    with hosts.two() as (one, two), postgres.running(hosts.SERVER) as server, objects.running(hosts.SERVER) as store:
        store.client().create_bucket(Bucket="state")
        url = server.new()
        told = {"GPTFLOW_DATABASE": url, "PGPASSWORD": server.password, "GPTFLOW_ARTIFACTS": "s3://state/x"}
        environment = {**told, **store.environment}

        def pushed() -> list[int]:
            found = (key.rpartition("step-")[2] for key in store.keys("state", "x/state/runs") if "step-" in key)
            return [int(key.partition("/")[0]) for key in found if key.endswith("manifest.json")]

        training = one.begin(projects[0], first, "run", "tiny", **environment)
        wait_for(lambda: training.poll() is not None or is_at_its_lock(projects[0]), 240)
        waiting = two.begin(projects[1], second, "run", "tiny", **environment)
        wait_for(lambda: training.poll() is not None or (pushed() and is_at_its_lock(projects[1])), 240)
        assert training.poll() is None, first.read_text()
        one.cut()
        cut_at, saved = time.monotonic(), max(pushed())
        (run,) = (projects[0] / "mlruns" / "runs" / "tiny").glob("*-1")
        wait_for(lambda: "compare" in second.read_text(), 40)
        taken_after = time.monotonic() - cut_at
        one.mend()
        assert waiting.wait(100) == 0, second.read_text()
        said = second.read_text()
        assert f"another machine started {run.name}" in said and "promoted" in said, said
        begun = [
            json.loads(line)["step"]
            for line in (projects[1] / "mlruns" / "runs" / "tiny" / run.name / "metrics.jsonl").read_text().splitlines()
        ]
        assert begun == list(range(1, 7001)), "the metrics from before the cut must be kept"
        assert training.wait(200) == 1, first.read_text()
        assert "the lock tiny.lock was lost" in first.read_text(), first.read_text()
        monkeypatch.setenv("PGPASSWORD", server.password)
        client = MlflowClient(parse(url, "the test").tracking_uri)
        assert [str(version.version) for version in client.search_model_versions("name = 'gpt-tiny'")] == ["1"]
        assert str(client.get_model_version_by_alias("gpt-tiny", "champion").version) == "1"
        again = one.begin(projects[0], first, "run", "tiny", **environment)
        assert again.wait(60) == 0 and "nothing changed since version 1" in first.read_text(), first.read_text()
        print(f"cut off at {saved} of 7000 steps; taken over after {taken_after:.1f} s")

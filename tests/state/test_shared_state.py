"""`gptflow up` on a real PostgreSQL and an S3-compatible store, and a second machine that uses both."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from flows.state.object_store import Store
from flows.state.postgres import parse
from gptcore import manifest
from tests.servers import Up, begin, gptflow, living
from tests.state.objects import Objects
from tests.state.postgres import Postgres
from tests.tiny import prose, write_pipelines, write_project

pytestmark = pytest.mark.deep


def test_up_shares_its_state_on_postgresql_and_s3_with_a_second_machine_and_leaks_no_password(
    tmp_path: Path, postgres: Postgres, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for project in (first, second):
        project.mkdir()
        write_project(project)
    write_pipelines(first, tiny={"schedule": {"cron": "0 3 * * *"}})
    objects.client().create_bucket(Bucket="shared")
    url = postgres.new()
    secrets = {"PGPASSWORD": postgres.password, **objects.environment}
    up = Up(first)
    up.more = ["--database", url, "--artifacts", "s3://shared/state"]
    try:
        up.start(**secrets)
        assert f"the state is on {url}, s3://shared/state" in up.log.read_text()
        assert up.prefect.verdict(up.prefect.start("tiny")) == "promoted"
        scheduled = up.prefect.ask("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        assert "tiny" in {run["parameters"].get("pipeline") for run in scheduled}
        command_lines = [" ".join(process.cmdline()) for process in up.processes()]
        doctor = begin(first, first / "doctor.json", "doctor", "--json", **secrets)
        said = _on_the_second(second, url, postgres, objects)
        assert doctor.wait(120) == 0, (first / "doctor.json").read_text()
        processes = up.processes()
    finally:
        up.stop()
    assert living(processes) == [] and "stopped" in up.log.read_text()
    apart = "select schemaname from pg_tables where tablename = 'alembic_version'"
    assert sorted(postgres.ask(url.rpartition("/")[2], apart)) == ["mlflow", "prefect"]
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(parse(url, "the test").tracking_uri)
    mlflow.set_tracking_uri(parse(url, "the test").tracking_uri)
    assert len(mlflow.pyfunc.load_model("models:/gpt-tiny@champion").predict(["The model"])) == 1
    versions = {str(version.version): version.tags for version in client.search_model_versions("name = 'gpt-tiny'")}
    assert sorted(versions) == ["1", "2"] and "of version 1 on the same" in versions["2"]["reason"]
    assert versions["2"]["gate_unknown"] == "", "the training text of the first machine's champion must be known"
    corpora = {tags["corpus_sha256"][:16] for tags in versions.values()}
    _assert_prune_frees_there_what_no_version_needs(second, url, tmp_path, secrets, corpora)
    for secret in (postgres.password, objects.secret):
        assert [line for line in command_lines if secret in line] == []
        assert not any(secret in text for text in (*said, postgres.dump(url.rpartition("/")[2])))
        assert [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []
        assert [key for key in objects.keys("shared") if secret.encode() in _body(objects, key)] == []


def _assert_prune_frees_there_what_no_version_needs(
    project: Path, url: str, tmp_path: Path, secrets: dict[str, str], corpora: set[str]
) -> None:
    store = Store("s3://shared/state")
    with manifest.stage(tmp_path) as staged:
        left = manifest.commit(staged, tmp_path / "left", {"kind": "test"})
    store.push(left, "corpora/left")
    assert set(store.list_directories("corpora")) == {*corpora, "left"} and len(corpora) == 2
    done = gptflow(project, "prune", "--json", GPTFLOW_DATABASE=url, GPTFLOW_ARTIFACTS="s3://shared/state", **secrets)
    assert done.returncode == 0 and "s3://shared/state/state/corpora/left" in done.stdout, done.stdout + done.stderr
    assert set(store.list_directories("corpora")) == corpora


def _on_the_second(project: Path, url: str, postgres: Postgres, objects: Objects) -> list[str]:
    """Train on other text on a second machine: kill the run during the upload of the model, then let another finish."""
    (project / "text" / "two.txt").write_text(prose(2, num_words=9000))
    with_password = url.replace("@", f":{postgres.password}@")
    told = {"GPTFLOW_DATABASE": with_password, "GPTFLOW_ARTIFACTS": "s3://shared/state", **objects.environment}
    killed: list[str] = []

    def kill(environ: dict[str, Any]) -> tuple[str, str] | None:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "PUT" and "/artifacts/tiny/" in path and path.endswith("model.safetensors"):
            killed.append(path)
            os.kill(running.pid, signal.SIGKILL)
            return "500 Internal Server Error", "InternalError"
        return None

    objects.refuse = kill
    running = begin(project, project / "killed.log", "run", "tiny", **told)
    assert running.wait(120) == -signal.SIGKILL and killed
    objects.refuse = lambda _: None
    done = gptflow(project, "run", "tiny", "--json", **told)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["uri"] == "models:/gpt-tiny/2"
    assert [key for key in objects.keys("shared", "state/state/runs") if not key.endswith("current.json")] == []
    return [done.stdout, done.stderr]


def _body(objects: Objects, key: str) -> bytes:
    return bytes(objects.client().get_object(Bucket="shared", Key=key)["Body"].read())

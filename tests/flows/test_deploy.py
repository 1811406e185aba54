"""`gptflow deploy`: what is refused, what a work pool gets, and that a process worker really runs it."""

import json
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows.state import StateRoot
from gptcore.errors import ConfigError
from tests.flows.servers import Prefect, Serving, clean, gptflow, prefect_server, write

pytestmark = pytest.mark.slow
NAMES = ("night", "promote", "rollback", "prune", "watch")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server with a work pool for processes."""
    with prefect_server(tmp_path_factory.mktemp("server")) as server:
        server.ask("work_pools/", {"name": "machines", "type": "process", "base_job_template": process_template()})
        yield server


def process_template() -> dict[str, object]:
    from prefect.workers.process import ProcessWorker

    return dict(ProcessWorker.get_default_base_job_template())


@contextmanager
def worker(directory: Path, server: Prefect) -> Iterator[None]:
    """A worker of the pool in a directory of its own."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "machines", "--type", "process"]
    environment = clean(PREFECT_API_URL=server.url, PREFECT_HOME=str(directory), PREFECT_WORKER_QUERY_SECONDS="2")
    with (directory / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=30)
        for left in alive:  # how a worker stops is Prefect's business
            left.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "api", "code", "part"),
    [
        (["--work-pool", "machines"], None, 2, "PREFECT_API_URL is not set"),
        (["--work-pool", "machines"], "http://127.0.0.1:9/api", 1, "does not answer"),
        (["--work-pool", "machine"], "", 2, "--work-pool machine: there is no such pool; there are: machines"),
        (
            ["--work-pool", "machines", "--image", "gpt:1"],
            "",
            2,
            "is of type process, which runs no images",
        ),
        ([], "", 2, "Missing option '--work-pool'"),
    ],
)
def test_what_cannot_be_deployed_is_refused(
    project: Path, server: Prefect, arguments: list[str], api: str | None, code: int, part: str
) -> None:
    environment = {} if api is None else {"PREFECT_API_URL": api or server.url}
    done = gptflow(project, "deploy", *arguments, **environment)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_password_is_shown_with_a_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.service.deploy import job_variables

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@example.org")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD to the workers") as refused:
        job_variables(StateRoot(tmp_path), image=None)
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    given = job_variables(StateRoot(tmp_path), image="gpt:1")
    assert (given["image"], given["env"]["MLFLOW_TRACKING_URI"]) == ("gpt:1", "https://example.org")
    assert "secret" not in json.dumps(given)


def test_a_process_worker_elsewhere_retrains_and_then_has_nothing_to_do(
    project: Path, server: Prefect, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write(project, night={"schedule": {"cron": "0 2 * * *"}, "triggers": [{"on": "corpus_changed"}], "tags": ["mine"]})
    deploy = ("deploy", "--work-pool", "machines")
    done = gptflow(project, *deploy, PREFECT_API_URL=server.url)
    assert done.returncode == 0, done.stderr
    added = [f"added      {name}" for name in NAMES]
    assert done.stdout.splitlines() == [*added, "5 deployments on the work pool machines"]
    registered = server.ask("deployments/name/retrain/night")
    assert (registered["work_pool_name"], registered["entrypoint"]) == ("machines", "flows.retrain.retrain")
    assert registered["schedules"][0]["schedule"]["cron"] == "0 2 * * *" and "mine" in registered["tags"]
    assert set(registered["job_variables"]["env"]) == {
        "GPTFLOW_HOME",
        "MLFLOW_TRACKING_URI",
        "DO_NOT_TRACK",
        "MLFLOW_DISABLE_TELEMETRY",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
    }
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "flows.py").write_text("raise RuntimeError('the wrong flows')")
    with worker(elsewhere, server):
        first = server.start("night")
        assert server.ended(first, 150)["name"] == "Promoted", (elsewhere / "worker.log").read_text()
        second = server.start("night")
        assert server.ended(second, 100)["name"] == "Skipped", (elsewhere / "worker.log").read_text()
    shown = json.loads(gptflow(project, "show", "models:/gpt-night@champion", "--json").stdout)
    assert (shown["version"], shown["prefect_flow_run_id"]) == (1, first)
    assert sorted(path.name for path in elsewhere.iterdir() if path.name.startswith(("mlruns", "mlflow"))) == []


def test_what_the_file_no_longer_names_leaves_the_pool_and_serving_takes_the_deployments_back(
    project: Path, server: Prefect
) -> None:
    def deployed() -> list[str]:
        done = gptflow(project, "deploy", "--work-pool", "machines", PREFECT_API_URL=server.url)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[:-1]

    write(project, one={}, two={})
    deployed()
    assert deployed() == [f"unchanged  {name}" for name in ("one", "two", "promote", "rollback", "prune")]
    write(project, one={"schedule": {"interval": 3600}})
    lines = deployed()
    assert lines[0] == "changed    one" and lines[-1] == "removed    two"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.ask("deployments/name/retrain/two")
    with Serving(project, server) as lines:
        assert lines[0] == "changed    one"
        assert server.ask("deployments/name/retrain/one")["work_pool_name"] is None
        assert server.ended(server.start("one"))["name"] == "Promoted"
    assert deployed()[0] == "changed    one"

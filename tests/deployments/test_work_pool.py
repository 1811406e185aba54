"""`gptflow deploy`: what is refused, what a work pool gets, and that a process worker really runs the deployments."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.config.pipelines import PipelinesFile
from flows.deployments.work_pool import deploy
from flows.state.root import StateRoot
from gptcore.errors import GPTCoreError
from tests.servers import Prefect, Receiver, Serving, clean, gptflow, living, wait_for
from tests.tiny import write_pipelines

pytestmark = pytest.mark.slow
TEMPLATES = Path(__file__).parents[2] / "deploy"
NAMES = ("night", "promote", "rollback", "prune", "watch")


@pytest.fixture(scope="module")
def server(server: Prefect) -> Prefect:
    """The shared server, with a work pool for each kind of worker."""
    for name, kind, template in (
        ("machines", "process", process_template()),
        ("boxes", "docker", json.loads((TEMPLATES / "docker" / "base-job-template.json").read_text())),
        ("pods", "kubernetes", json.loads((TEMPLATES / "kubernetes" / "base-job-template.json").read_text())),
    ):
        server.ask("work_pools/", {"name": name, "type": kind, "base_job_template": template})
    return server


def process_template() -> dict[str, object]:
    from prefect.workers.process import ProcessWorker

    return dict(ProcessWorker.get_default_base_job_template())


@contextmanager
def worker(directory: Path, server: Prefect, *host: str) -> Iterator[psutil.Process]:
    """Run a worker of the pool in its own directory, for one run at a time. `host` is the prefix of its command."""
    command = [*host, sys.executable, "-m", "prefect", "worker", "start", "--pool", "machines", "--type", "process"]
    environment = clean(PREFECT_API_URL=server.url, PREFECT_HOME=str(directory), PREFECT_WORKER_QUERY_SECONDS="2")
    with (directory / "worker.log").open("w") as log:
        process = subprocess.Popen([*command, "--limit", "1"], cwd=directory, env=environment, stdout=log, stderr=log)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        kill(tree(process.pid), 30)  # how a worker stops is Prefect's business
        process.wait()


def tree(pid: int) -> list[psutil.Process]:
    """Return the process and all its descendants, or an empty list if the process is gone."""
    with suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def kill(processes: list[psutil.Process], patience: float = 0) -> None:
    """Kill the processes that have not ended after `patience` seconds."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=10)


def another_host(name: str) -> list[str]:
    """Return a command prefix that gives a process its own host name and process ids, as a container does."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root may start other hosts")
    program = f'hostname {name}; exec "$@"'
    return ["unshare", "--fork", "--pid", "--mount-proc", "--uts", "--kill-child", "sh", "-c", program, "sh"]


@pytest.mark.parametrize(
    ("arguments", "api", "code", "part"),
    [
        (["--work-pool", "machines"], None, 2, "PREFECT_API_URL is not set"),
        (["--work-pool", "machines"], "http://127.0.0.1:9/api", 1, "does not answer"),
        (
            ["--work-pool", "machine"],
            "",
            2,
            "--work-pool machine: there is no such pool (existing pools: boxes, machines, pods)",
        ),
        (
            ["--work-pool", "machines", "--image", "gpt:1"],
            "",
            2,
            "is of type process, which runs no images",
        ),
        ([], "", 2, "Missing option '--work-pool'"),
    ],
)
def test_deploy_refuses_wrong_arguments_and_an_unreachable_server(
    project: Path, server: Prefect, arguments: list[str], api: str | None, code: int, part: str
) -> None:
    environment = {} if api is None else {"PREFECT_API_URL": api or server.url}
    done = gptflow(project, "deploy", *arguments, **environment)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("pool", "image", "part"),
    [
        ("boxes", None, "its runs live in containers (docker), so give --image IMAGE"),
        ("pods", "gpt:1", "http://localhost:5000, which in a pod of the work pool pods means the pod itself"),
        ("machines", None, "refuses with 401: set PREFECT_API_AUTH_STRING"),
    ],
)
def test_deploy_refuses_settings_that_its_runs_could_not_work_with(
    project: Path, server: Prefect, monkeypatch: pytest.MonkeyPatch, pool: str, image: str | None, part: str
) -> None:
    receiver = Receiver()
    receiver.status = 401
    Thread(target=receiver.serve_forever, daemon=True).start()
    api = f"{receiver.url}/api" if pool == "machines" else server.url
    monkeypatch.setenv("PREFECT_API_URL", api)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    root = StateRoot(project / "mlruns").prepare()
    with temporary_settings({PREFECT_API_URL: api}), pytest.raises(GPTCoreError, match=re.escape(part)):
        deploy(PipelinesFile(project / "pipelines.yaml"), root, pool, image)
    receiver.shutdown()


@pytest.mark.deep
def test_a_process_worker_in_another_directory_retrains_and_then_skips_an_unchanged_pipeline(
    project: Path, server: Prefect, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_pipelines(
        project, night={"schedule": {"cron": "0 2 * * *"}, "triggers": [{"on": "corpus_changed"}], "tags": ["mine"]}
    )
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
        "RAY_USAGE_STATS_ENABLED",
    }
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "flows.py").write_text("raise RuntimeError('the wrong flows')")
    with worker(elsewhere, server) as killed:
        lost = server.start("night")
        wait_for(lambda: server.state(lost)["name"] == "Running", 240)
        killed.kill()  # only the worker: the run's process lives until nothing reads its output
        assert server.ended(lost)["name"] == "Crashed"
    with worker(elsewhere, server):
        first = server.start("night")
        assert server.verdict(first, 150) == "promoted", (elsewhere / "worker.log").read_text()
        second = server.start("night")
        assert server.verdict(second, 100) == "skipped", (elsewhere / "worker.log").read_text()
    shown = json.loads(gptflow(project, "show", "models:/gpt-night@champion", "--json").stdout)
    assert (shown["version"], shown["prefect_flow_run_id"]) == (1, first)
    assert sorted(path.name for path in elsewhere.iterdir() if path.name.startswith(("mlruns", "mlflow"))) == []


@pytest.mark.deep
def test_a_pipeline_removed_from_the_file_leaves_the_pool_and_serve_takes_over_the_deployments(
    project: Path, server: Prefect
) -> None:
    def deployed() -> list[str]:
        done = gptflow(project, "deploy", "--work-pool", "machines", PREFECT_API_URL=server.url)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[:-1]

    write_pipelines(project, one={}, two={})
    deployed()
    assert deployed() == [f"unchanged  {name}" for name in ("one", "two", "promote", "rollback", "prune")]
    write_pipelines(project, one={"schedule": {"interval": 3600}})
    lines = deployed()
    assert lines[0] == "changed    one" and lines[-1] == "removed    two"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.ask("deployments/name/retrain/two")
    with Serving(project, server) as lines:
        assert lines[0] == "changed    one"
        assert server.ask("deployments/name/retrain/one")["work_pool_name"] is None
        assert server.verdict(server.start("one")) == "promoted"
    assert deployed()[0] == "changed    one"


LONG = {"max_steps": 3000, "eval_every": 1000, "checkpoint_steps": 50}
"""A training of the tiny model that takes some seconds and saves many checkpoints."""


def deployed(project: Path, server: Prefect, **pipelines: dict[str, Any]) -> None:
    write_pipelines(project, **pipelines)
    done = gptflow(project, "deploy", "--work-pool", "machines", PREFECT_API_URL=server.url)
    assert done.returncode == 0, done.stderr


def saved(project: Path, pipeline: str) -> list[int]:
    """Return the steps of the existing checkpoints."""
    return sorted(int(path.name[5:]) for path in project.glob(f"mlruns/runs/{pipeline}/*/checkpoints/step-*"))


def took(directory: Path, run: str) -> bool:
    """Whether the worker of the directory runs the run. If two workers ask for it, Prefect refuses one of them."""
    log = (directory / "worker.log").read_text()
    return f"submitting flow run '{run}'" in log and f"Aborted submission of flow run '{run}'" not in log


@pytest.mark.deep
def test_two_hosts_take_turns_and_one_resumes_the_training_of_a_lost_one(
    project: Path, server: Prefect, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deployed(project, server, turns={})
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    with (
        worker(first, server, *another_host("first")) as one,
        worker(second, server, *another_host("second")) as two,
    ):
        lost = server.start("turns", train=LONG)
        wait_for(lambda: saved(project, "turns"), 240)
        (at_work,) = (directory for directory in (first, second) if took(directory, lost))
        machine = tree(one.pid if at_work == first else two.pid)
        for process in machine:
            if "gptcore.train" in process.cmdline():
                process.suspend()  # so that the training lasts until the rest is done
        meanwhile = server.start("turns", train=LONG)
        ended = server.ended(meanwhile)
        assert ended["message"].startswith("skipped: ") and "another run holds the lock" in ended["message"]
        other = second if at_work == first else first
        assert took(other, meanwhile), "each worker takes one run at a time"
        kill(machine)  # the machine is lost with all its processes
        assert living(machine) == []
        killed_at, before = 1000 * time.time(), saved(project, "turns")
        assert server.state(lost)["name"] == "Running", "no process is left to report to Prefect"
        assert server.verdict(server.start("turns", train=LONG), 300) == "promoted"
    ended = server.state(lost)
    assert ended["name"] == "Crashed" and "never released it" in ended["message"]
    (directory,) = (project / "mlruns" / "runs" / "turns").glob("*/")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert before and lines[-1]["step"] == LONG["max_steps"]
    assert lines[0]["time_ms"] < killed_at < lines[-1]["time_ms"], "the training was resumed, not restarted"
    shown = json.loads(gptflow(project, "models", "gpt-turns", "--json").stdout)
    assert [version["version"] for version in shown] == [1]


@pytest.mark.deep
def test_an_evicted_run_saves_waits_for_a_retry_and_can_be_cancelled(project: Path, server: Prefect) -> None:
    """Evict a run as Kubernetes does: SIGTERM to our job's command, with its environment and its own process ids."""
    deployed(project, server, evicted={})
    run = server.start("evicted", train={**LONG, "max_steps": 1_000_000, "checkpoint_steps": None})

    def execute() -> subprocess.Popen[bytes]:
        command = [*another_host("pod"), sys.executable, "-m", "prefect", "flow-run", "execute"]
        environment = clean(
            PREFECT_API_URL=server.url,
            PREFECT_HOME=str(project / "home"),
            PREFECT__FLOW_RUN_ID=run,
            PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="reschedule",
            GPTFLOW_HOME=str(project / "mlruns"),
        )
        with (project / "pod.log").open("ab") as log:
            return subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)

    pod = execute()
    metrics = project / "mlruns" / "runs" / "evicted"
    wait_for(lambda: any(path.stat().st_size for path in metrics.glob("*/metrics.jsonl")), 240)
    everything = tree(pod.pid)
    everything[1].terminate()
    pod.wait(45)
    assert living(everything) == []
    assert len(saved(project, "evicted")) == 1, (project / "pod.log").read_text()
    assert server.state(run)["name"] == "AwaitingRetry"
    before = saved(project, "evicted")
    pod = execute()
    wait_for(lambda: server.state(run)["type"] == "RUNNING", 240)
    server.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    pod.wait(90)
    assert server.state(run)["type"] == "CANCELLED", (project / "pod.log").read_text()
    assert len(list(metrics.glob("*/"))) == 1 and max(saved(project, "evicted")) >= max(before)

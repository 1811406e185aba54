"""The key task_runner: its values, and that Dask and Ray make the same bytes even if a worker is killed."""

import importlib.util
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.config.pipelines import Pipeline, PipelinesFile
from flows.registry.lineage import settings_key
from flows.retrain import task_runners, tasks
from flows.retrain.clusters import Cluster, ClusterUnreachable
from gptcore.config import CorpusConfig
from gptcore.corpus import ingest
from gptcore.errors import ConfigError
from gptcore.tokens import files
from tests.corpus.fatal import Fatal, die
from tests.corpus.test_shards import files_of, small_shards, write_texts
from tests.tiny import write_pipelines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "given", ["processes", "dask", "ray", "tcp://10.0.0.1:8786", "tls://scheduler.example:8786", "ray://[::1]:10001"]
)
def test_a_task_runner_is_a_name_or_an_address_as_the_engine_prints_it(project: Path, given: str) -> None:
    assert PipelinesFile(project / "pipelines.yaml").pipeline("tiny", [f"task_runner={given}"]).task_runner == given


@pytest.mark.parametrize(
    "given", ["threads", "tcp://10.0.0.1", "http://10.0.0.1:8786", "ray://h:10001/x", "tcp://h:x", 7, "dask://h:1"]
)
def test_any_other_task_runner_is_refused_with_its_line_and_the_valid_values(project: Path, given: Any) -> None:
    write_pipelines(project, tiny={"task_runner": given})
    with pytest.raises(ConfigError, match=r"pipelines\.yaml:\d+: pipelines\.tiny\.task_runner: ") as refused:
        PipelinesFile(project / "pipelines.yaml").pipeline("tiny")
    assert isinstance(given, int) or refused.match(r"processes, dask, ray, .* tcp://HOST:8786 .* ray://HOST:10001")


def test_an_address_with_credentials_is_refused_without_printing_them(project: Path) -> None:
    with pytest.raises(ConfigError, match="an address must not hold credentials") as refused:
        PipelinesFile(project / "pipelines.yaml").pipeline("tiny", ["task_runner=tcp://me:s3cret@h:8786"])
    assert "s3cret" not in str(refused.value)


def test_the_task_runner_is_not_part_of_the_settings_key(tiny: Pipeline) -> None:
    assert settings_key(tiny.model_copy(update={"task_runner": "ray"})) == settings_key(tiny)


@pytest.mark.parametrize("given", ["dask", "tcp://127.0.0.1:1", "ray", "ray://127.0.0.1:1"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    task_runners.check(given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gptflow\[(dask|ray)\]'"), task_runners.open_task_runner(given):
        pass


@pytest.mark.deep
def test_an_unreachable_scheduler_is_an_error_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with (
        task_runners.open_task_runner(address) as map_shards,
        pytest.raises(ClusterUnreachable, match=f"nothing answers at {address}: .*refused"),
    ):
        map_shards("ingest", "read", die, [Fatal(Path(), 1, 0)])


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A Dask scheduler and two workers of one thread, each in its own process."""
    log = (tmp_path / "dask.log").open("w")
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        options = {"cwd": ROOT, "stderr": log, "start_new_session": True}
        started.append(subprocess.Popen([sys.executable, "-m", "dask", *command, "--no-dashboard"], **options))

    place = ["--host", "127.0.0.1"]
    scheduler = tmp_path / "scheduler.json"
    start("scheduler", *place, "--port", "0", "--scheduler-file", str(scheduler))
    while not (scheduler.exists() and scheduler.read_text().rstrip().endswith("}")):
        assert started[0].poll() is None, (tmp_path / "dask.log").read_text()
        time.sleep(0.1)
    address = json.loads(scheduler.read_text())["address"]
    for number in range(2):
        start("worker", address, *place, "--nthreads", "1", "--local-directory", str(tmp_path / f"worker{number}"))
    yield address
    for process in started:
        process.terminate()
    for process in started:
        process.wait(20)
    log.close()


def run_in_flow(task_runner: str, cfg: CorpusConfig, directory: Path) -> tuple[dict[str, bytes], list[str]]:
    """Make a snapshot and its tokens in a flow run; return their files and the names of the tasks."""

    @flow(persist_result=False)
    def work() -> Any:
        with task_runners.open_task_runner(task_runner) as map_shards:
            if task_runner != "dask":  # its workers take long to restart; those of a scheduler are the same
                shards = [Fatal(directory, number, number == 1) for number in range(4)]
                assert map_shards("ingest", "read", die, shards) == [0, 1, 2, 3]
            made = tasks.ingest(cfg, directory / "corpora", directory.parent, map_shards)
            encoded = tasks.tokenize(made.path, "gpt2", directory / "tokens", map_shards=map_shards)
        return made.path, encoded.path

    directory.mkdir()
    state = work(return_state=True)
    made, encoded = state.result()
    with get_client(sync_client=True) as client:
        run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        names = [task.name for task in client.read_task_runs(flow_run_filter=run)]
    return {**files_of(made), **{f"tokens/{name}": data for name, data in files_of(encoded).items()}}, names


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("task_runner", ["scheduler", "dask", "ray"])
@pytest.mark.deep
def test_dask_and_ray_make_the_same_bytes_and_a_killed_worker_costs_only_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, task_runner: str
) -> None:
    if task_runner == "scheduler":
        task_runner = request.getfixturevalue("scheduler")
    write_texts(tmp_path / "texts")
    cfg = CorpusConfig(sources=("texts",), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2)
    alone = ingest.ingest(cfg, tmp_path / "alone" / "corpora", tmp_path).path
    encoded = files.tokenize(alone, "gpt2", tmp_path / "alone" / "tokens").path
    expected = {**files_of(alone), **{f"tokens/{name}": data for name, data in files_of(encoded).items()}}
    small_shards(monkeypatch, 100_000)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    directory = tmp_path / "directory"
    made, names = run_in_flow(task_runner, cfg, directory)
    assert made == expected
    assert (directory / "1-0").exists() == (task_runner != "dask"), "a worker was killed"
    for begin in ("ingest: read", "ingest: decontaminated", "tokenize: encoded"):
        assert sum(name.startswith(begin) for name in names) >= 2, names
    assert not (home / ".ray").exists(), "Ray leaves no token in the home directory"


def test_a_started_cluster_is_pickled_as_its_address_alone() -> None:
    cluster = Cluster("dask", "tcp://127.0.0.1:8786")
    cluster._runner = threading.Lock()  # type: ignore[assignment]  # like a started task runner, it cannot be pickled
    copy = pickle.loads(pickle.dumps(cluster))
    assert (copy._engine, copy._address, copy._runner) == ("dask", "tcp://127.0.0.1:8786", None)

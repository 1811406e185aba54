"""`gptflow run` killed while it creates its databases, in a state root whose path has characters of URLs."""

import signal
from pathlib import Path

import psutil
import pytest

from flows.state.databases import Condition, mlflow_database, prefect_database
from tests.servers import begin, wait_for
from tests.state.test_databases import ODD
from tests.tiny import write_pipelines, write_project

KILLS = ((signal.SIGKILL, 1), (signal.SIGTERM, 300_000), (signal.SIGINT, 1_000_000))
"""The signals, and how many bytes of Prefect's database exist when they are sent."""


@pytest.mark.slow
def test_runs_killed_while_they_create_the_databases_leave_a_state_root_in_which_four_runs_at_once_succeed(
    tmp_path: Path,
) -> None:
    home = tmp_path / "state" / ODD
    home.mkdir(parents=True)
    project = tmp_path / "project"
    project.mkdir()
    names = ("one", "two", "three", "four")
    write_pipelines(write_project(project), **{name: {} for name in names})

    def wait_for_bytes(size: int) -> None:
        wait_for(lambda: sum(path.stat().st_size for path in home.rglob("*prefect.db*")) >= size, 240)

    for number, (sent, size) in enumerate(KILLS):
        log = project / f"killed-{number}.log"
        process = begin(project, log, "run", "one", GPTFLOW_HOME=str(home))
        wait_for_bytes(size)
        assert process.poll() is None, log.read_text()
        processes = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        process.wait(60)
        _, alive = psutil.wait_procs(processes, 60)
        assert not alive, "the temporary server ends with its run"
        assert "Traceback" not in log.read_text()
    runs = {name: begin(project, project / f"{name}.log", "run", name, GPTFLOW_HOME=str(home)) for name in names}
    for name, process in runs.items():
        code = process.wait(240)
        assert code == 0, (project / f"{name}.log").read_text()
    assert mlflow_database(home).check() is Condition.WHOLE
    assert prefect_database(home / "prefect" / "ephemeral").check() is Condition.WHOLE
    assert [path.name for path in (tmp_path / "state").iterdir()] == [ODD], "nothing was created beside the state root"

"""`gptflow run` and `gptflow up` killed while they create their databases, in a path with characters of URLs."""

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from flows.state.databases import Condition, mlflow_database, prefect_database
from tests.servers import begin, free_ports, wait_for
from tests.state.test_databases import ODD
from tests.tiny import write_pipelines, write_project

KILLS = (("run", signal.SIGKILL, 1), ("up", signal.SIGKILL, 300_000), ("run", signal.SIGINT, 1_000_000))
"""The commands, the signals, and how many bytes of Prefect's database exist when they are sent."""


@pytest.mark.slow
def test_commands_killed_while_they_create_the_databases_leave_a_state_root_in_which_four_runs_at_once_succeed(
    tmp_path: Path,
) -> None:
    home = tmp_path / "state" / ODD
    home.mkdir(parents=True)
    project = tmp_path / "project"
    project.mkdir()
    names = ("one", "two", "three", "four")
    write_pipelines(write_project(project), **{name: {} for name in names})

    def wait_for_bytes(directory: Path, size: int) -> None:
        wait_for(lambda: sum(path.stat().st_size for path in directory.glob("*prefect.db*")) >= size, 240)

    ports = map(str, free_ports(2))
    commands = {"run": ["run", "one"], "up": ["up", "--prefect-port", next(ports), "--mlflow-port", next(ports)]}
    homes = {"run": home / "prefect" / "ephemeral", "up": home / "prefect"}
    for number, (command, sent, size) in enumerate(KILLS):
        log = project / f"killed-{number}.log"
        process = begin(project, log, *commands[command], cold=True, GPTFLOW_HOME=str(home))
        wait_for_bytes(homes[command], size)
        assert process.poll() is None, log.read_text()
        processes = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        process.wait(60)
        _, alive = psutil.wait_procs(processes, 60)
        assert not alive, "the temporary server ends with its run, the programs of `up` when a database is complete"
        assert "Traceback" not in log.read_text()
    runs = {name: begin(project, project / f"{name}.log", "run", name, GPTFLOW_HOME=str(home)) for name in names}
    for name, process in runs.items():
        code = process.wait(240)
        assert code == 0, (project / f"{name}.log").read_text()
    assert mlflow_database(home).check() is Condition.WHOLE
    assert all(prefect_database(directory).check() is Condition.WHOLE for directory in homes.values())
    with closing(sqlite3.connect(homes["run"] / "prefect.db")) as database:
        completed = "select name from flow_run where state_type = 'COMPLETED'"
        found = {name.split(" ")[0] for (name,) in database.execute(completed)}
        assert found == set(names), "every server used this database, also its maker"
    assert [path.name for path in (tmp_path / "state").iterdir()] == [ODD], "nothing was created beside the state root"

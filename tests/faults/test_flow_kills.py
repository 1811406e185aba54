"""Whole retrainings that are killed or stopped several times, compared with an undisturbed twin.

Each start of `gptflow run` resumes where the last one died, and dies at a later point. The first kills fall into
training, and each kills more processes than the one before. The others fall before the version is registered, before
it is judged, and while its report is written.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from flows.registry import versions
from flows.registry.loading import load
from flows.state import locks
from flows.state.root import StateRoot
from gptcore.training.run_directory import RunDirectory
from tests import databases
from tests.servers import Prefect, Process, Serving, begin, living, wait_for
from tests.tiny import write_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 900
LOGGED = ("loss", "train_loss", "val_loss", "learning_rate", "grad_norm", "epoch", "tokens_seen")
HOOK = """
import importlib.abc, importlib.util, os, signal, sys

module, _, function = os.environ.get("DIE_BEFORE", "").partition(":")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(made):
            execute(made)
            setattr(made, function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        spec.loader.exec_module = exec_module
        return spec

if module:
    sys.meta_path.insert(0, Finder())
"""
"""The text of sitecustomize.py: a process kills itself when it is about to call the function in DIE_BEFORE."""


class Project:
    """A directory with the pipeline `tiny`, which trains for some seconds, and the runs started in it."""

    def __init__(self, directory: Path, server: Prefect, migrated: Path) -> None:
        directory.mkdir()
        # No checkpoint falls on the end of an epoch or of the training.
        train = {"max_steps": STEPS, "accumulation": 2, "checkpoint_steps": 70, "eval_every": 100}
        self.directory, self.server = write_project(directory, model={"drop_rate": 0.1}, train=train), server
        self.root = StateRoot(directory / "mlruns")
        databases.give(self.root.path, migrated)
        (directory / "hook").mkdir()
        (directory / "hook" / "sitecustomize.py").write_text(HOOK)
        self.starts = 0

    def start(self, own_server: bool = False, cold: bool = False, **environment: str) -> Process:
        self.starts += 1
        log = self.directory / f"run-{self.starts}.log"
        there = {} if own_server else {"PREFECT_API_URL": self.server.url}
        hook = str(self.directory / "hook")
        return begin(self.directory, log, "run", "tiny", cold=cold, PYTHONPATH=hook, **there, **environment)

    def finish(self, process: Process) -> str:
        """Wait for the run, check that it succeeded, and return its output."""
        said = self.directory / f"run-{self.starts}.log"
        assert process.wait(240) == 0, said.read_text()
        return said.read_text()

    def run_directory(self) -> RunDirectory:
        (only,) = (self.root.path / "runs" / "tiny").glob("*-1/")
        return RunDirectory(only)

    def updates(self) -> int:
        found = list(self.root.path.glob("runs/tiny/*/metrics.jsonl"))
        return found[0].read_bytes().count(b"\n") if found else 0

    def saved(self) -> int:
        """Return the update of the newest checkpoint."""
        return max(int(path.name.removeprefix("step-")) for path in self.run_directory().checkpoints.glob("step-*"))

    def mlflow_statuses(self) -> list[str]:
        client = MlflowClient(self.root.tracking_uri)
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return [run.info.status for run in found]

    def trainer(self, process: Process) -> psutil.Process:
        children = psutil.Process(process.pid).children(recursive=True)
        (found,) = (child for child in children if "gptcore.train" in child.cmdline())
        return found

    def champion(self) -> str | None:
        """Load the champion and return its version, or None if there is no champion."""
        found = versions.find_champion(self.root, "gpt-tiny") if (self.root.path / "mlflow.db").exists() else None
        if found is not None:
            load(self.root, found)
        return None if found is None else str(found.version)

    def facts(self) -> dict[str, Any]:
        """Return the facts that a killed run must share with an undisturbed run."""
        client = MlflowClient(self.root.tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments)
        (version,) = versions.list_versions(self.root, "gpt-tiny")
        histories = [(run, key, client.get_metric_history(run.info.run_id, key)) for run in runs for key in LOGGED]
        measured = ("time_ms", "seconds", "tokens_per_second", "memory_mb")
        return {
            "weights": (version.tags["weights_sha256"], version.tags["verdict"], self.champion()),
            "metrics": [{k: v for k, v in line.items() if k not in measured} for line in self.lines()],
            "runs": [run.info.status for run in runs],
            "points": {key: sorted(metric.step for metric in history) for _, key, history in histories},
            "artifacts": sorted(one.path for run in runs for one in client.list_artifacts(run.info.run_id)),
            "models": [str(one.status) for one in client.search_logged_models(experiments)],
        }

    def lines(self) -> list[dict[str, Any]]:
        return self.run_directory().read_metrics()


@pytest.fixture(autouse=True)
def no_other_root(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def killed_in_training(project: Project, kill: str, after: int) -> str:
    """Start a run and kill the flow, the flow and its trainer, or the whole process tree; return the point."""
    process = project.start(own_server=kill == "whole tree", cold=True)
    wait_for(lambda: project.updates() >= after or process.poll() is not None, 240)
    trainer = project.trainer(process)
    tree = psutil.Process(process.pid).children(recursive=True)
    doomed = {"flow": [], "trainer and flow": [trainer], "whole tree": tree}[kill]
    assert len(tree) > 1 or kill != "whole tree", "the tree has the trainer and Prefect's temporary server"
    for one in [*doomed, psutil.Process(process.pid)]:
        one.kill()
    process.wait(30)
    if kill == "flow":
        wait_for(lambda: not living([trainer]), 240)
        assert project.saved() == project.updates(), "the trainer saves and stops"
    assert living([trainer, *doomed]) == [] and project.run_directory().read_result() is None
    return f"{kill} at update {project.updates()}"


def killed_before(project: Project, function: str) -> str:
    process = project.start(cold=True, DIE_BEFORE=function)
    assert process.wait(240) == -signal.SIGKILL
    return f"flow before {function}"


@pytest.fixture(scope="module")
def twin(
    server: Prefect, migrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that returns the facts of an undisturbed run. The run starts first; the function waits for its end."""
    project = Project(tmp_path_factory.mktemp("twin") / "project", server, migrated)
    process = project.start()

    def facts() -> dict[str, Any]:
        project.finish(process)
        expected = project.facts()
        assert expected["runs"] == ["FINISHED"] and expected["points"]["loss"] == list(range(1, STEPS + 1))
        return expected

    yield facts
    process.kill()
    process.wait()


def runs(server: Prefect, state: str) -> set[str]:
    """Return the ids of the runs that have this state in Prefect."""
    return {
        run["id"]
        for run in server.runs()
        if run["parameters"].get("pipeline") == "tiny" and run["state"]["type"] == state
    }


def test_a_retraining_killed_twice_ends_like_its_twin(
    server: Prefect, twin: Callable[[], dict[str, Any]], migrated: Path, tmp_path: Path
) -> None:
    project, crashed = Project(tmp_path / "killed", server, migrated), runs(server, "CRASHED")
    killed_in_training(project, "trainer and flow", 300)
    assert project.champion() is None
    killed_before(project, "flows.registry.gate:judge")
    assert project.champion() is None and len(versions.list_versions(project.root, "gpt-tiny")) == 1
    assert "models:/gpt-tiny/1" in project.finish(project.start())
    assert project.facts() == twin()
    assert len(runs(server, "CRASHED") - crashed) == 2, "each killed run is ended by the next run"
    assert runs(server, "RUNNING") == set()


@pytest.mark.deep
def test_a_retraining_killed_six_times_ends_like_its_twin(
    server: Prefect, twin: Callable[[], dict[str, Any]], migrated: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path / "killed", server, migrated)
    fell = [
        killed_in_training(project, "flow", 100),
        killed_in_training(project, "trainer and flow", 300),
        killed_in_training(project, "whole tree", 500),
    ]
    assert project.champion() is None
    fell.append(killed_before(project, "flows.registry.register:register"))
    trained = project.run_directory().final.stat()
    assert project.champion() is None and project.updates() == STEPS
    fell.append(killed_before(project, "flows.registry.gate:judge"))
    assert project.champion() is None and len(versions.list_versions(project.root, "gpt-tiny")) == 1
    fell.append(killed_before(project, "flows.tracking.runs:log_results"))
    assert project.champion() == "1"
    assert "models:/gpt-tiny/1" in project.finish(project.start())
    print(f"\n6 kills of whole runs: {'; '.join(fell)}")
    assert project.facts() == twin()
    assert project.run_directory().final.stat().st_ino == trained.st_ino, "the finished training is not repeated"
    assert "nothing changed" in project.finish(project.start())
    assert len(runs(server, "CRASHED")) == 4, "each killed run is ended by the next run"
    assert len(runs(server, "RUNNING")) == 1, "except the run whose next run was on another server"


def test_a_retraining_that_is_cancelled_and_then_terminated_saves_each_time_and_ends_like_its_twin(
    server: Prefect, twin: Callable[[], dict[str, Any]], migrated: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path / "stopped", server, migrated)
    with Serving(project.directory, server):
        served = server.start("tiny")
        wait_for(lambda: project.updates() >= 100, 240)
        server.ask(f"flow_runs/{served}/set_state", {"state": {"type": "CANCELLING"}})
        assert server.ended(served)["type"] == "CANCELLED"
        wait_for(lambda: locks.find_holder(project.root.lock_path("tiny")) is None, 30)
    assert project.saved() == project.updates() < STEPS and project.mlflow_statuses() == ["KILLED"]
    process, before = project.start(cold=True), runs(server, "CANCELLED")
    wait_for(lambda: project.updates() >= 400 or process.poll() is not None, 240)
    trainer = project.trainer(process)
    process.terminate()
    assert process.wait(30) != 0 and not living([trainer])
    assert 400 <= project.saved() == project.updates() < STEPS and project.mlflow_statuses() == ["KILLED"]
    (terminated,) = runs(server, "CANCELLED") - before
    assert server.state(terminated)["message"] == f"stopped, saved at step {project.saved():,}; the next run resumes"
    project.finish(project.start())
    assert project.facts() == twin()

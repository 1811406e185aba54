"""Whole retrainings killed or stopped, one time after the other, against a twin that is left in peace.

Each start of `gptflow run` goes on where the last one died, and dies further on: three times in training, with less and
less left alive, and then before the version is registered, before it is judged, and while its report is written.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from flows import lock
from flows.releases import registry
from flows.releases.loading import load
from flows.state import StateRoot
from gptcore.learning.rundir import RunDirectory
from tests import databases
from tests.fixtures import write_project
from tests.flows.servers import Prefect, Process, Serving, begin, living, wait_for

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
"""As sitecustomize.py: a process of which DIE_BEFORE names a function kills itself where it would call that."""


class Project:
    """A directory with the pipeline `tiny`, which trains for some seconds, and the `gptflow run` in it."""

    def __init__(self, directory: Path, server: Prefect, migrated: Path) -> None:
        directory.mkdir()
        self.directory, self.server = write_project(directory), server
        self.root = StateRoot(directory / "mlruns")
        databases.give(self.root.path, migrated)
        path = directory / "pipelines.yaml"
        settings = yaml.safe_load(path.read_text())
        tiny = settings["pipelines"]["tiny"]
        tiny["model"]["drop_rate"] = 0.1
        # No checkpoint falls on the end of an epoch or of the training.
        tiny["train"] |= {"max_steps": STEPS, "accumulation": 2, "checkpoint_steps": 70, "eval_every": 100}
        path.write_text(yaml.safe_dump(settings))
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
        """What the run says in the end, which must be a good one."""
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
        """The update of the newest checkpoint."""
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
        """Its version, once it has been loaded."""
        found = registry.champion_of(self.root, "gpt-tiny") if (self.root.path / "mlflow.db").exists() else None
        if found is not None:
            load(self.root, found)
        return None if found is None else str(found.version)

    def facts(self) -> dict[str, Any]:
        """What a run that was killed must have in common with one that was not."""
        client = MlflowClient(self.root.tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments)
        (version,) = registry.versions(self.root, "gpt-tiny")
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
    """Starts a run, and kills the flow alone, or the trainer as well, or all it has started; returns where."""
    process = project.start(own_server=kill == "whole tree", cold=True)
    wait_for(lambda: project.updates() >= after or process.poll() is not None, 120)
    trainer = project.trainer(process)
    tree = psutil.Process(process.pid).children(recursive=True)
    doomed = {"flow": [], "trainer and flow": [trainer], "whole tree": tree}[kill]
    assert len(tree) > 1 or kill != "whole tree", "the trainer and Prefect's temporary server"
    for one in [*doomed, psutil.Process(process.pid)]:
        one.kill()
    process.wait(30)
    if kill == "flow":
        wait_for(lambda: not living([trainer]), 60)
        assert project.saved() == project.updates(), "the trainer saves, and stops"
    assert living([trainer, *doomed]) == [] and project.run_directory().result() is None
    return f"{kill} at update {project.updates()}"


def killed_before(project: Project, function: str) -> str:
    process = project.start(cold=True, DIE_BEFORE=function)
    assert process.wait(240) == -signal.SIGKILL
    return f"flow before {function}"


@pytest.fixture(scope="module")
def twin(
    server: Prefect, migrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], dict[str, Any]]]:
    """The facts of a run that is left in peace. It begins before the others, and is waited for when it is asked."""
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
    """Ids of the runs that Prefect calls so."""
    return {run["id"] for run in server.runs() if run["name"] == "tiny" and run["state"]["type"] == state}


# FAULTS 1, 3 and 4
def test_a_retraining_killed_six_times_ends_as_its_twin_that_was_never_killed(
    server: Prefect, twin: Callable[[], dict[str, Any]], migrated: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path / "killed", server, migrated)
    fell = [
        killed_in_training(project, "flow", 100),
        killed_in_training(project, "trainer and flow", 300),
        killed_in_training(project, "whole tree", 500),
    ]
    assert project.champion() is None
    fell.append(killed_before(project, "flows.releases.release:register"))
    trained = project.run_directory().final.stat()
    assert project.champion() is None and project.updates() == STEPS
    fell.append(killed_before(project, "flows.releases.gate:judge"))
    assert project.champion() is None and len(registry.versions(project.root, "gpt-tiny")) == 1
    fell.append(killed_before(project, "flows.tracking:log_results"))
    assert project.champion() == "1"
    assert "models:/gpt-tiny/1" in project.finish(project.start())
    print(f"\n6 kills of whole runs: {'; '.join(fell)}")
    assert project.facts() == twin()
    assert project.run_directory().final.stat().st_ino == trained.st_ino, "what was trained is not trained again"
    assert "nothing changed" in project.finish(project.start())
    assert len(runs(server, "CRASHED")) == 4, "what was killed was ended by the next one"
    assert len(runs(server, "RUNNING")) == 1, "but for the one whose next one was on another server"


# FAULTS 5
def test_a_retraining_that_is_cancelled_and_then_terminated_saves_each_time_and_ends_as_its_twin(
    server: Prefect, twin: Callable[[], dict[str, Any]], migrated: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path / "stopped", server, migrated)
    with Serving(project.directory, server):
        served = server.start("tiny")
        wait_for(lambda: project.updates() >= 100, 120)
        server.ask(f"flow_runs/{served}/set_state", {"state": {"type": "CANCELLING"}})
        assert server.ended(served)["type"] == "CANCELLED"
        wait_for(lambda: lock.holder(project.root.lock("tiny")) is None, 30)
    assert project.saved() == project.updates() < STEPS and project.mlflow_statuses() == ["KILLED"]
    process, before = project.start(cold=True), runs(server, "CRASHED")
    wait_for(lambda: project.updates() >= 400 or process.poll() is not None, 120)
    trainer = project.trainer(process)
    process.terminate()
    assert process.wait(30) != 0 and not living([trainer])
    assert 400 <= project.saved() == project.updates() < STEPS and project.mlflow_statuses() == ["KILLED"]
    (terminated,) = runs(server, "CRASHED") - before
    assert terminated != served
    project.finish(project.start())
    assert project.facts() == twin()

"""This release uses what an earlier one left: its state root, an unfinished training, a version, deployments.

The earlier release is a commit of this repository. Each run of this test lets it write everything again.
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from flows.registry import versions
from flows.state.root import StateRoot
from gptcore.training.run_directory import RunDirectory
from tests import databases
from tests.servers import Prefect, begin, clean, gptflow, wait_for
from tests.tiny import write_pipelines, write_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EARLIER = "a424947"
REPOSITORY = Path(__file__).parents[2]
STEPS = 500


@dataclass
class Earlier:
    """The project that the earlier release wrote."""

    project: Path
    server: Prefect
    twin: dict[str, str]
    """Tags of the version that the same training makes without an interruption."""
    saved: int
    """The step of the newest checkpoint of the interrupted training."""

    @property
    def root(self) -> StateRoot:
        return StateRoot(self.project / "mlruns")

    def gptflow(self, *arguments: str, code: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run the command line in the project: this release's, or that of the code in a directory."""
        other = {} if code is None else {"cold": True, "PYTHONPATH": str(code)}
        return gptflow(self.project, *arguments, PREFECT_API_URL=self.server.url, **other)

    def long_run(self) -> RunDirectory:
        (path,) = (self.root.path / "runs" / "long").glob("*-1/")
        return RunDirectory(path)


def has_history() -> bool:
    """Whether git has the commit of the earlier release. A source archive and a shallow clone do not have it."""
    command = ["git", "-C", str(REPOSITORY), "cat-file", "-e", f"{EARLIER}^{{commit}}"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with gptcore and flows of the earlier release."""
    if not has_history():
        pytest.skip("the earlier release is taken from git's history, which is not here")
    directory = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", EARLIER, "gptcore", "flows"], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive, check=True)
    return directory


@pytest.fixture(scope="module")
def later_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with this release's gptcore and flows, plus a key in `train` that the next release might add."""
    directory = tmp_path_factory.mktemp("later")
    for package in ("gptcore", "flows"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    config = directory / "gptcore" / "config.py"
    text = config.read_text()
    first_field = re.search(r"class TrainConfig\(Section\):\n(?:.*\n)*?(?=    \w+: )", text)
    assert first_field is not None
    at = first_field.end()
    text = f"{text[:at]}    newer_key: Annotated[int, Added(before=0)] = 0\n    {text[at:].lstrip()}"
    imports = "from typing import Annotated\nfrom gptcore.sections import Added\n"
    config.write_text(text.replace("from gptcore.sections import", f"{imports}from gptcore.sections import", 1))
    return directory


@pytest.fixture(scope="module")
def earlier(
    old_code: Path, server: Prefect, migrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Earlier]:
    """A version, deployments and an interrupted training, all made by the earlier release."""
    project = write_project(tmp_path_factory.mktemp("upgrade"))
    databases.give(project / "mlruns", migrated)
    train = {"max_steps": STEPS, "accumulation": 2, "checkpoint_steps": 70, "eval_every": 100}
    write_pipelines(project, tiny={}, long={"train": train, "model": {"drop_rate": 0.1}})
    old = {"cold": True, "PYTHONPATH": str(old_code)}

    done = gptflow(project, "run", "tiny", PREFECT_API_URL=server.url, **old)
    assert done.returncode == 0, done.stdout + done.stderr
    other = tmp_path_factory.mktemp("twin") / "project"
    shutil.copytree(project, other)
    done = gptflow(other, "run", "long", PREFECT_API_URL=server.url, **old)
    assert done.returncode == 0, done.stdout + done.stderr
    twin = StateRoot(other / "mlruns")
    tags = dict(versions.resolve(twin, "models:/gpt-long/1").tags)

    log = project / "serve.log"
    serving = begin(project, log, "serve", PREFECT_API_URL=server.url, **old)
    wait_for(lambda: serving.poll() is not None or "\nserving " in log.read_text(), 240)
    serving.terminate()
    try:
        serving.wait(90)
    except subprocess.TimeoutExpired:  # how the earlier release stops is not tested here
        serving.kill()
        serving.wait(20)

    log = project / "run.log"
    process = begin(project, log, "run", "long", PREFECT_API_URL=server.url, **old)
    made = Earlier(project, server, tags, 0)
    wait_for(lambda: process.poll() is not None or saved_step(made) >= 140, 240)
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        one.send_signal(signal.SIGKILL)
    process.wait(20)
    made.saved = saved_step(made)
    assert 140 <= made.saved < STEPS, log.read_text()
    yield made


def saved_step(earlier: Earlier) -> int:
    """Return the step of the newest checkpoint of the training `long`, or 0 if it has no checkpoint."""
    return max((int(path.name[5:]) for path in earlier.root.path.glob("runs/long/*/checkpoints/step-*")), default=0)


def python(program: str, **environment: str) -> str:
    """Run a program in a new interpreter and return its output."""
    done = subprocess.run([sys.executable, "-c", program], env=clean(**environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_earlier_release_wrote_the_version_of_these_tests(earlier: Earlier, old_code: Path) -> None:
    from flows.registry.lineage import source_sha256

    lineage = versions.read_lineage(earlier.root, versions.resolve(earlier.root, "models:/gpt-tiny/1"))
    assert lineage["gptcore_sha256"] == source_sha256(old_code / "gptcore") != source_sha256(REPOSITORY / "gptcore")


def test_an_unchanged_pipeline_is_skipped_even_after_a_release_that_adds_a_key(
    earlier: Earlier, later_code: Path
) -> None:
    for code in (None, later_code):
        done = earlier.gptflow("run", "tiny", code=code)
        assert done.returncode == 0 and "skipped" in done.stdout, done.stdout + done.stderr
    assert len(versions.list_versions(earlier.root, "gpt-tiny")) == 1


def test_an_interrupted_training_resumes_after_a_new_key_and_equals_an_uninterrupted_one(
    earlier: Earlier, later_code: Path
) -> None:
    lines = earlier.long_run().metrics.read_text().splitlines()
    done = earlier.gptflow("run", "long", code=later_code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resume   unfinished training {earlier.long_run().path.name}\n" in done.stdout
    (version,) = versions.list_versions(earlier.root, "gpt-long")
    assert version.tags["weights_sha256"] == earlier.twin["weights_sha256"]
    assert version.tags["run_key"] == earlier.twin["run_key"]
    kept = [line for line in lines if f'"step": {earlier.saved},' in line]
    assert kept and kept[0] in earlier.long_run().metrics.read_text(), (
        "the steps before the kill were not trained again"
    )


def test_mlflow_loads_a_version_even_if_a_newer_gptcore_is_imported(earlier: Earlier) -> None:
    program = (
        "{}import mlflow\nmodel = mlflow.pyfunc.load_model('models:/gpt-tiny/1')\n"
        "print(model.predict(['The model'], params={{'max_new_tokens': 8, 'temperature': 0.0}})[0])"
    )
    given = {"MLFLOW_TRACKING_URI": earlier.root.tracking_uri}
    alone = python(program.format(""), **given)
    newer = "import flows, gptcore.generation.generate, gptcore.bundle\nloaded = flows.load('models:/gpt-tiny/1')\n"
    beside = python(program.format(newer), GPTFLOW_HOME=str(earlier.root.path), **given)
    assert alone == beside and alone.strip()


def test_a_version_is_promoted(earlier: Earlier) -> None:
    done = earlier.gptflow("promote", "gpt-tiny", "1", "--reason", "it was good")
    assert done.returncode == 0, done.stdout + done.stderr
    champion = versions.find_champion(earlier.root, "gpt-tiny")
    assert champion is not None and str(champion.version) == "1"


def test_a_version_is_reproduced_although_the_code_was_moved(earlier: Earlier) -> None:
    done = earlier.gptflow("reproduce", "models:/gpt-tiny/1")
    assert done.returncode == 0 and "equal, bit for bit" in done.stdout, done.stdout + done.stderr
    assert "source of gptcore" in done.stdout, "the changed source is reported"


def test_every_stored_entry_point_is_a_flow(earlier: Earlier) -> None:
    stored = {one["name"]: one["entrypoint"] for one in earlier.server.ask("deployments/filter", {})}
    assert {"tiny", "long", "promote", "rollback", "prune"} <= stored.keys()
    loaded, *names = python(
        "import sys, flows.retrain.policy, flows.retrain; print('flows.retrain.flow' in sys.modules)\n"
        "from prefect.flows import load_flow_from_entrypoint\n"
        f"for entry in {sorted({*stored.values(), 'flows.watch.watch'})}: print(load_flow_from_entrypoint(entry).name)"
    ).split()
    assert sorted(names) == ["promote", "prune", "retrain", "rollback", "watch"]
    assert loaded == "False"


def test_a_run_of_a_deployment_that_the_earlier_release_registered_completes(earlier: Earlier) -> None:
    run = earlier.server.start("tiny")
    environment = {"PREFECT__FLOW_RUN_ID": run, "PREFECT_API_URL": earlier.server.url}
    subprocess.run(
        [sys.executable, "-m", "prefect.engine"],
        cwd=earlier.project,
        env=clean(GPTFLOW_HOME=str(earlier.root.path), **environment),
        check=True,
    )
    assert earlier.server.state(run)["type"] == "COMPLETED"

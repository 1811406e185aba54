"""The state root read-only, missing, or with directories that somebody deletes: a clear error, or all made again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.pipelines import SECTIONS, Pipeline
from flows.releases import registry
from flows.releases.loading import load
from flows.retrain import retrain
from flows.state import StateRoot
from gptcore.errors import GPTCoreError
from gptcore.learning.rundir import Metrics, MetricsReader, RunDirectory
from tests.flows.servers import gptflow


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be written in the directory while this lasts. Root is stopped by a mount alone."""
    if os.geteuid() != 0:
        directory.chmod(0o555)
        yield
        directory.chmod(0o755)
        return
    bind = ["mount", "--bind", str(directory), str(directory)]
    if subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("neither a user whom permissions stop, nor one who may mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


# FAULTS 10
@pytest.mark.parametrize("command", [["run", "tiny"], ["up"], ["models"], ["rollback", "gpt-tiny", "--reason", "x"]])
@pytest.mark.parametrize("is_there", [True, False], ids=["there", "to be made"])
def test_a_state_root_that_is_read_only_is_named_at_the_start_and_nothing_is_half_made(
    project: Path, command: list[str], is_there: bool
) -> None:
    home = project / "disk" / "home"
    (home if is_there else home.parent).mkdir(parents=True)
    with read_only(project / "disk"):
        before = sorted(project.rglob("*"))
        done = gptflow(project, *command, GPTFLOW_HOME=str(home))
        assert sorted(project.rglob("*")) == before
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert f"the state root {home} cannot be written: " in done.stderr and "GPTFLOW_HOME" in done.stderr


def run(pipeline: Pipeline) -> str:
    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    state = retrain(pipeline.name, pipeline.model_name, **sections, return_state=True)
    state.result()
    return str(state.name)


# FAULTS 10
@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("lost", [("corpora", "tokens"), ("runs", "artifacts")])
def test_a_run_whose_directories_are_deleted_in_mid_training_ends_with_the_path_and_the_next_one_makes_them_again(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, str]
) -> None:
    def delete(reader: MetricsReader, *most: int) -> list[Metrics]:
        if lines := new_lines(reader, *most):
            for name in lost:
                shutil.rmtree(root.path / name, ignore_errors=True)
        return lines

    new_lines = MetricsReader.new_lines
    with monkeypatch.context() as patched, pytest.raises((OSError, GPTCoreError), match=str(root.path)):
        patched.setattr(MetricsReader, "new_lines", delete)
        run(tiny)
    assert MlflowClient(root.tracking_uri).search_registered_models() == []
    assert run(tiny) == "Promoted"
    (version,) = registry.versions(root, "gpt-tiny")
    (only,) = (RunDirectory(path) for path in root.path.glob("runs/tiny/*-1/"))
    assert [line["step"] for line in only.read_metrics()] == list(range(1, 61))
    result = only.result()
    assert result is not None and result.weights_sha256 == version.tags["weights_sha256"]
    load(root, version)
    for name in lost:  # between two runs
        shutil.rmtree(root.path / name)
    assert run(tiny) == "Skipped"
    assert len(registry.versions(root, "gpt-tiny")) == 1

"""A state root that is read-only, missing or partly deleted: a clear error, or everything is created again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import SECTIONS, Pipeline
from flows.registry import versions
from flows.registry.loading import load
from flows.retrain.flow import retrain
from flows.state.root import StateRoot
from gptcore.errors import GPTCoreError
from gptcore.training.run_directory import MetricsLine, MetricsReader, RunDirectory
from tests.servers import gptflow


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a directory read-only inside the context. For root this needs a mount: permissions do not stop root."""
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


@pytest.mark.parametrize("command", [["run", "tiny"], ["up"], ["models"], ["rollback", "gpt-tiny", "--reason", "x"]])
@pytest.mark.parametrize("is_there", [True, False], ids=["there", "to be made"])
def test_a_read_only_state_root_is_reported_at_the_start_and_nothing_is_created(
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
    return str(state.result().verdict)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("lost", [("corpora", "tokens"), pytest.param(("runs", "artifacts"), marks=pytest.mark.deep)])
def test_a_run_whose_directories_are_deleted_during_training_names_the_path_and_the_next_run_creates_them(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, str]
) -> None:
    def delete(reader: MetricsReader, *most: int) -> list[MetricsLine]:
        if lines := new_lines(reader, *most):
            for name in lost:
                shutil.rmtree(root.path / name, ignore_errors=True)
        return lines

    new_lines = MetricsReader.read_new_lines
    with monkeypatch.context() as patched, pytest.raises((OSError, GPTCoreError), match=str(root.path)):
        patched.setattr(MetricsReader, "read_new_lines", delete)
        run(tiny)
    assert MlflowClient(root.tracking_uri).search_registered_models() == []
    assert run(tiny) == "promoted"
    (version,) = versions.list_versions(root, "gpt-tiny")
    (only,) = (RunDirectory(path) for path in root.path.glob("runs/tiny/*-1/"))
    assert [line["step"] for line in only.read_metrics()] == list(range(1, 61))
    result = only.read_result()
    assert result is not None and result.weights_sha256 == version.tags["weights_sha256"]
    load(root, version)
    for name in lost:  # between two runs
        shutil.rmtree(root.path / name)
    assert run(tiny) == "skipped"
    assert len(versions.list_versions(root, "gpt-tiny")) == 1

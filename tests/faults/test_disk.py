"""The whole flow on a disk that fills up: nothing unfinished counts, and with free space the same run resumes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

import flows
from flows.config.pipelines import SECTIONS, Pipeline, PipelinesFile
from flows.notifications.verdicts import read_verdict
from flows.registry import versions
from flows.retrain.flow import retrain
from flows.state.root import StateRoot
from gptcore.training.run_directory import RunDirectory
from tests import databases

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
MEGABYTE = 1024 * 1024
ROOM = (0.2, 0.5, 0.9, 1.05, 1.2, 1.4, 1.6)
"""Megabytes free at the start of a run; with each value the run gets a bit further."""


@pytest.fixture
def small(project: Path, root: StateRoot, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateRoot]:
    """A state root on its own file system of 24 MB."""
    place = project / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        small = StateRoot(place / "mlruns")
        monkeypatch.setenv("GPTFLOW_HOME", str(small.path))
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        small.prepare()
        databases.give(small.path, migrated)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", small.tracking_uri)
        yield small
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def leave(root: StateRoot, megabytes: float) -> None:
    """Fill the disk until `megabytes` are free."""
    filler = root.path.parent / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - int(megabytes * MEGABYTE))))


def run(pipeline: Pipeline) -> tuple[str, str]:
    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    state = retrain(pipeline.name, pipeline.model_name, **sections, return_state=True)
    return str(read_verdict(state) or state.name), str(state.message)


def test_a_run_reports_a_full_disk_at_any_step_and_resumes_when_space_is_free(project: Path, small: StateRoot) -> None:
    tiny = PipelinesFile(project / "pipelines.yaml").pipeline("tiny", ("train.checkpoint_steps=20",))
    ends: list[str] = []
    for megabytes in ROOM:
        leave(small, megabytes)
        name, message = run(tiny)
        ends.append(name)
        if name == "promoted":
            break
        print(megabytes, message)
        assert name == "Failed" and "full" in message and "Free space" in message, message
        if versions.find_champion(small, "gpt-tiny") is not None:
            flows.load("models:/gpt-tiny@champion")
    assert ends.count("Failed") >= 3, ends
    leave(small, 12)
    name, message = run(tiny)
    assert name == ("skipped" if "promoted" in ends else "promoted"), message
    client = MlflowClient(small.tracking_uri)
    (only,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert only.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(only.info.run_id, "loss")] == list(range(1, 61))
    assert len(client.search_model_versions("name = 'gpt-tiny'")) == 1
    assert mlflow.pyfunc.load_model("models:/gpt-tiny@champion").predict(["The"], params={"max_new_tokens": 3})
    (made,) = (small.path / "runs" / "tiny").glob("*-*")
    assert RunDirectory(made).read_result() is not None
    assert not list(small.path.rglob(".tmp-*")), "no unfinished files are left"

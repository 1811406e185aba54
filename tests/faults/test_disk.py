"""The whole flow on a disk that fills up: nothing half-made counts, and with room again the same run goes on."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

import flows
from flows.pipelines import SECTIONS, Pipeline, PipelinesFile
from flows.releases import registry
from flows.retrain import retrain
from flows.state import StateRoot
from gptcore.learning.rundir import RunDirectory
from tests import databases

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
MEGABYTE = 1024 * 1024
ROOM = (0.2, 0.5, 0.9, 1.05, 1.2, 1.4, 1.6)
"""Megabytes free at the beginning of a run: each gets a bit further than the one before."""


@pytest.fixture
def small(project: Path, root: StateRoot, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateRoot]:
    """A state root on a file system of its own, of 24 MB."""
    place = project / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        small = StateRoot(place / "mlruns")
        monkeypatch.setenv("GPTFLOW_HOME", str(small.path))
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        small.create()
        databases.give(small.path, migrated)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", small.tracking_uri)
        yield small
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def leave(root: StateRoot, megabytes: float) -> None:
    """Fills the disk up to so many megabytes."""
    filler = root.path.parent / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(root.path).f_bavail * os.statvfs(root.path).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - int(megabytes * MEGABYTE))))


def run(pipeline: Pipeline) -> tuple[str, str]:
    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    state = retrain(pipeline.name, pipeline.model_name, **sections, return_state=True)
    return str(state.name), str(state.message)


# FAULTS 9
def test_a_run_on_a_full_disk_says_so_wherever_it_fills_up_and_goes_on_once_there_is_room(
    project: Path, small: StateRoot
) -> None:
    tiny = PipelinesFile(project / "pipelines.yaml").pipeline("tiny", ("train.checkpoint_steps=20",))
    ends: list[str] = []
    for megabytes in ROOM:
        leave(small, megabytes)
        name, message = run(tiny)
        ends.append(name)
        if name == "Promoted":
            break
        print(megabytes, message)
        assert name == "Failed" and "full" in message and "Free space" in message, message
        if registry.champion_of(small, "gpt-tiny") is not None:
            flows.load("models:/gpt-tiny@champion")
    assert ends.count("Failed") >= 3, ends
    leave(small, 12)
    name, message = run(tiny)
    assert name == ("Skipped" if "Promoted" in ends else "Promoted"), message
    client = MlflowClient(small.tracking_uri)
    (only,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert only.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(only.info.run_id, "loss")] == list(range(1, 61))
    assert len(client.search_model_versions("name = 'gpt-tiny'")) == 1
    assert mlflow.pyfunc.load_model("models:/gpt-tiny@champion").predict(["The"], params={"max_new_tokens": 3})
    (made,) = (small.path / "runs" / "tiny").glob("*-*")
    assert RunDirectory(made).result() is not None
    assert not list(small.path.rglob(".tmp-*")), "nothing half-made is left"

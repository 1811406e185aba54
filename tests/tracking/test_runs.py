"""System metrics, which a training logs besides its own metrics."""

import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flows.tracking import runs
from tests.fixtures import TinyRegistry


def test_system_metrics_go_to_the_server_of_the_run_even_if_mlflow_was_set_to_another_one(
    tiny_registry: TinyRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_SYSTEM_METRICS_SECONDS", 0.1)
    uri = tiny_registry.root.tracking_uri
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with runs.log_system_metrics(tiny_registry.root, run_id):
        time.sleep(1)
    logged = client.get_run(run_id).data.metrics
    assert all(name.startswith("system/") for name in logged) and "system/cpu_utilization_percentage" in logged
    assert not (tmp_path / "other.db").exists()

"""System metrics, which a training logs besides its own metrics."""

import json
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flows.config.pipelines import Pipeline
from flows.tracking import runs
from gptcore.config import CorpusConfig
from gptcore.corpus.reading import Reading
from gptcore.corpus.snapshot import Snapshot
from tests.fixtures import TinyRegistry


def test_a_run_has_as_many_sources_as_mlflow_accepts_and_the_number_of_the_others(tiny_registry: TinyRegistry) -> None:
    root = tiny_registry.root
    client = MlflowClient(root.tracking_uri)
    run_id = client.create_run("0").info.run_id
    sources = tuple(f"/texts/{'x' * 60}/{number}.txt" for number in range(1_100))
    pipeline = Pipeline(name="tiny", model_name="gpt-tiny", corpus=CorpusConfig(sources=sources))
    reading = Reading()
    counts = {"documents": 1, "blocks": {}, "bytes": {}, "dropped": {}}
    snapshot = Snapshot(root.corpora / "a", "a" * 64, split={}, reading=reading, **counts)
    runs.log_dataset(root, run_id, pipeline, snapshot)
    (logged,) = client.get_run(run_id).inputs.dataset_inputs
    source = json.loads(logged.dataset.source)
    assert source["sources"] == list(sources[: len(source["sources"])])
    assert len(source["sources"]) > 700 and len(source["sources"]) + source["more_sources"] == 1_100


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


def test_every_key_is_a_parameter_even_if_its_value_is_an_empty_mapping() -> None:
    assert runs.flatten({"corpus": {"formats": {}, "text": "text"}}) == {"corpus.formats": "{}", "corpus.text": "text"}

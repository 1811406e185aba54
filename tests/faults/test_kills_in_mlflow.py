"""The metrics of a training that is killed several times: MLflow has each point once."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.state.root import StateRoot
from flows.tracking.metrics import LOGGED, MetricsLog
from tests.faults.kills import Twin, killed_at, lives_to_its_end
from tests.tiny import make_tokens


@pytest.mark.slow
def test_metrics_of_a_training_killed_several_times_arrive_in_mlflow_once_per_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    twin = Twin(tmp_path, "plain", make_tokens(tmp_path / "tokens"))
    run = twin.another()
    root = StateRoot(tmp_path / "mlruns").prepare()
    client = MlflowClient(root.tracking_uri)
    run_id = client.create_run(client.create_experiment("kills")).info.run_id
    log = MetricsLog(root, run_id, run.metrics)
    points = ["after update 3 begins", "save of update 4 before rename to checkpoints/step-00000004"]
    points += ["after update 6 begins", "after update 6 begins", "finish before rename to final"]
    for number, point in enumerate(points):
        assert killed_at(run, point)
        log.send()
        if number % 2:  # the log is killed too
            log = MetricsLog(root, run_id, run.metrics)
    for _ in lives_to_its_end(run):
        pass
    twin.compare(run)
    log.send()
    lines = run.read_metrics()
    for key in LOGGED:
        logged = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in logged] == [step for step, _ in expected], key
        if key not in ("tokens_per_second", "memory_mb"):
            assert logged == expected, key

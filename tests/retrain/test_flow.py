"""The whole flow on a tiny pipeline: a real Prefect server, a real SQLite MLflow, a real child process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterEndTime,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import CancelledRun

from flows.config.pipelines import SECTIONS, Pipeline
from flows.notifications.notify import NotifyConfig
from flows.notifications.verdicts import read_verdict
from flows.registry import versions
from flows.retrain import trainer_process
from flows.retrain.flow import Outcome, retrain
from flows.state.root import StateRoot
from gptcore.errors import TrainingDiverged
from gptcore.training.run_directory import RunDirectory
from tests.servers import Receiver

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(pipeline: Pipeline, force: bool = False, sources_overridden: bool = False) -> tuple[str, Outcome]:
    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    given = {**sections, "force": force, "sources_overridden": sources_overridden}
    state = retrain(pipeline.name, pipeline.model_name, **given, return_state=True)
    outcome = state.result()
    assert (state.name, read_verdict(state)) == ("Completed", outcome.verdict), "the pages filter by standard names"
    return outcome.verdict, outcome


def newest_flow_run() -> FlowRun:
    """Return the run that ended last. The server may also know runs of other tests, which may be due later."""
    ended = FlowRunFilter(end_time=FlowRunFilterEndTime(is_null_=False))
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC, limit=1)[0]


def changed(pipeline: Pipeline, **train: object) -> Pipeline:
    return pipeline.model_copy(update={"train": pipeline.train.model_copy(update=train)})


def mlflow_runs(root: StateRoot) -> list[mlflow.entities.Run]:
    client = MlflowClient(root.tracking_uri)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_a_first_run_becomes_champion_and_the_same_run_again_is_skipped(tiny: Pipeline, root: StateRoot) -> None:
    name, outcome = run(tiny)
    assert (name, outcome.verdict, outcome.uri) == ("promoted", "promoted", "models:/gpt-tiny/1")
    assert list(outcome.seconds) == "ingest compare tokenize train evaluate sample plot register gate report".split()
    shown = newest_flow_run()
    assert re.fullmatch(r"tiny \d{4}-\d\d-\d\d · v1 promoted", shown.name) and shown.tags == ["promoted"]
    with get_client(sync_client=True) as client:
        (progress,) = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=["tiny-progress"]), flow_run_id=ArtifactFilterFlowRunId(any_=[shown.id])
            )
        )
    assert str(progress.description).startswith("tiny: step 60 of 60, loss ")
    (done,) = mlflow_runs(root)
    left = MlflowClient(root.tracking_uri).create_run(done.info.experiment_id, tags={"pipeline": "tiny"})
    name, outcome = run(tiny)
    assert (name, outcome.verdict) == ("skipped", "skipped")
    assert "nothing changed since version 1" in outcome.reason
    assert len(versions.list_versions(root, "gpt-tiny")) == 1
    statuses = {one.info.run_id: one.info.status for one in mlflow_runs(root)}
    assert statuses == {done.info.run_id: "FINISHED", left.info.run_id: "KILLED"}, (
        "the MLflow run of a killed run is ended as well"
    )


def test_a_stopped_run_saves_ends_as_cancelled_and_notifies_nobody(
    tiny: Pipeline, root: StateRoot, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = changed(tiny, max_steps=1_000_000)
    given = {name: getattr(asked, name) for name in SECTIONS}
    with monkeypatch.context() as patched:
        patched.setattr(trainer_process.ProgressReport, "show", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        notify = (NotifyConfig(webhook=receiver.url),)
        state = retrain(asked.name, asked.model_name, **given, notify=notify, return_state=True)
    saved = RunDirectory(Path(run_directory(root))).saved_step()
    assert saved > 0 and (state.type.value, state.name) == ("CANCELLED", "Cancelled")
    assert state.message == f"stopped, saved at step {saved:,}; the next run resumes"
    assert newest_flow_run().name.endswith(" · stopped") and receiver.got == []


def test_a_forced_run_trains_equal_weights_and_a_tie_does_not_replace_the_champion(
    tiny: Pipeline, root: StateRoot
) -> None:
    run(tiny)
    _, outcome = run(tiny, force=True)
    assert (outcome.verdict, outcome.uri) == ("rejected", "models:/gpt-tiny/2")
    first, second = (versions.summarize(root, version) for version in versions.list_versions(root, "gpt-tiny"))
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["aliases"] == ["champion"]
    assert second["gate_bits_per_byte"] == second["gate_champion_bits_per_byte"]
    cards = [(versions.fetch_bundle(root, "gpt-tiny", number) / "README.md").read_text() for number in "12"]
    assert ["version 1, the champion then" in card for card in cards] == [False, True]
    assert all(f"| {first['holdout_bits_per_byte']:.4f} |" in card and "## What it writes" in card for card in cards)


@pytest.mark.slow
def test_a_version_from_overridden_sources_competes_only_once_the_pipeline_has_these_sources(
    tiny: Pipeline, root: StateRoot
) -> None:
    run(changed(tiny, max_steps=20))
    _, experiment = run(changed(tiny, max_steps=120), sources_overridden=True)
    assert (experiment.verdict, experiment.uri) == ("rejected", "models:/gpt-tiny/2")
    assert "corpus.sources were overridden" in experiment.reason
    name, outcome = run(changed(tiny, max_steps=120), sources_overridden=True)
    assert name == "skipped"
    name, outcome = run(changed(tiny, max_steps=120))
    assert (name, outcome.uri) == ("promoted", "models:/gpt-tiny/2")
    assert len(versions.list_versions(root, "gpt-tiny")) == len(mlflow_runs(root)) == 2


def test_the_mlflow_run_holds_params_metrics_dataset_and_files(tiny: Pipeline, root: StateRoot) -> None:
    run(tiny)
    (only,) = mlflow_runs(root)
    client = MlflowClient(root.tracking_uri)
    assert only.info.status == "FINISHED"
    assert only.data.params["train.max_steps"] == "60"
    assert only.data.params["model.emb_dim"] == "32"
    history = client.get_metric_history(only.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 61))
    assert [metric.step for metric in client.get_metric_history(only.info.run_id, "val_loss")] == [1, 21, 41, 60]
    assert "holdout_bits_per_byte" in only.data.metrics
    assert 0 <= only.data.metrics["memorized_once"] <= 1
    described = versions.describe(root, versions.resolve(root, "models:/gpt-tiny/1"))
    assert described["memorized_once"] == only.data.metrics["memorized_once"]
    assert only.inputs.dataset_inputs[0].dataset.digest == only.data.tags["corpus_sha256"][:36]
    names = {item.path for item in client.list_artifacts(only.info.run_id)}
    assert names == {"evaluation", "samples", "plots", "card.md", "lineage.json"}
    plots = {Path(item.path).name for item in client.list_artifacts(only.info.run_id, "plots")}
    assert {"losses.png", "losses.pdf", "surprise.png"} < plots


def test_a_run_killed_before_the_verdict_is_resumed_without_duplicates(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(CancelledRun):
        patched.setattr("flows.registry.gate.judge_without_champion", killed)
        run(tiny)
    assert versions.find_champion(root, "gpt-tiny") is None
    (interrupted,) = mlflow_runs(root)
    assert interrupted.info.status == "KILLED"
    _, outcome = run(tiny)
    assert (outcome.verdict, outcome.uri) == ("promoted", "models:/gpt-tiny/1")
    (only,) = mlflow_runs(root)
    assert only.info.run_id == interrupted.info.run_id and only.info.status == "FINISHED"
    client = MlflowClient(root.tracking_uri)
    assert len(client.get_metric_history(only.info.run_id, "loss")) == 60


def test_a_run_killed_after_the_verdict_is_reported_by_the_next_one_without_being_judged_again(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(CancelledRun):
        patched.setattr("flows.retrain.decision_card.publish_card", killed)
        run(tiny)
    (interrupted,) = mlflow_runs(root)
    client = MlflowClient(root.tracking_uri)
    client.update_run(interrupted.info.run_id, status="RUNNING")  # as after SIGKILL, which no handler sees
    client.log_metric(interrupted.info.run_id, "holdout_loss", 1.0)
    with monkeypatch.context() as patched:
        patched.setattr("flows.registry.gate.judge_without_champion", killed)
        name, outcome = run(tiny)
    assert (name, outcome.uri) == ("promoted", "models:/gpt-tiny/1")
    (only,) = mlflow_runs(root)
    assert (only.info.run_id, only.info.status) == (interrupted.info.run_id, "FINISHED")
    assert "plots" in {file.path for file in client.list_artifacts(only.info.run_id)}
    assert len(client.get_metric_history(only.info.run_id, "holdout_loss")) == 1
    assert run(tiny)[0] == "skipped"


def test_a_diverging_training_fails_the_mlflow_run_and_registers_nothing(tiny: Pipeline, root: StateRoot) -> None:
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        run(changed(tiny, learning_rate=10.0, weight_decay=10.0, schedule="constant", max_steps=2000))
    (only,) = mlflow_runs(root)
    assert only.info.status == "FAILED"
    assert int(only.data.tags["diverged_at"]) >= 1
    assert MlflowClient(root.tracking_uri).search_registered_models() == []


def test_a_damaged_champion_stays_and_nothing_is_promoted(tiny: Pipeline, root: StateRoot) -> None:
    run(changed(tiny, max_steps=20))
    weights = versions.fetch_bundle(root, "gpt-tiny", "1") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(versions.RegistryError, match="models:/gpt-tiny/1 cannot be loaded, and nothing is promoted"):
        run(tiny)
    champion = versions.find_champion(root, "gpt-tiny")
    assert champion is not None and str(champion.version) == "1"


@pytest.mark.slow
def test_the_champion_answers_in_a_process_that_knows_only_the_tracking_uri(
    tiny: Pipeline, root: StateRoot, tmp_path: Path
) -> None:
    run(tiny)
    program = (
        "import json, mlflow; model = mlflow.pyfunc.load_model('models:/gpt-tiny@champion');"
        "greedy = {'max_new_tokens': 12, 'temperature': 0.0};"
        "print(json.dumps([model.predict(['The model', 'Every night'], params=greedy), model.predict(['The model'])]))"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"MLFLOW_TRACKING_URI": root.tracking_uri, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    greedy, drawn = json.loads(done.stdout.strip().splitlines()[-1])
    sample = json.loads(next(RunDirectory(Path(run_directory(root))).path.glob("samples-*/samples.json")).read_text())
    assert len(greedy) == 2 and sample[0]["text"].startswith(greedy[0])
    assert len(drawn) == 1 and isinstance(drawn[0], str)


def run_directory(root: StateRoot) -> str:
    (directory,) = (root.path / "runs" / "tiny").glob("*/")
    return str(directory)

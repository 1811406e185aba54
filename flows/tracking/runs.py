"""MLflow runs: one per run key and attempt, found by its tags before a new one is created.

A retry, or a run after a crash, finds the MLflow run of its key and continues it, so nothing is logged twice. The
metrics of the updates are sent by metrics.py; the model registry is in flows/registry/.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from flows.config.pipelines import RUNNING_KEYS, Pipeline
from flows.state.root import StateRoot
from gptcore.corpus.snapshot import Snapshot

_IMPORTS = "imports"
_SYSTEM_METRICS_SECONDS = 10
_MAX_SOURCES_CHARS = 60_000
"""MLflow refuses more than 65,535 characters in all."""
_CLOSING_PAUSES = (0.0, 0.5, 2.0)


def connect_and_migrate(root: StateRoot) -> None:
    """Connect to MLflow, after creating the tables of a new database. Both take seconds, so callers do it in parallel.

    Raises DatabaseBroken.
    """
    root.prepare_registry()
    MlflowClient(root.tracking_uri).search_experiments(max_results=1)


def open_run(root: StateRoot, pipeline: Pipeline, run_key: str, attempt: int, tags: Mapping[str, str]) -> str:
    """Return the id of the MLflow run of this key and attempt: the existing one, set running again, or a new one."""
    client = MlflowClient(root.tracking_uri)
    experiment = _experiment(client, root, pipeline.name)
    own = f"tags.run_key = '{run_key}' and tags.attempt = '{attempt}'"
    if existing := client.search_runs([experiment], own, max_results=1):
        run_id = existing[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        every_tag = {**tags, "run_key": run_key, "attempt": str(attempt), "pipeline": pipeline.name}
        run = client.create_run(experiment, tags=every_tag, run_name=f"{run_key[:8]}-{attempt}")
        run_id = run.info.run_id
    settings = flatten(pipeline.model_dump(mode="json", exclude=set(RUNNING_KEYS)))
    logged = client.get_run(run_id).data.params  # MLflow refuses to change a param, so the first value stays
    params = [Param(key, value) for key, value in settings.items() if key not in logged]
    client.log_batch(run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id


def open_import(root: StateRoot, import_key: str, tags: Mapping[str, str]) -> str:
    """Return the id of the MLflow run of an imported model: the one that a killed import left, or a new one."""
    client = MlflowClient(root.tracking_uri)
    experiment = _experiment(client, root, _IMPORTS)
    if existing := client.search_runs([experiment], f"tags.import_key = '{import_key}'", max_results=1):
        return existing[0].info.run_id
    run = client.create_run(experiment, tags={**tags, "import_key": import_key}, run_name=f"import-{import_key[:8]}")
    return run.info.run_id


def close_leftovers(root: StateRoot, pipeline_name: str) -> None:
    """End, as KILLED, the MLflow runs that a killed run of the pipeline left open. The pipeline's lock must be held."""
    client = MlflowClient(root.tracking_uri)
    if (experiment := client.get_experiment_by_name(pipeline_name)) is None:
        return
    for run in client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'"):
        if run.data.tags.get("pipeline") == pipeline_name:
            client.set_terminated(run.info.run_id, "KILLED")


def is_finished(root: StateRoot, run_id: str) -> bool:
    """Whether the run has all its results. True also if somebody has deleted the run."""
    try:
        return bool(MlflowClient(root.tracking_uri).get_run(run_id).info.status == "FINISHED")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return True
        raise


def log_dataset(root: StateRoot, run_id: str, pipeline: Pipeline, snapshot: Snapshot) -> None:
    """Log the corpus snapshot as the run's input."""
    dataset = Dataset(
        name=pipeline.name,
        digest=snapshot.sha256[:36],
        source_type="gptflow-corpus",
        source=json.dumps({**_shorten_sources(pipeline.corpus.sources), "snapshot": str(snapshot.path)}),
        profile=json.dumps({"documents": snapshot.documents, "blocks": snapshot.blocks, "bytes": snapshot.bytes}),
    )
    MlflowClient(root.tracking_uri).log_inputs(run_id, [DatasetInput(dataset)])


def _shorten_sources(sources: Sequence[str]) -> dict[str, Any]:
    """Return the first sources, as many as MLflow accepts, and the number of the others. The lineage has them all."""
    lengths = accumulate(len(json.dumps(source)) + 2 for source in sources)
    shown = sum(length <= _MAX_SOURCES_CHARS for length in lengths)
    more = {"more_sources": len(sources) - shown} if shown < len(sources) else {}
    return {"sources": list(sources[:shown]), **more}


@contextmanager
def log_system_metrics(root: StateRoot, run_id: str) -> Iterator[None]:
    """Log the machine's CPU, memory, disk and network use to the run inside this context."""
    monitor = SystemMetricsMonitor(
        run_id,
        sampling_interval=_SYSTEM_METRICS_SECONDS,
        resume_logging=True,
        tracking_uri=root.tracking_uri,
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def log_results(root: StateRoot, run_id: str, values: Mapping[str, float], directories: Sequence[Path]) -> None:
    """Log final scores as metrics, and each directory's files under the directory's name without its hash."""
    client = MlflowClient(root.tracking_uri)
    logged = client.get_run(run_id).data.metrics  # a run that was killed here has logged some of them
    for key in values.keys() - logged.keys():
        client.log_metric(run_id, key, values[key])
    for directory in directories:
        client.log_artifacts(run_id, str(directory), artifact_path=directory.name.rpartition("-")[0])


def log_text(root: StateRoot, run_id: str, text: str, name: str) -> None:
    """Log a text file to the run."""
    MlflowClient(root.tracking_uri).log_text(run_id, text, name)


def find_url(root: StateRoot, run_id: str) -> str | None:
    """Return the run's page in MLflow's UI; None if no server shows it."""
    if (ui := root.find_mlflow_ui()) is None:
        return None
    experiment = MlflowClient(root.tracking_uri).get_run(run_id).info.experiment_id
    return f"{ui}/#/experiments/{experiment}/runs/{run_id}"


def close_run(root: StateRoot, run_id: str, status: str, tags: Mapping[str, str]) -> None:
    """End the run as FINISHED, FAILED or KILLED, with these tags."""
    client = MlflowClient(root.tracking_uri)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.from_string(status)))


def close_interrupted_run(root: StateRoot, run_id: str, status: str, tags: Mapping[str, str]) -> None:
    """End a run after an error, as `close_run` does. An unreachable MLflow must not hide that error.

    Retries for some seconds. The next start ends a run that is still open then.
    """
    for seconds in _CLOSING_PAUSES:
        time.sleep(seconds)
        try:
            return close_run(root, run_id, status, tags)
        except MlflowException as error:
            logging.getLogger(__name__).warning("MLflow run %s is not closed yet: %s", run_id, error)
    return None


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values under dotted keys, as text: `{"train": {"seed": 1}}` -> `{"train.seed": "1"}`."""
    result: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            result |= flatten(inner, f"{name}.")
        else:
            result[name] = inner if isinstance(inner, str) else json.dumps(inner)
    return result


def _experiment(client: MlflowClient, root: StateRoot, name: str) -> str:
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment.experiment_id
    return client.create_experiment(name, artifact_location=root.artifact_location(name))

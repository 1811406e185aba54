"""Fixtures for the flow tests: a state root, a tiny pipeline, and one Prefect server for all tests."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from flows.config.pipelines import Pipeline, PipelinesFile
from flows.registry.versions import BUNDLE_SHA256, fetch_bundle
from flows.state.root import OPT_OUTS, StateRoot
from gptcore.bundle import write_bundle
from gptcore.config import ModelConfig, RunConfig, TrainConfig
from gptcore.manifest import MANIFEST, commit, seal, sha256_of, sha256_of_file, stage
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import Tokenizer, get_tokenizer
from gptcore.training.run_directory import Result, RunDirectory, describe_result
from tests import databases, forks, pictures
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.servers import Prefect, Receiver, Up, clean
from tests.servers import prefect_server as prefect_server_in
from tests.state import objects as object_store
from tests.state import postgres as postgresql
from tests.state.objects import Objects
from tests.state.postgres import Postgres
from tests.tiny import TINY_CFG, TINY_MODEL, make_tokens, write_project

databases.commit_without_waiting()


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Undo changes of the environment variables that a test, or MLflow in the test, made."""
    before = dict(os.environ)
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the plots of flows that run in this process with placeholders."""
    if "prefect_server" in request.fixturenames:
        for name, value in pictures.UNDRAWN.items():
            monkeypatch.setattr(f"gptcore.evaluation.run_report.{name}", value)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a text and a pipelines.yaml whose pipeline `tiny` trains in a second."""
    return write_project(tmp_path)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """The tokenizer of the tiny model: a byte is a token."""
    return get_tokenizer("bytes")


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU that computes on the CPU, but refuses tensors in main memory. Only for the thread of the test."""
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Tokens of prose for tests that train. Tests only read them."""
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def migrated(pytestconfig: pytest.Config) -> Path:
    """A directory with empty, migrated databases of MLflow and Prefect."""
    directory = pytestconfig.cache.mkdir(databases.name())
    databases.make(directory, clean())
    return directory


@pytest.fixture
def root(project: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> StateRoot:
    """The project's state root, set in this process's environment, with migrated databases."""
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = StateRoot(project / "mlruns").prepare()
    databases.give(root.path, migrated)
    monkeypatch.setenv("GPTFLOW_HOME", str(root.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", root.tracking_uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return root


@pytest.fixture
def tiny(project: Path) -> Pipeline:
    return PipelinesFile(project / "pipelines.yaml").pipeline("tiny")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A web server that records every body that it receives."""
    server = Receiver()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def shared_server(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A real Prefect server with all its services, shared by the tests of this process that do not kill a server."""
    with prefect_server_in(tmp_path_factory.mktemp("prefect"), migrated) as server:
        yield server


@pytest.fixture(scope="module")
def server(shared_server: Prefect) -> Prefect:
    """The shared Prefect server, emptied for this module."""
    shared_server.empty()
    return shared_server


@pytest.fixture(scope="session")
def prefect_server(shared_server: Prefect) -> Iterator[None]:
    """Run the flows of this process on the shared server, and fork their trainers."""
    os.environ.update(OPT_OUTS)
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    # No heartbeats, as under `gptflow run`: a flow would wait up to a second for the last heartbeat.
    settings = {PREFECT_API_URL: shared_server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with (
        temporary_settings(settings),
        _temporary_global_settings_context(get_settings_context()),  # for threads that have started already
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(psutil, "Popen", forks.popen)
        yield
        with suppress(RuntimeError):  # nothing was logged
            APILogWorker.instance().drain()
        EventsWorker.drain_all()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server, shared by the tests of this process."""
    with postgresql.running() as server:
        yield server


@pytest.fixture(scope="session")
def objects() -> Iterator[Objects]:
    """An S3-compatible server, shared by the tests of this process."""
    with object_store.running() as server:
        yield server


@pytest.fixture
def up(project: Path, migrated: Path) -> Iterator[Up]:
    """`gptflow up` in the project with migrated databases. The test starts it, and the fixture stops it."""
    databases.give(project / "mlruns", migrated)
    up = Up(project)
    yield up
    up.stop()


class TinyRegistry:
    """Registers versions of gpt-tiny that load but were never trained.

    Each has a run directory, token files, a snapshot and an MLflow run.
    """

    def __init__(self, root: StateRoot) -> None:
        self.root = root
        self.client = MlflowClient(root.tracking_uri)
        self.client.create_registered_model("gpt-tiny")
        self.experiment = self.client.create_experiment("tiny", artifact_location=str(root.artifacts / "tiny"))
        self.count = 0

    def register(self, weights_of: int | None = None, corpus: str = "one") -> str:
        """Register the next version, as if trained on `corpus`, with new weights or those of an earlier version."""
        self.count += 1
        number, key = self.count, sha256_of(self.count)
        corpus_sha256, tokens_sha256 = self.text(corpus)
        weights = self.run_directory(number, key, tokens_sha256, weights_of or number)
        identity = {"weights_sha256": sha256_of_file(weights), "corpus_sha256": corpus_sha256}
        tags = {"run_key": key, "attempt": "1"}
        run = self.client.create_run(self.experiment, tags={**tags, "pipeline": "tiny"})
        (Path(run.info.artifact_uri) / "plots").mkdir(parents=True)
        (Path(run.info.artifact_uri) / "plots" / "losses.png").write_bytes(bytes(100))
        logged = self.client.create_logged_model(self.experiment, name="gpt", source_run_id=run.info.run_id)
        bundle = Path(logged.artifact_location) / "artifacts" / "bundle"
        bundle.mkdir(parents=True)
        lineage = {**identity, "tokens_sha256": tokens_sha256, "pipeline": "tiny", "run_key": key}
        sha256 = write_bundle(bundle, TINY_CFG, weights, get_tokenizer("bytes"), lineage)
        self.client.finalize_logged_model(logged.model_id, "READY")
        self.client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, 0)])
        self.client.set_terminated(run.info.run_id, "FINISHED")
        tags |= {**identity, "verdict": "rejected", BUNDLE_SHA256: sha256}
        uri = f"models:/{logged.model_id}"
        created = self.client.create_model_version("gpt-tiny", uri, run_id=run.info.run_id, tags=tags)
        return str(created.version)

    def text(self, name: str) -> tuple[str, str]:
        """Return the hashes of a snapshot and its token files. Create both unless they exist."""
        corpus_sha256, tokens_sha256 = sha256_of(["corpus", name]), sha256_of(["tokens", name])
        for parent, about in (
            (self.root.corpora, {"kind": "corpus", "sha256": corpus_sha256}),
            (self.root.tokens, {"kind": "tokens", "sha256": tokens_sha256, "corpus_sha256": corpus_sha256}),
        ):
            if not (parent / about["sha256"][:16]).exists():
                with stage(parent) as staged:
                    (staged / "text").write_text(name * 100)
                    commit(staged, parent / about["sha256"][:16], about)
        return corpus_sha256, tokens_sha256

    def run_directory(self, number: int, key: str, tokens_sha256: str, seed: int, is_finished: bool = True) -> Path:
        """Create a run directory, finished or not, and return the path of its weights."""
        run = RunDirectory(self.root.run_directory("tiny", key, 1))
        train = TrainConfig(device="cpu", precision="fp32", compile=False, threads=1)
        config = RunConfig(
            training_version=1,
            tokens=f"../../../tokens/{tokens_sha256[:16]}",
            tokens_sha256=tokens_sha256,
            model=ModelConfig(**TINY_MODEL),
            vocab_size=TINY_CFG["vocab_size"],
            train=train,
            run_key=key,
        )
        run.prepare(config)
        (run.path / "metrics.jsonl").write_text("")
        if is_finished:
            with stage(run.path) as staged:
                write_weights(staged / "model.safetensors", seed)
                digest = sha256_of_file(staged / "model.safetensors")
                commit(staged, run.final, describe_result(Result(1, 1, 1.0, "max_steps", 1, 1.0, digest)))
        return run.weights


def forge(root: StateRoot, name: str, version: str) -> None:
    """Register the version's files as they are now, after a test has changed them."""
    sha256 = seal(fetch_bundle(root, name, version), {})
    MlflowClient(root.tracking_uri).set_model_version_tag(name, version, BUNDLE_SHA256, sha256)


def make_old(root: StateRoot, name: str, version: str) -> None:
    """Turn a version into one that an earlier release registered, without a manifest."""
    (fetch_bundle(root, name, version) / MANIFEST).unlink()
    MlflowClient(root.tracking_uri).delete_model_version_tag(name, version, BUNDLE_SHA256)


def write_weights(path: Path, seed: int) -> None:
    """Write the initial weights of a GPTModel(TINY_CFG)."""
    import torch
    from safetensors.torch import save_file

    from gptcore.model.gpt import GPTModel

    torch.manual_seed(seed)
    save_file(GPTModel(TINY_CFG).state_dict(), path)


@pytest.fixture
def tiny_registry(root: StateRoot) -> TinyRegistry:
    """An empty registry with the model gpt-tiny."""
    mlflow.set_tracking_uri(root.tracking_uri)
    return TinyRegistry(root)

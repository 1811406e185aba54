"""Imported models in the registry, and exported versions: their recorded origin, and refused input."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import flows
from flows.cli.doctor_checks import check_champion as checked
from flows.config.pipelines import Pipeline
from flows.operations.reproduce import NotAsThen, reproduce
from flows.operations.retention import prune
from flows.registry import ancestry, import_, versions
from flows.state.root import StateRoot
from gptcore.errors import ConfigError
from gptcore.huggingface import export
from gptcore.huggingface import import_ as checkpoints
from gptcore.huggingface.import_ import Checkpoint
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer
from gptcore.training.run_directory import RunDirectory
from tests.registry import judging
from tests.retrain.test_policy import asking, run
from tests.servers import gptflow, refused

CFG = {**judging.CFG, "qkv_bias": True, "tied": True}
IDS = torch.arange(10)[None]


def write_gpt2(directory: Path, seed: int) -> GPTModel:
    """Write a model with random weights as a Hugging Face directory, and return it."""
    torch.manual_seed(seed)
    model = GPTModel(CFG).eval()
    export.export(CFG, model.state_dict(), get_tokenizer("bytes"), directory)
    return model


def bring(root: StateRoot, source: Path, model: str = "gpt-tiny") -> import_.Imported:
    return import_.register(root, model, checkpoints.read_checkpoint(str(source)), by="somebody")


def test_the_first_import_becomes_champion_the_next_a_candidate_and_a_repeated_one_changes_nothing(
    root: StateRoot, project: Path, tiny: Pipeline
) -> None:
    one, two = project / "one", project / "two"
    model = write_gpt2(one, 1)
    write_gpt2(two, 2)
    first, second, again = bring(root, one), bring(root, two), bring(root, one)
    told = [(done.uri, done.champion, done.is_new) for done in (first, second, again)]
    assert told == [
        ("models:/gpt-tiny/1", "1", True),
        ("models:/gpt-tiny/2", "1", True),
        ("models:/gpt-tiny/1", "1", False),
    ]
    loaded = flows.load("models:/gpt-tiny@champion")
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS), model(IDS))
    described = versions.describe(root, versions.resolve(root, "models:/gpt-tiny/1"))
    assert described["imported_from"] == str(one) and described["verdict"] == "imported"
    assert described["files"] == checkpoints.read_checkpoint(str(one)).files
    card = (versions.fetch_bundle(root, "gpt-tiny", "1") / "README.md").read_text()
    assert f"imported from `{one}`" in card and "Nothing is known about the text that it learned from." in card
    assert all(digest in card for digest in described["files"].values())
    assert json.dumps(described) and described["corpus_sha256"] is described["seed"] is None
    assert len(MlflowClient(root.tracking_uri).search_runs(["1"], "attributes.status = 'FINISHED'")) == 2
    assert checked(root, "gpt-tiny").ok and not list(root.imports.iterdir())
    assert prune(root, {"gpt-tiny": 1}).versions == []
    with pytest.raises(NotAsThen, match=f"imported from {one}"):
        reproduce(root, "models:/gpt-tiny/1", anyway=False, json=True)
    starts_from(root, tiny)


def starts_from(root: StateRoot, tiny: Pipeline) -> None:
    """Check that a pipeline can start from an import of the same architecture, whose training text is unknown."""
    warm = asking(tiny, train={"start_from": "models:/gpt-tiny/1"})
    for keys, part in (
        ({}, "model.qkv_bias True, here it is False"),
        ({"qkv_bias": True}, "model.tied True, here it is False"),
    ):
        with pytest.raises(ConfigError, match=part):
            ancestry.resolve_start(root, asking(warm, model=keys))
    start = ancestry.resolve_start(root, asking(warm, model={"qkv_bias": True, "tied": True}))
    assert start is not None and start.load_tokenizer().name == "bytes"
    assert [why for _, why in ancestry.check_training_texts(root, list(start.ancestors))] == [
        "models:/gpt-tiny/1 names no corpus"
    ]


def test_an_import_killed_at_any_step_is_completed_by_the_next(
    root: StateRoot, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    write_gpt2(project / "one", 1)
    for where, name in (
        (import_, "write_bundle"),
        (MlflowClient, "create_model_version"),
        (import_.runs, "close_run"),
        (import_, "promote"),
    ):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(where, name, die)
            bring(root, project / "one")
    assert bring(root, project / "one").champion == "1"
    client = MlflowClient(root.tracking_uri)
    assert [str(version.version) for version in versions.list_versions(root)] == ["1"]
    assert len(client.search_logged_models(["1"])) == len(client.search_runs(["1"])) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_retraining_can_start_from_an_import_and_is_compared_with_it(
    root: StateRoot, project: Path, tiny: Pipeline
) -> None:
    write_gpt2(project / "one", 1)
    bring(root, project / "one")
    name, outcome = run(asking(tiny, train={"start_from": "champion"}, model={"qkv_bias": True, "tied": True}))
    assert name == "promoted" and "some training text is unknown: models:/gpt-tiny/1" in outcome.reason
    imported_version, trained = versions.list_versions(root, "gpt-tiny")
    start = RunDirectory(Path(outcome.run_directory)).read_config().start
    assert start is not None and start.weights_sha256 == imported_version.tags["weights_sha256"]
    assert trained.tags["started_from"] == "models:/gpt-tiny/1"


@pytest.mark.slow
def test_the_import_and_export_commands_report_results_and_refuse_invalid_arguments(
    root: StateRoot, project: Path
) -> None:
    """Import a model, export it again, and try invalid arguments."""
    write_gpt2(project / "one", 1)
    done = gptflow(project, "import", "one", "--model", "gpt-new")
    assert done.returncode == 0, done.stderr
    for part in (
        "models:/gpt-new/1: 22,0",
        "it is the champion of gpt-new",
        "tokenizer: bytes",
        "n_layers: 1, qkv_bias: true, tied: true}",
    ):
        assert part in done.stdout
    done = gptflow(project, "export", "models:/gpt-new@champion", "two", "--json")
    assert done.returncode == 0 and "model.safetensors" in json.loads(done.stdout)["files"]
    one, two = (checkpoints.read_checkpoint(str(project / name)) for name in ("one", "two"))
    assert isinstance(one, Checkpoint) and one.files == two.files
    assert "AutoModelForCausalLM" in (project / "two" / "README.md").read_text()
    refused(gptflow(project, "export", "models:/gpt-new@champion", "two"), 2, "two is not empty")
    refused(gptflow(project, "import", "two/model.pth", "--model", "x"), 2, "two/model.pth does not exist")
    refused(gptflow(project, "import", "two", "--model", "a/b"), 2, "'a/b' is not a model's name")

"""`gptflow prepare`: the copy of the tokens in a run directory."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli.run import _copy_tokens, prepare_directory
from flows.config.pipelines import Pipeline
from flows.retrain import attempts
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.config import MachineSettings
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import read_document_list
from gptcore.tokens.files import tokenize
from gptcore.training.run_directory import RunDirectory


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token directory; what its files hold does not matter here."""

    def fill(staged: Path) -> dict[str, str]:
        (staged / "tokenizer").mkdir()
        for name in ("train.bin", "tokenizer/vocabulary.json"):
            (staged / name).write_text(name)
        return {"kind": "tokens"}

    return manifest.make_once(tmp_path / "tokens" / "0123456789abcdef", fill)


def test_a_killed_copy_leaves_nothing_and_a_damaged_or_partial_one_is_made_again(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copytree = tmp_path / "run" / "tokens", shutil.copytree

    def die(source: Path, goal: Path, **options: bool) -> None:
        copytree(source / "tokenizer", goal / "tokenizer")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.copytree", die)
        _copy_tokens(tokens, copy)
    assert not copy.exists()
    copytree(tokens / "tokenizer", copy / "tokenizer")  # an earlier release was killed here
    for _ in range(2):
        _copy_tokens(tokens, copy)
        assert manifest.verify(copy) == {"kind": "tokens"}
        (copy / "train.bin").write_text("other.bin")


def test_documents_have_the_same_names_from_every_directory_and_what_was_left_out_is_printed(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPTFLOW_HOME", raising=False)
    (project / "text" / "picture.png").write_bytes(b"")
    listed = set()
    for directory in (project, tmp_path_factory.mktemp("elsewhere")):
        monkeypatch.chdir(directory)
        shutil.rmtree(project / "mlruns" / "corpora", ignore_errors=True)
        file = str(project / "pipelines.yaml")
        done = CliRunner().invoke(prepare_directory, ["tiny", str(directory / "run"), "--file", file])
        assert done.exit_code == 0, done.output
        assert ".png: 1 file not read: a picture is not text." in done.output
        (snapshot,) = (project / "mlruns" / "corpora").iterdir()
        listed.add(frozenset(document.name for document in read_document_list(snapshot)))
    (names,) = listed
    assert names and all(name.startswith("text/") for name in names)


def test_a_directory_may_hold_auto_and_is_prepared_again_for_the_same_training_only(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    run = RunDirectory(project / "by-hand")

    def prepare(*overrides: str) -> str:
        options = [option for override in overrides for option in ("--set", override)]
        return CliRunner().invoke(prepare_directory, ["tiny", str(run.path), *options]).output

    assert "train it with" in prepare("train.threads=auto")
    config = run.read_config()
    open_keys = {"device": "auto", "precision": "auto", "compile": "auto", "threads": "auto"}
    assert config.machine_in_run_key.model_dump() == open_keys
    assert "train it with" in prepare("train.threads=3") and run.read_config().train.threads == 3
    assert run.read_config().machine_in_run_key == config.machine_in_run_key
    for change in ("train.precision=bf16", "train.seed=5"):
        assert prepare(change) == "" and run.read_config().run_key == config.run_key


def test_a_directory_of_an_earlier_release_which_holds_values_for_auto_can_be_prepared_again(
    tiny: Pipeline, root: StateRoot, tmp_path: Path
) -> None:
    run, train = RunDirectory(tmp_path / "run"), {"device": "cpu", "precision": "bf16", "compile": False}
    snapshot = ingest(tiny.corpus, root.corpora, root.project)
    tokens = tokenize(snapshot.path, "bytes", root.tokens)
    resolved = tiny.model_copy(update={"train": tiny.train.model_copy(update=train)})
    for pipeline in (resolved, tiny):
        attempts.configure(run, pipeline, tokens, str(tokens.path), start=None)
    config = run.read_config()
    assert (config.train.device, config.train.precision, config.precision_so_far) == ("auto", "auto", "bf16")
    assert config.machine_in_run_key == MachineSettings.of(resolved.train)

"""`gptflow prepare`: the copy of the tokens in a run directory."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli.run import _copy_tokens, prepare_directory
from gptcore import manifest
from gptcore.corpus.snapshot import read_document_list


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

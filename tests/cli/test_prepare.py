"""`gptflow prepare`: the copy of the tokens in a run directory."""

import shutil
from pathlib import Path

import pytest

from flows.cli.run import _copy_tokens
from gptcore import manifest


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

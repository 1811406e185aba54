"""Files that are never text, and those that .gitignore and corpus.exclude name."""

from pathlib import Path

import fsspec
import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.corpus.ingest import ingest
from gptcore.corpus.remote import find_objects
from gptcore.errors import CorpusError
from tests.tiny import prose

OWN = (
    *(".git/notes.md", ".hidden.txt", ".config/a.txt", "__pycache__/a.txt", "node_modules/pkg/README.md"),
    *("venv/pyvenv.cfg", "venv/lib/readme.txt", "mlruns/artifacts/1/card.md"),
    *("state/state.json", "state/locks/a.lock", "state/artifacts/README.md", "a.txt~", "docs/.b.txt.swp"),
)
TEXTS = ("a.txt", "docs/b.md", "docs/deep/c.txt")


def write(directory: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(prose(number, 300))


def found(base: Path, source: str, *exclude: str) -> list[str]:
    return [str(path.relative_to(base)) for path in sources.find_local_paths(source, base, exclude)]


@pytest.mark.parametrize("source", [".", "**/*", "**/*.[tm]*", "../notes"])
def test_the_products_own_files_and_hidden_ones_are_never_text(tmp_path: Path, source: str) -> None:
    base = tmp_path / "notes"
    write(base, *TEXTS, *OWN)
    names = [path.resolve().relative_to(base).as_posix() for path in sources.find_local_paths(source, base)]
    assert sorted(names) == sorted(TEXTS)


def test_a_file_that_is_named_or_whose_hidden_directory_is_named_is_read(tmp_path: Path) -> None:
    write(tmp_path, *OWN)
    assert found(tmp_path, ".hidden.txt") == [".hidden.txt"]
    assert found(tmp_path, ".git") == found(tmp_path, ".git/*.md") == [".git/notes.md"]
    assert found(tmp_path, ".hid*") == [".hidden.txt"]
    with pytest.raises(CorpusError, match=r"has no file .* that may be read .*Hidden files, state roots and what"):
        sources.check(["."], tmp_path)


def test_gitignore_files_below_a_source_are_honoured(tmp_path: Path) -> None:
    write(tmp_path, *TEXTS, "logs/one.txt", "docs/draft-1.md", "docs/deep/draft-2.txt", "docs/deep/keep.txt")
    (tmp_path / ".gitignore").write_text("# no logs\nlogs/\ndraft-*\n/docs/deep/*\n!/docs/deep/draft-2.txt\n")
    assert found(tmp_path, ".") == found(tmp_path, "**/*.*") == ["a.txt", "docs/b.md", "docs/deep/draft-2.txt"]
    (tmp_path / "docs" / ".gitignore").write_text("!deep/keep.txt\nb.md\n")
    assert found(tmp_path, ".") == ["a.txt", "docs/deep/draft-2.txt", "docs/deep/keep.txt"]
    assert "docs/b.md" in found(tmp_path, "docs/b.md"), "a file that is named itself"


def test_exclude_takes_the_same_patterns_relative_to_each_source(tmp_path: Path) -> None:
    write(tmp_path, *TEXTS, "docs/drafts/d.txt")
    assert found(tmp_path, ".", "drafts/", "*.md") == ["a.txt", "docs/deep/c.txt"]
    assert found(tmp_path, "docs", "/deep") == ["docs/b.md", "docs/drafts/d.txt"]
    assert found(tmp_path, "docs/**/*.txt", "*", "!deep", "!c.txt") == ["docs/deep/c.txt"]
    with pytest.raises(CorpusError, match=r"corpus\.exclude: .*Write patterns as in \.gitignore"):
        found(tmp_path, ".", "a\\")
    store = fsspec.filesystem("memory")
    for name in ("a.txt", "drafts/b.txt", ".cache/c.txt"):
        store.pipe(f"/shelf/{name}", b"text")
    assert list(find_objects("memory://shelf").objects) == ["/shelf/a.txt", "/shelf/drafts/b.txt"]
    assert list(find_objects("memory://shelf", ["drafts/"]).objects) == ["/shelf/a.txt"]
    assert list(find_objects("memory://shelf/**", ["drafts/"]).objects) == ["/shelf/a.txt"]
    assert list(find_objects("memory://shelf/d*/*.txt", ["/drafts/c*"]).objects) == ["/shelf/drafts/b.txt"]
    assert list(find_objects("memory://shelf/.c*/*.txt").objects) == ["/shelf/.cache/c.txt"]


def test_a_project_can_learn_from_its_own_directory_night_after_night(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.txt" for number in range(60)))
    cfg = CorpusConfig(sources=(".",), val_fraction=0.2, holdout_fraction=0.2)
    first = ingest(cfg, tmp_path / "mlruns" / "corpora", tmp_path)
    write(tmp_path, "mlruns/artifacts/1/README.md", "state/state.json", "state/locks/x.lock", "state/card.md")
    assert ingest(cfg, tmp_path / "mlruns" / "corpora", tmp_path).sha256 == first.sha256
    assert first.documents == 60
    excluding = cfg.model_copy(update={"exclude": ("1*.txt",)})
    assert ingest(excluding, tmp_path / "mlruns" / "corpora", tmp_path).documents == 49


def test_a_gitignore_written_by_a_windows_editor_is_honoured(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.txt", "c.txt")
    (tmp_path / ".gitignore").write_bytes(b"\xef\xbb\xbfb.txt\r\n\r\nc.txt\r\n")
    assert found(tmp_path, ".") == ["a.txt"]


def test_a_pattern_that_cannot_be_understood_is_passed_over_in_a_gitignore_and_refused_in_exclude(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a.txt", "b.txt")
    for pattern in ("!", "x[z-a]", "\\"):
        (tmp_path / ".gitignore").write_text(f"{pattern}\nb.txt\n")
        assert found(tmp_path, ".") == ["a.txt"]
    with pytest.raises(CorpusError, match=r"corpus\.exclude: .* Write patterns as in"):
        found(tmp_path, ".", "x[z-a]")


def test_the_directory_of_the_pipelines_file_may_have_the_marks_of_a_glob_in_its_name(tmp_path: Path) -> None:
    base = tmp_path / "[new]" / ".work"
    write(base, "notes/a.txt")
    (tmp_path / ".gitignore").write_text("*\n")
    assert found(base, "notes/*.txt") == found(base, "n*/*.txt") == ["notes/a.txt"]


@pytest.mark.parametrize(
    "patterns", ["*\n!*/\n!*.txt\n", "docs/**\n!docs/deep/\n!docs/deep/c.txt\na.txt\n!a.txt\n", "/docs\n!*/\n*.md\n"]
)
def test_directories_are_searched_for_what_a_pattern_excepts_as_git_does(tmp_path: Path, patterns: str) -> None:
    write(tmp_path, *TEXTS)
    (tmp_path / ".gitignore").write_text(patterns)
    assert found(tmp_path, ".") == found(tmp_path, "**/*.*") == ["a.txt", "docs/deep/c.txt"]

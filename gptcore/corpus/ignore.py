"""Decide which files below a directory or a glob of corpus.sources are not read.

These are hidden files and directories, `__pycache__`, `node_modules`, virtual environments, state roots of gptflow and
MLflow, the backup files of editors, and what a `.gitignore` file there or corpus.exclude names. A file that has an
entry of its own in corpus.sources is always read.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from gptcore.errors import CorpusError

GITIGNORE, EXCLUDE, HIDDEN, TOOLS = ".gitignore", "corpus.exclude", "hidden", "files of tools"
NOT_REGULAR = "not a regular file"
"""The rules by which files are left out, as reports name them. The first is also the name of the file with the rule."""
_END = "ps_d"
"""The group with which pathspec marks the slash at the end of the directory that a pattern matches."""
_NEVER = {"__pycache__", "node_modules", "mlruns", "mlartifacts"}


class IgnoreRules:
    """The rules below one directory, `root`. `exclude` has patterns in .gitignore's syntax, relative to `root`.

    With `includes_hidden`, files whose names begin with a dot are read too. Raises CorpusError for a pattern that is
    not valid.
    """

    def __init__(self, root: Path, exclude: Sequence[str] = (), includes_hidden: bool = False) -> None:
        self._root, self._includes_hidden = root, includes_hidden
        self._exclude = _parse(exclude, "corpus.exclude")
        self._gitignores: dict[Path, list[tuple[Path, GitIgnoreSpec]]] = {}

    def find_rule(self, path: Path, is_directory: bool = False) -> str:
        """Return the rule because of which a file or directory is not read; empty if it may be read.

        The directories that contain it are not checked.
        """
        if rule := self._find_rule_for_name(path.name):
            return rule
        if is_directory and _is_private(path):
            return TOOLS
        if self._exclude.patterns and _ignores(self._exclude, path.relative_to(self._root), is_directory):
            return EXCLUDE
        for directory, spec in self._list_gitignores(path.parent):
            ignores = _ignores(spec, path.relative_to(directory), is_directory)
            if ignores is not None:  # the file nearest to the path decides
                return GITIGNORE if ignores else ""
        return ""

    def find_rule_with_parents(self, path: Path) -> str:
        """Return the rule because of which a file, or a directory between the root and the file, is not read."""
        between = [parent for parent in path.parents if parent.is_relative_to(self._root) and parent != self._root]
        rules = (self.find_rule(directory, is_directory=True) for directory in reversed(between))
        return next(filter(None, rules), "") or self.find_rule(path)

    def find_rule_for_object(self, name: str) -> str:
        """Return the rule because of which an object of a store is not read; empty if it may be read.

        `name` is relative to the prefix that corpus.sources names.
        """
        for part in PurePosixPath(name).parts:
            if rule := self._find_rule_for_name(part):
                return rule
        return EXCLUDE if self._exclude.match_file(name) else ""

    def _find_rule_for_name(self, name: str) -> str:
        if name in _NEVER or name.endswith("~"):
            return TOOLS
        return HIDDEN if name.startswith(".") and not self._includes_hidden else ""

    def _list_gitignores(self, directory: Path) -> list[tuple[Path, GitIgnoreSpec]]:
        """List the .gitignore files that apply in a directory, with the directories that hold them, nearest first."""
        if directory not in self._gitignores:
            is_outermost = directory in (self._root, directory.parent)
            outer = [] if is_outermost else self._list_gitignores(directory.parent)
            file = directory / GITIGNORE
            own = []
            if file.is_file():
                lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                own.append((directory, GitIgnoreSpec.from_lines(filter(_is_valid, lines))))
            self._gitignores[directory] = [*own, *outer]
        return self._gitignores[directory]


def _is_valid(line: str) -> bool:
    """Whether a line of .gitignore is a pattern. Git passes over other lines, whose file may be somebody else's."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True


def _is_private(directory: Path) -> bool:
    """Whether the directory is a virtual environment or a state root."""
    is_state_root = (directory / "state.json").is_file() and (directory / "locks").is_dir()
    return is_state_root or (directory / "pyvenv.cfg").is_file()


def _ignores(patterns: GitIgnoreSpec, path: Path, is_directory: bool) -> bool | None:
    """Return whether the last pattern that matches excludes the path; None if none matches, as in git.

    The directories that contain the path are not excluded, so a pattern that matches one of them does not count.
    """
    for pattern in reversed(list(patterns.patterns)):
        if pattern.regex is not None and _matches(pattern.regex, path.as_posix(), is_directory):
            return bool(pattern.include)
    return None


def _matches(pattern: re.Pattern[str], name: str, is_directory: bool) -> bool:
    """Whether a pattern matches the file or directory itself, not only one of the directories that contain it."""
    is_for_directories = _END in pattern.groupindex
    if not pattern.pattern.startswith("^"):  # *, or */ for directories
        return is_directory or not is_for_directories
    match = pattern.match(f"{name}/" if is_directory and is_for_directories else name)
    return match is not None and (not is_for_directories or match.start(_END) == (len(name) if is_directory else -1))


def _parse(patterns: Sequence[str], where: str) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(patterns)
    except (ValueError, re.error) as error:
        raise CorpusError(f"{where}: {error}. Write patterns as in .gitignore, such as drafts/ or *.log.") from None

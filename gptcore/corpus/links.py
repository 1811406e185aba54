"""Find links that lead out of a directory of text.

A link that somebody put into a directory must not turn another file of the machine into training text. So links may
lead to what is in the directory that corpus.sources names, or in the store of the directory's own repository. Only the
end of all links counts.

Some tools keep the contents of files in a store, and put links to them into the directory that people use. The stores
of git-annex, DVC and Hugging Face's cache are in the repository itself. DVC's store may also be elsewhere, if
`.dvc/config` of a repository *above* the directory names it: what is in the directory cannot choose the store. There,
only files whose names are hashes of their contents are followed, as DVC names them.
"""

import os
import re
from collections.abc import Iterator
from configparser import ConfigParser, Error
from functools import cache
from pathlib import Path

from gptcore.corpus.reading import Reading, suffix_of

_DVC_NAME = re.compile(r"/(?:files/md5/)?[0-9a-f]{2}/[0-9a-f]{30}\Z")


class Borders:
    """The borders of `root`, a directory with text. Links that cross them are bad files of `reading`."""

    def __init__(self, root: Path, reading: Reading) -> None:
        self._root, self._reading = root, reading
        real_root = Path(os.path.realpath(root))
        self._inside = tuple(os.path.join(store, "") for store in (real_root, *_list_stores(real_root)))  # noqa: PTH118
        self._caches = tuple(_list_external_caches(real_root))
        self._real_directory = cache(os.path.realpath)
        self._counted: set[Path] = set()

    def are_crossed(self, path: Path) -> bool:
        """Whether a path is outside, because it or a directory that contains it is a link. The link is counted, once.

        The first link that leads out is named, so that a linked directory is one problem and not a thousand.
        """
        if self._is_inside(path):
            return False
        between = [parent for parent in path.parents if parent.is_relative_to(self._root) and parent != self._root]
        self._count(next((parent for parent in reversed(between) if not self._is_inside(parent)), path))
        return True

    def is_behind_link(self, directory: Path) -> bool:
        """Whether the directory is reached through a link that was counted."""
        return any(directory.is_relative_to(link) for link in self._counted)

    def _is_inside(self, path: Path) -> bool:
        real = self._resolve(path)
        if f"{real}{os.sep}".startswith(self._inside):
            return True
        return any(real.startswith(store) and _DVC_NAME.fullmatch(real[len(store) :]) for store in self._caches)

    def _resolve(self, path: Path) -> str:
        if path.is_symlink():
            return os.path.realpath(path)
        return os.path.join(self._real_directory(path.parent), path.name)  # noqa: PTH118

    def _count(self, link: Path) -> None:
        if link in self._counted:
            return
        self._counted.add(link)
        real = self._resolve(link)
        fix = f"Remove it, name it in corpus.exclude, or name {real} itself in corpus.sources if you want its text"
        if match := _DVC_NAME.search(real):
            fix += (
                f". If it is DVC's, run `dvc cache dir --local {real[: match.start()]}` in the repository, and name a "
                "directory inside the repository in corpus.sources"
            )
        problem = f"corpus.sources: {link} is a link that leads out of {self._root}, to {real}. {fix}."
        self._reading.add_problem(suffix_of(link.name), problem)


def _list_stores(directory: Path) -> Iterator[Path]:
    """Yield the directories in which git-annex, DVC and Hugging Face keep what is in `directory`."""
    for repository in (directory, *directory.parents):
        yield repository / ".git" / "annex" / "objects"
        yield repository / ".dvc" / "cache"
        if directory.is_relative_to(repository / "snapshots") and (repository / "refs").is_dir():
            yield repository / "blobs"  # models--gpt2/snapshots/REVISION/a.txt -> models--gpt2/blobs/HASH


def _list_external_caches(directory: Path) -> Iterator[str]:
    """Yield the real paths of the caches that the DVC repositories above `directory` name in their configuration."""
    for repository in directory.parents:
        files = [repository / ".dvc" / name for name in ("config", "config.local")]
        if not any(file.is_file() for file in files):
            continue
        config = ConfigParser(interpolation=None, strict=False, inline_comment_prefixes=("#",))
        try:
            config.read(files, encoding="utf-8")  # the second file overrides the first, as for DVC
            place = config.get("cache", "dir", fallback="").strip("\"'")
        except (Error, ValueError):  # damaged, so DVC would not use it either
            continue
        if place:
            yield os.path.realpath(repository / ".dvc" / Path(place).expanduser())

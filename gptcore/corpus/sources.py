"""Find the text of each entry of corpus.sources, and read its documents, one after another.

An entry is `python-docs`, a file, a directory, a glob, an http(s) address or an address that fsspec opens. Every file
is first copied in one state, so that an edit during the reading cannot give a text that never existed. A named file or
directory may be anywhere and may be a link. A file that a directory or a glob leads to must be inside it, or in the
store of its repository (links.py).

formats.py turns a file's bytes into documents, http.py downloads from the web, and remote.py uses fsspec.
"""

import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from gptcore.corpus import http as web
from gptcore.corpus import remote
from gptcore.corpus.encoding import encode_chunks, is_binary
from gptcore.corpus.file_types import Formats, classify, require_format
from gptcore.corpus.formats import ReadOptions, read_texts
from gptcore.corpus.ignore import NOT_REGULAR, IgnoreRules
from gptcore.corpus.links import Borders
from gptcore.corpus.reading import Reading, raise_problems, suffix_of
from gptcore.credentials import conceal, resolve, strip_secrets
from gptcore.errors import ConfigError, CorpusError
from gptcore.manifest import sha256_of

PYTHON_DOCS = "python-docs"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_PINNED = re.compile(r"sha256=([0-9a-fA-F]{64})")
_NO_HOST = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]")
_DOCS_BYTES = 465_000
_COPY_BYTES = 1024 * 1024
_IN_MEMORY_BYTES = 8 * 1024 * 1024
_TRIES = 2
_HEAD_BYTES = 8192
_MAX_REASONS = 3


@dataclass(frozen=True)
class Document:
    """One text."""

    name: str
    """Its name in lists and messages: its path, or its address without user, password and query. A row of a table also
    has its number."""
    source: str
    """The entry of corpus.sources that it came from."""
    chunks: Iterator[bytes]
    """The text, once, as UTF-8 in chunks of at most 1 MiB that end at whole characters."""
    suffix: str
    """The suffix of its file, or `python-docs`."""


@dataclass(frozen=True)
class File:
    """A file of a source, found but not yet read. It is small, and valid on any machine with the same paths."""

    source: str
    """The entry of corpus.sources that it was found through."""
    name: str
    """Its name in lists and messages."""
    filename: str
    """The suffix says the format."""
    kind: Literal["docs", "local", "web", "remote"]
    """python-docs, a local file, a download from the web, or an object that fsspec opens."""
    location: str
    """The path or the object's name."""
    num_bytes: int
    """Size of the file, compressed or not."""
    state: str = ""
    """Changes with the content. Empty if that would require reading the file."""
    is_named: bool = True
    """Whether the source names this file itself, and not a directory or a glob that leads to it."""

    @property
    def suffix(self) -> str:
        """The suffix under which reports count the file."""
        return PYTHON_DOCS if self.kind == "docs" else suffix_of(self.filename)

    def open(self, scratch: Path) -> BinaryIO:
        """Open the file's bytes in one state. A copy of a large file is put into `scratch`, without a name."""
        if self.kind == "docs":
            return io.BytesIO()
        if self.kind == "local":
            return _copy_file(Path(self.location), scratch)
        if self.kind == "web":
            return Path(self.location).open("rb")
        return remote.download(self.source, self.location, scratch)

    def read_documents(self, content: BinaryIO, options: ReadOptions) -> Iterator[Document]:
        """Yield the documents in `content`, in order. Consume the chunks of each before you ask for the next one.

        Raises CorpusError if the text cannot be used.
        """
        if self.kind == "docs":
            yield from _read_python_docs(options)
        else:
            suffix = self.suffix
            for name, chunks in read_texts(content, self.name, self.filename, options):
                yield Document(name, self.source, chunks, suffix)


class FoundFiles(NamedTuple):
    """The files of all sources, in order, and what was left out when they were found."""

    files: list[File]
    reading: Reading


def check(sources: Sequence[str], base: Path, exclude: Sequence[str] = (), formats: Formats = None) -> None:
    """Raise CorpusError with all problems of sources that cannot exist. No network is used and no text is read.

    Relative paths start at `base`; `exclude` is corpus.exclude, and `formats` is corpus.formats. The causes are a
    missing file, a glob without a match, a directory without text, a malformed address, an address of a file that is
    not read, or an environment variable that is named but not set. Directories are searched only until the first file
    that is text: `find_files` finds the other problems.
    """
    raise_problems(filter(None, (_find_problem(source, base, exclude, formats) for source in sources)))


def _find_problem(source: str, base: Path, exclude: Sequence[str], formats: Formats) -> str | None:
    """Return why a source cannot exist, or None."""
    try:
        resolve(source)
        if source == PYTHON_DOCS:
            return None
        if (scheme := scheme_of(source)) is None:
            find_local_paths(source, base, exclude, only_first=True, formats=formats)
        elif scheme in ("http", "https"):
            address, _ = parse_address(source)
            require_format(strip_secrets(address), _filename_of(address), formats)  # before it is downloaded
        else:
            remote.check(source, scheme)
    except ConfigError as error:
        return f"corpus.sources: {error}"
    except CorpusError as error:
        return str(error)
    return None


def find_files(
    sources: Sequence[str], base: Path, downloads: Path, exclude: Sequence[str] = (), formats: Formats = None
) -> FoundFiles:
    """Find the files of all sources. Files on the web are downloaded into `downloads`; no other file is read.

    Relative paths start at `base`; `exclude` is corpus.exclude, and `formats` is corpus.formats. Raises CorpusError
    with all problems of sources that cannot be used, and SourceUnavailable if a remote source does not answer.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    reading = Reading()
    local: dict[str, list[Path]] = {}
    problems: list[str | None] = []
    for source in dict.fromkeys(sources):  # before anything is downloaded
        if source == PYTHON_DOCS or scheme_of(source) is not None:
            problems.append(_find_problem(source, base, exclude, formats))
            continue
        try:
            local[source] = find_local_paths(source, base, exclude, reading, formats=formats)
        except CorpusError as error:
            problems.append(str(error))
    raise_problems(filter(None, problems))
    files: list[File] = []
    for source in sources:
        if source == PYTHON_DOCS:
            files.append(File(source, source, source, "docs", source, _DOCS_BYTES, state=sys.version))
        elif source in local:
            files += _describe_local_files(source, local[source], base)
        else:
            try:
                files += _find_remote_files(source, downloads, exclude, reading, formats)
            except CorpusError as error:
                problems.append(str(error))
    raise_problems(filter(None, problems))
    return FoundFiles(files, reading)


def scheme_of(source: str) -> str | None:
    """Return the scheme of an address, in lower case; None for a local path."""
    match = _SCHEME.fullmatch(source)
    return match[1].lower() if match else None


def parse_address(source: str) -> tuple[str, str | None]:
    """Return an http(s) source as (address, sha256 or None). Raises CorpusError if it is malformed.

    For example, `https://example.org/text.txt#sha256=HEX` gives `("https://example.org/text.txt", "hex")`.
    """
    address, _, fragment = source.partition("#")
    try:
        address.encode()
        host, _ = urlsplit(address).hostname, urlsplit(address).port
    except ValueError as error:
        raise CorpusError(f"{source!r} is not an address: {error}") from None
    if not host or _NO_HOST.search(host):
        raise CorpusError(f"{source!r} is not an address: it names no host, as in https://example.org/text.txt")
    if fragment and not _PINNED.fullmatch(fragment):
        raise CorpusError(f"{source!r}: expected #sha256= and 64 hexadecimal digits after the address")
    return address, fragment.removeprefix("sha256=").lower() or None


def _read_python_docs(options: ReadOptions) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        name = f"{PYTHON_DOCS}:{topic}"
        yield Document(name, PYTHON_DOCS, encode_chunks(text, name, options.errors), PYTHON_DOCS)


def _describe_local_files(source: str, paths: Sequence[Path], base: Path) -> Iterator[File]:
    entry = _local_path(source, base)
    is_named = len(paths) == 1 and paths[0] == entry
    root = _glob_root(entry) if not entry.exists() else entry
    for path in paths:
        location = str(path.absolute())
        name = _display_name(location, str(base), str(root))
        yield File(source, name, path.name, "local", location, _size_of(path), is_named=is_named)


def _find_remote_files(
    source: str, downloads: Path, exclude: Sequence[str], reading: Reading, formats: Formats
) -> Iterator[File]:
    if scheme_of(source) in ("http", "https"):
        address, sha256 = parse_address(source)
        body = web.download(address, sha256, downloads)
        yield File(source, strip_secrets(address), _filename_of(address), "web", str(body.absolute()), _size_of(body))
        return
    found = remote.find_objects(source, exclude, reading, formats)
    for name, info in found.objects.items():
        shown = _name_object(source if found.is_literal else found.filesystem.unstrip_protocol(name), source)
        fields = remote.select_version_fields(info)
        state = sha256_of(fields) if fields else ""
        yield File(source, shown, name, "remote", name, info.get("size") or 0, state, found.is_literal)


def _filename_of(address: str) -> str:
    return PurePosixPath(unquote(urlsplit(address).path)).name


def _name_object(address: str, source: str) -> str:
    """Return the name of an object found through `source`. A `?` or `#` without secrets belongs to the name."""
    shown = conceal(address, source)
    return strip_secrets(shown) if "${" in shown or "…" in shown else shown


def _size_of(path: Path) -> int:
    """Return the file's size, or 0 if the file has just disappeared; reading it later raises the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _display_name(path: str, base: str, root: str) -> str:
    """Return the name of a file relative to `base`; outside of it, relative to the directory that contains `root`.

    So a document has the same name on every machine and from every working directory. `root` is the file or directory
    that the source names, or the directory in which a glob searches.
    """
    path, base = os.path.normpath(path), os.path.join(os.path.abspath(base), "")  # noqa: PTH100, PTH118
    if path.startswith(base):
        return path.removeprefix(base)
    return path.removeprefix(os.path.join(os.path.dirname(os.path.abspath(root)), ""))  # noqa: PTH100, PTH118, PTH120


def find_local_paths(
    source: str,
    base: Path,
    exclude: Sequence[str] = (),
    reading: Reading | None = None,
    only_first: bool = False,
    formats: Formats = None,
) -> list[Path]:
    """Return at least one regular file, or raise CorpusError. A name that exists is literal, even with a `[` in it.

    What is left out is counted in `reading`, and so are links that lead out of the directory, as files that cannot be
    used. With `only_first`, the search ends at the first file that may be read.
    """
    try:
        return _find_local_paths(source, base, exclude, reading or Reading(), only_first, formats)
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CorpusError(f"corpus.sources: {source!r:.200} cannot be looked up: {reason}") from None


def _find_local_paths(
    source: str, base: Path, exclude: Sequence[str], reading: Reading, only_first: bool, formats: Formats
) -> list[Path]:
    path = _local_path(source, base)
    if not source.strip():
        raise CorpusError("corpus.sources: an entry is empty. Name a file, a directory, a glob or an address.")
    if path.is_file():
        return [path]
    root, own = path, Reading()
    found: Iterator[Path] = iter(())
    if path.is_dir():
        found = _find_texts_in(path, IgnoreRules(path, exclude), Borders(path, own), own, formats)
        problem = "has no file of text that may be read"
    elif any(mark in source for mark in "*?["):
        root = base / _glob_root(Path(source).expanduser())  # the name of `base` is literal
        names_hidden = any(name.startswith(".") for name in path.relative_to(root).parts)
        rules = IgnoreRules(root, exclude, includes_hidden=names_hidden)
        found = _match_glob(Path(source).expanduser(), base, rules, Borders(root, own), own, formats)
        problem = "matches no file that may be read"
    else:
        problem = "is not a regular file" if path.exists() else "does not exist"
    if only_first:
        found = islice(found, 1)
    paths = sorted(found, key=str) if path.is_dir() else sorted(found)
    if not paths:
        raise_problems(iter(own.problems))
        hint = "" if Path(source).is_absolute() else f" (looked for in {base})"
        if problem.endswith("read"):
            hint += ". Hidden files, state roots and what .gitignore or corpus.exclude names are not read"
            hint += "".join(f". {line.rstrip('.')}" for line in own.describe()[:_MAX_REASONS])
        if "[" in source and not path.is_dir():
            literal = source.replace("[", "[[]")
            hint += f". [ ] stand for one of the characters between them; for a [ in a name, write {literal!r:.200}"
        raise CorpusError(f"corpus.sources: {source!r:.200} {problem}{hint}.")
    reading.merge(own)
    return paths


def _local_path(source: str, base: Path) -> Path:
    return base / Path(source).expanduser()


def _glob_root(pattern: Path) -> Path:
    """Return the directory in which a glob searches."""
    return Path(*takewhile(lambda name: not any(mark in name for mark in "*?["), pattern.parts))


def _find_texts_in(
    directory: Path, rules: IgnoreRules, borders: Borders, reading: Reading, formats: Formats
) -> Iterator[Path]:
    seen = set()
    for parent, directories, names in os.walk(directory, onerror=_raise_unreadable, followlinks=True):
        state = os.stat(parent)  # noqa: PTH116
        # A symbolic link led back, or out of the directory, which is reported already.
        if (state.st_dev, state.st_ino) in seen or borders.is_behind_link(Path(parent)):
            directories.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        kept = []
        for name in sorted(directories):
            if rule := rules.find_rule(Path(parent, name), is_directory=True):
                reading.exclude(rule, is_directory=True)
            else:
                kept.append(name)
        directories[:] = kept
        for name in names:
            path = Path(parent, name)
            if rule := rules.find_rule(path):
                reading.exclude(rule)
            elif (file_type := classify(name, formats)).status != "read":
                reading.count(suffix_of(name), skipped=1)
            elif not path.is_file():
                reading.exclude(NOT_REGULAR)
            elif not file_type.suffix and _is_binary_file(path):
                reading.count(suffix_of(name), skipped=1)
            elif not borders.are_crossed(path):
                yield path


def _is_binary_file(path: Path) -> bool:
    """Whether a file without a suffix is a program or other binary data. False if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return is_binary(file.read(_HEAD_BYTES))
    except OSError:
        return False  # reading it later raises the error


def _raise_unreadable(error: OSError) -> None:
    raise CorpusError(f"{error.filename} cannot be searched for text: {error.strerror}.")


def _match_glob(
    pattern: Path, base: Path, rules: IgnoreRules, borders: Borders, reading: Reading, formats: Formats
) -> Iterator[Path]:
    root = Path(pattern.anchor) if pattern.is_absolute() else base
    for path in root.glob(str(pattern.relative_to(pattern.anchor))):
        if not path.is_file():
            continue
        if rule := rules.find_rule_with_parents(path):
            reading.exclude(rule)
        elif classify(path.name, formats).format is None:
            reading.count(suffix_of(path.name), skipped=1)
        elif not borders.are_crossed(path):
            yield path


def _copy_file(path: Path, scratch: Path) -> BinaryIO:
    """Return a copy of the file in one state. The file is copied once more if it changed in the meantime."""
    try:
        for _ in range(_TRIES):
            before = path.stat()
            if not stat.S_ISREG(before.st_mode):  # opening a FIFO would wait for a writer
                raise CorpusError(f"{path} is not a regular file.")
            copy = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(scratch))  # noqa: SIM115
            with path.open("rb") as file:
                shutil.copyfileobj(file, copy, _COPY_BYTES)
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                copy.seek(0)
                return cast(BinaryIO, copy)
            copy.close()
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{path} disappeared while the corpus was read.") from None
    except PermissionError:
        raise CorpusError(f"{path} cannot be read: permission denied.") from None
    raise CorpusError(
        f"{path} changed while it was read, {_TRIES} times in a row (from {before.st_size} to {after.st_size} bytes). "
        "Start again when nothing writes to it."
    )

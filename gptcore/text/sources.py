"""Where text comes from: what each entry of corpus.sources means, and the documents it gives, one after another.

An entry is `python-docs`, a file, a directory, a glob, an http(s) address or anything that fsspec opens. Every file is
first copied aside in one state, so that an edit during the reading cannot give a text that never existed. A file or
directory that is named may lie anywhere and be a link; what a directory or a glob finds stays inside of it, so that a
link planted there makes no other file of the machine a text to learn from. How a file's bytes become documents stands
in formats.py, how they come over the web in downloads.py, what fsspec opens in stored.py.
"""

import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast
from urllib.parse import unquote, urlsplit

from gptcore.errors import CorpusError
from gptcore.manifest import sha256_of
from gptcore.text import downloads as web
from gptcore.text import formats, stored
from gptcore.text.formats import Errors

PYTHON_DOCS = "python-docs"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_PINNED = re.compile(r"sha256=([0-9a-fA-F]{64})")
_NO_HOST = re.compile(r"[\s\x00-\x1f\x7f\ud800-\udfff]")
_DOCS_BYTES = 465_000
_COPY_BYTES = 1024 * 1024
_IN_MEMORY_BYTES = 8 * 1024 * 1024
_TRIES = 2


@dataclass(frozen=True)
class Document:
    """One text. `chunks` gives it once, as UTF-8 in pieces of at most 1 MiB that end at whole characters."""

    name: str
    """What it is called in lists: its path or address, with the row in a table."""
    source: str
    """The entry of corpus.sources that it came from."""
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class File:
    """A file of a source, found and not yet read: small, and good wherever the same paths and addresses are."""

    source: str
    """The entry of corpus.sources that it was found through."""
    name: str
    """What it is called in lists and messages."""
    filename: str
    """Its suffix says the format."""
    kind: Literal["docs", "local", "web", "stored"]
    """python-docs, a local file, a download that is kept, or an object that fsspec opens."""
    where: str
    """The path or the object's name."""
    num_bytes: int
    """As it is, compressed or not."""
    state: str = ""
    """Changes with the content, where that can be told without reading it."""

    def open(self, scratch: Path) -> BinaryIO:
        """Its bytes in one state. A copy of a large file is put into the directory `scratch`, without a name."""
        if self.kind == "docs":
            return io.BytesIO()
        if self.kind == "local":
            return _copy_of(Path(self.where), scratch)
        return Path(self.where).open("rb") if self.kind == "web" else stored.fetch(self.source, self.where, scratch)

    def read(self, opened: BinaryIO, errors: Errors) -> Iterator[Document]:
        """Its documents, in order; each must be consumed before the next is asked for. Raises as `documents`."""
        if self.kind == "docs":
            yield from _python_docs(errors)
        else:
            for name, chunks in formats.read(opened, self.name, self.filename, errors):
                yield Document(name, self.source, chunks)


def check(sources: Sequence[str], base: Path) -> None:
    """Whether every source can exist: no network is used and no text is read. Relative paths start at `base`.

    Raises CorpusError for a missing file, a glob without a match, a directory without text, or a malformed address.
    """
    for source in sources:
        if source == PYTHON_DOCS:
            continue
        if (scheme := scheme_of(source)) is None:
            local_paths(source, base)
        elif scheme in ("http", "https"):
            parse_address(source)
        else:
            stored.check(source, scheme)


def documents(sources: Sequence[str], base: Path, downloads: Path, errors: Errors) -> Iterator[Document]:
    """The documents of all sources, in order; each must be consumed before the next is asked for.

    Relative paths start at `base`; `downloads` keeps what comes over the web. Raises CorpusError where a source
    cannot be used and SourceUnavailable where a remote one does not answer.
    """
    yield from documents_of(files(sources, base, downloads), downloads, errors)


def documents_of(files: Iterable[File], scratch: Path, errors: Errors) -> Iterator[Document]:
    """As `documents`, of files that were found before. The directory `scratch` holds copies of large ones."""
    for file in files:
        with file.open(scratch) as opened:
            yield from file.read(opened, errors)


def files(sources: Sequence[str], base: Path, downloads: Path) -> Iterator[File]:
    """The files of all sources, in order. What lies on the web is fetched into `downloads`; no other text is read.

    Raises as `documents`.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if source == PYTHON_DOCS:
            yield File(source, source, source, "docs", source, _DOCS_BYTES, state=sys.version)
        else:
            yield from _files(source, base, downloads)


def scheme_of(source: str) -> str | None:
    """What stands before `://`, in lower case; None for a local path."""
    match = _SCHEME.fullmatch(source)
    return match[1].lower() if match else None


def parse_address(source: str) -> tuple[str, str | None]:
    """An http(s) source as (address, sha256 or None). Raises CorpusError where it is malformed."""
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


def _python_docs(errors: Errors) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        name = f"{PYTHON_DOCS}:{topic}"
        yield Document(name, PYTHON_DOCS, formats.pieces(text, name, errors))


def _files(source: str, base: Path, downloads: Path) -> Iterator[File]:
    scheme = scheme_of(source)
    if scheme is None:
        for path in local_paths(source, base):
            yield File(source, _shown(path, base), path.name, "local", str(path.absolute()), _size(path))
    elif scheme in ("http", "https"):
        address, sha256 = parse_address(source)
        filename = PurePosixPath(unquote(urlsplit(address).path)).name
        body = web.fetch(address, sha256, downloads)
        yield File(source, address, filename, "web", str(body.absolute()), _size(body))
    else:
        filesystem, found, is_literal = stored.find(source)
        for name, info in found.items():
            shown = source if is_literal else filesystem.unstrip_protocol(name)
            state = sha256_of(telling) if (telling := stored.telling(info)) else ""
            yield File(source, shown, name, "stored", name, info.get("size") or 0, state)


def _size(path: Path) -> int:
    """0 for one that has just vanished: who reads it will say so."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _shown(path: Path, base: Path) -> str:
    shown, root = str(path), os.path.join(base, "")  # noqa: PTH118
    return shown.removeprefix(root)


def local_paths(source: str, base: Path) -> list[Path]:
    """At least one regular file. A name that exists is meant literally, even with a `[` in it. Raises CorpusError."""
    try:
        return _local_paths(source, base)
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CorpusError(f"corpus.sources: {source!r:.200} cannot be looked up: {why}") from None


def _local_paths(source: str, base: Path) -> list[Path]:
    path = base / Path(source).expanduser()
    if not source.strip():
        raise CorpusError("corpus.sources: an entry is empty; name a file, a directory, a glob or an address.")
    if path.is_file():
        return [path]
    place = path
    if path.is_dir():
        found = _texts_in(path)
        missing = "holds no file that ends in .txt .md .jsonl .csv or .parquet (or these with .gz or .zst)"
    elif any(mark in source for mark in "*?["):
        found = _matches(Path(source).expanduser(), base)
        place = _before_wildcards(path)
        missing = "matches no file"
    else:
        found = []
        missing = "is not a regular file" if path.exists() else "does not exist"
    if not found:
        hint = "" if Path(source).is_absolute() else f" (looked for in {base})"
        raise CorpusError(f"corpus.sources: {source!r:.200} {missing}{hint}.")
    _check_inside(found, place)
    return found


def _before_wildcards(pattern: Path) -> Path:
    """The directory in which a glob searches."""
    return Path(*takewhile(lambda part: not any(mark in part for mark in "*?["), pattern.parts))


def _check_inside(found: list[Path], place: Path) -> None:
    real_place = os.path.join(os.path.realpath(place), "")  # noqa: PTH118
    for path in found:
        if not (real := os.path.realpath(path)).startswith(real_place):
            raise CorpusError(
                f"corpus.sources: {path} is a link that leads out of {place}, to {real}. Remove it, or name {real} "
                "itself in corpus.sources if it is meant."
            )


def _texts_in(directory: Path) -> list[Path]:
    found, seen = [], set()
    for parent, directories, names in os.walk(directory, onerror=_unreadable, followlinks=True):
        here = os.stat(parent)  # noqa: PTH116
        if (here.st_dev, here.st_ino) in seen:  # a symbolic link led back
            directories.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        directories.sort()
        found += [path for name in names if formats.is_known(name) and (path := Path(parent, name)).is_file()]
    return sorted(found, key=str)


def _unreadable(error: OSError) -> None:
    raise CorpusError(f"{error.filename} cannot be searched for text: {error.strerror}.")


def _matches(pattern: Path, base: Path) -> list[Path]:
    root = Path(pattern.anchor) if pattern.is_absolute() else base
    return sorted(path for path in root.glob(str(pattern.relative_to(pattern.anchor))) if path.is_file())


def _copy_of(path: Path, scratch: Path) -> BinaryIO:
    """The file in one state: copied, and copied once more if it changed in the meantime."""
    try:
        for _ in range(_TRIES):
            before = path.stat()
            copy = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(scratch))  # noqa: SIM115
            with path.open("rb") as file:
                shutil.copyfileobj(file, copy, _COPY_BYTES)
            after = path.stat()
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                copy.seek(0)
                return cast(BinaryIO, copy)
            copy.close()
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(f"{path} vanished while the corpus was read.") from None
    except PermissionError:
        raise CorpusError(f"{path} cannot be read: permission denied.") from None
    raise CorpusError(
        f"{path} changed while it was read, {_TRIES} times in a row (from {before.st_size} to {after.st_size} bytes); "
        "start again when nothing writes to it."
    )

"""Find, describe and download text in an object store, or in any other storage that fsspec opens.

sources.py decides which sources come here. The storages' many kinds of error become CorpusError and SourceUnavailable.
"""

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from gptcore.corpus.file_types import Formats, classify
from gptcore.corpus.ignore import IgnoreRules
from gptcore.corpus.reading import Reading, suffix_of
from gptcore.credentials import conceal, resolve
from gptcore.errors import CorpusError, GPTCoreError, SourceUnavailable

if TYPE_CHECKING:
    import fsspec

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
_REFUSED = {"reference": "the file may hold templates, which are programs"}
_VERSION_FIELD = re.compile(
    r"size|created|mtime|modified|updated|generation|e_?tag|md5|sha|blob|version|checksum|ino", re.IGNORECASE
)
_COPY_BYTES = 1024 * 1024
_IN_MEMORY_BYTES = 8 * 1024 * 1024


Objects = dict[str, dict[str, Any]]


class FoundObjects(NamedTuple):
    """The objects that a source leads to."""

    filesystem: "fsspec.AbstractFileSystem"
    objects: Objects
    """fsspec's description of each object, by name, in order."""
    is_literal: bool
    """Whether the source names a single object."""


def check(source: str, scheme: str) -> None:
    """Raise CorpusError if the source must not be opened, or if the package that opens it is not installed."""
    if reason := _REFUSED.get(scheme) or ("one address opens another" if "::" in source else None):
        raise CorpusError(f"corpus.sources: {source!r} is not opened: {reason}. Name the files themselves.")
    package = _PACKAGES.get(scheme)
    if package and not importlib.util.find_spec(package):
        raise CorpusError(f"{source!r} needs the package {package}, which is not installed: pip install {package}")


def find_objects(
    source: str, exclude: Sequence[str] = (), reading: Reading | None = None, formats: Formats = None
) -> FoundObjects:
    """Find one object, the matches of a glob, or the texts below a prefix. Raises CorpusError, SourceUnavailable.

    `exclude` is corpus.exclude, relative to the prefix, or to the part of a glob before its first pattern, and
    `formats` is corpus.formats. What is left out is counted in `reading`.
    """
    reading = Reading() if reading is None else reading
    check(source, source.partition("://")[0].lower())
    with _translate_errors(source):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(resolve(source))
        filesystem.invalidate_cache()  # a cached listing would hide new objects
        if is_literal := filesystem.isfile(path):
            objects = {path: filesystem.info(path)}
        elif any(mark in path for mark in "*?["):
            matches = filesystem.glob(path, detail=True)
            prefix, rest = _split_glob(path)
            rules = IgnoreRules(Path(), exclude, includes_hidden=rest.startswith(".") or "/." in rest)
            files = {name: info for name, info in matches.items() if info["type"] == "file"}
            kept = _select_objects(files, len(prefix), rules, reading)
            objects = {name: info for name, info in kept.items() if classify(name, formats).format}
        else:
            entries = filesystem.find(path, detail=True)
            below = {name: info for name, info in entries.items() if info["type"] == "file"}  # not a FIFO or device
            kept = _select_objects(below, len(path.rstrip("/")) + 1, IgnoreRules(Path(), exclude), reading)
            objects = {name: info for name, info in kept.items() if classify(name, formats).status == "read"}
        if not is_literal:
            for name in kept.keys() - objects.keys():
                reading.count(suffix_of(name), skipped=1)
    if not objects:
        raise CorpusError(f"corpus.sources: {source!r} does not exist, matches nothing or holds no text.")
    return FoundObjects(filesystem, dict(sorted(objects.items())), is_literal)


def _select_objects(objects: Objects, start: int, rules: IgnoreRules, reading: Reading) -> Objects:
    """Return the objects that no rule leaves out. Their names relative to the source begin at `start`."""
    found = {name: rules.find_rule_for_object(name[start:]) for name in objects}
    for rule in filter(None, found.values()):
        reading.exclude(rule)
    return {name: info for name, info in objects.items() if not found[name]}


def _split_glob(path: str) -> tuple[str, str]:
    """Return the part of a glob in which it searches, up to a slash, and the rest, which begins with a pattern."""
    first = min(path.index(mark) for mark in "*?[" if mark in path)
    start = path.rfind("/", 0, first) + 1
    return path[:start], path[start:]


def select_version_fields(info: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of fsspec's description of an object that change only if the content changes."""
    return {key: str(value) for key, value in sorted(info.items()) if _VERSION_FIELD.search(key)}


def download(source: str, name: str, scratch: Path) -> BinaryIO:
    """Download the object `name`, which was found through `source`, and return it as an open file.

    A large copy is put into the directory `scratch`, without a name. Raises CorpusError, SourceUnavailable.
    """
    copy = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(scratch))  # noqa: SIM115
    with _translate_errors(source):
        import fsspec

        filesystem, _ = fsspec.core.url_to_fs(resolve(source))
        with filesystem.open(name, "rb") as content:
            shutil.copyfileobj(content, copy, _COPY_BYTES)
    copy.seek(0)
    return cast(BinaryIO, copy)


@contextmanager
def _translate_errors(source: str) -> Iterator[None]:
    """Turn the exceptions of any storage into errors of gptcore that name the source."""
    try:
        yield
    except GPTCoreError:
        raise
    except ImportError as error:
        reason = conceal(error, source)
        raise CorpusError(f"{source!r} needs a package that is not installed: {reason}. pip install it.") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        raise CorpusError(f"{source!r} cannot be read: {conceal(error, source)}") from None
    except Exception as error:
        # `from error` would put the address with its secrets into the traceback.
        reason = conceal(error, source)
        raise SourceUnavailable(f"{source} is unavailable: {reason}. Try again later, or name a file.") from None

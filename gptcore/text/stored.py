"""Text in an object store, or whatever else fsspec opens: finding it, telling whether it changed, bringing it here."""

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from gptcore.errors import CorpusError, GPTCoreError, SourceUnavailable
from gptcore.text import formats

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
_REFUSED = {"reference": "what it reads may hold templates, which are programs"}
_TELLING = re.compile(
    r"size|created|mtime|modified|updated|generation|e_?tag|md5|sha|blob|version|checksum|ino", re.IGNORECASE
)
_COPY_BYTES = 1024 * 1024
_IN_MEMORY_BYTES = 8 * 1024 * 1024


def check(source: str, scheme: str) -> None:
    """Whether it may be opened, and what opens it is installed. Raises CorpusError."""
    if reason := _REFUSED.get(scheme) or ("one opens another" if "::" in source else None):
        raise CorpusError(f"corpus.sources: {source!r} is not opened: {reason}. Name the files themselves.")
    package = _PACKAGES.get(scheme)
    if package and not importlib.util.find_spec(package):
        raise CorpusError(f"{source!r} needs the package {package}, which is not installed: pip install {package}")


def find(source: str) -> tuple["fsspec.AbstractFileSystem", dict[str, dict[str, Any]], bool]:
    """What fsspec finds: one object, the matches of a glob, or the texts below a prefix, by name, as it describes them.

    Returned with the file system, and whether the source names a single object. Raises CorpusError, SourceUnavailable.
    """
    check(source, source.partition("://")[0].lower())
    with _storage_errors(source):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(source)
        filesystem.invalidate_cache()  # a listing kept from an earlier look would hide what is new
        if is_literal := filesystem.isfile(path):
            found = {path: filesystem.info(path)}
        elif any(mark in path for mark in "*?["):
            matches = filesystem.glob(path, detail=True)
            found = {name: info for name, info in matches.items() if info["type"] == "file"}
        else:
            found = {name: info for name, info in filesystem.find(path, detail=True).items() if formats.is_known(name)}
    if not found:
        raise CorpusError(f"corpus.sources: {source!r} does not exist, matches nothing or holds no text.")
    return filesystem, dict(sorted(found.items())), is_literal


def telling(info: Mapping[str, Any]) -> dict[str, str]:
    """What changes with the content in fsspec's description of an object; other things change without."""
    return {key: str(value) for key, value in sorted(info.items()) if _TELLING.search(key)}


def fetch(source: str, name: str, scratch: Path) -> BinaryIO:
    """The bytes of the object `name` that `source` led to. A large copy is put into `scratch`, without a name.

    Raises CorpusError, SourceUnavailable.
    """
    copy = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(scratch))  # noqa: SIM115
    with _storage_errors(source):
        import fsspec

        filesystem, _ = fsspec.core.url_to_fs(source)
        with filesystem.open(name, "rb") as opened:
            shutil.copyfileobj(opened, copy, _COPY_BYTES)
    copy.seek(0)
    return cast(BinaryIO, copy)


@contextmanager
def _storage_errors(source: str) -> Iterator[None]:
    """Every storage has exceptions of its own; they become ours, with the source they are about."""
    try:
        yield
    except GPTCoreError:
        raise
    except ImportError as error:
        raise CorpusError(f"{source!r} needs a package that is not installed: {error}. pip install it.") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        raise CorpusError(f"{source!r} cannot be read: {error}") from None
    except Exception as error:
        raise SourceUnavailable(f"{source} is unavailable: {error}. Try again later, or name a file.") from error

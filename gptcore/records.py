"""Read small files that outlive a process: records in JSON, and locks.

A power cut, another release or another program may have left anything at their paths. A damaged record counts as
missing. A path that is not a regular file is refused before it is read, because a named pipe would block forever.
`manifest.write_atomically` writes such files.
"""

import errno
import os
import stat
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from gptcore.errors import GPTCoreError

T = TypeVar("T")


class NotAFile(GPTCoreError):
    """A path is a directory, a named pipe, a socket or a device instead of a file."""


def read_bytes(path: Path) -> bytes:
    """Return the contents of a regular file. Raises FileNotFoundError and NotAFile."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


def open_lock(path: Path) -> IO[str]:
    """Open a lock file, which is created if it is missing. Raises NotAFile."""
    return open(path, "a+", opener=open_regular)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file without waiting: an `opener` for `open`. Raises NotAFile."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # the open of a named pipe would wait
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ENXIO):  # ENXIO: a socket
            raise
    raise NotAFile(f"{path} is not a regular file, but gptflow keeps one there. Move it away.")


def read_record(path: Path, kind: type[T]) -> T | None:
    """Return the record in a file; None if the file is missing, or if `parse_record` returns None. Raises NotAFile."""
    try:
        return parse_record(read_bytes(path), kind)
    except FileNotFoundError:
        return None


def parse_record(data: bytes | str, kind: type[T]) -> T | None:
    """Return JSON as a dataclass or another type; None if it is damaged, lacks a field or has other types."""
    try:
        return _adapter(cast(Any, kind)).validate_json(data)
    except ValidationError:
        return None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

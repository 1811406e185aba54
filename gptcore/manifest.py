"""Directories that are complete or do not exist.

Every step of the pipeline leaves a directory behind: a corpus snapshot, token files, a checkpoint, an evaluation. Each
is filled under a temporary name beside its goal; its manifest (size and sha256 of every file) is written last; all of
it is flushed to disk; and one rename commits it. A process killed in between leaves a `.tmp-` directory that nobody
reads and that the next one sweeps up. No step needs clean-up code to be correct.

    {"format": 7, "sha256": of this text without the digest, "files": {name: {"bytes", "sha256"}}, "about": {...}}
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptcore.errors import CheckpointError, DiskFull, NewerFormat

MANIFEST = "manifest.json"
FORMAT = 7
"""What is written. One flipped bit makes no larger digit of a 7, and no 1: damage never passes for another format."""
_UNSEALED = 1
"""The only earlier format, without a checksum of the manifest itself. It is still read."""
TEMPORARY = ".tmp-"
"""How the names of half-made directories begin."""
_STALE_SECONDS = 24 * 3600


def sha256_of(value: Any) -> str:
    """Hex sha256 of `value` as canonical JSON (sorted keys, no spaces): equal values have equal hashes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A temporary directory inside `parent`, removed on exit unless `commit` has renamed it away.

    Raises DiskFull, with the bytes written and free, if what fills the directory runs out of space.
    """
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    try:
        with full_disk_named(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def full_disk_named(directory: Path) -> Iterator[None]:
    """Turns the lack of space into DiskFull, with the bytes that `directory` holds so far and those that are free."""
    try:
        yield
    except Exception as error:
        if is_out_of_space(error):
            raise DiskFull(_out_of_space(directory)) from None
        raise


def is_out_of_space(error: BaseException) -> bool:
    """Whether the system had no room for what was to be written."""
    # safetensors reports the operating system's errors in its own class, by number.
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or f"os error {errno.ENOSPC}" in str(error)


def _out_of_space(directory: Path) -> str:
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory.parent).free
    return (
        f"the disk that holds {directory.parent} is full: more than the {written:,} bytes written so far are needed "
        f"and {free:,} are free. Nothing that was complete is lost. Free space, then run the same command again."
    )


def commit(staged: Path, goal: Path, about: Mapping[str, Any]) -> Path:
    """Writes the manifest into `staged`, flushes everything and renames it to `goal`.

    `about` is what the directory is about, as JSON; it is kept in the manifest. If `goal` exists already, it was made
    from the same inputs: it stays, and what was staged is dropped by `staging`.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as threads:  # hashing keeps a core busy and flushing the disk
        entries = list(threads.map(_flushed_entry, files))
    listed = {path.relative_to(staged).as_posix(): entry for path, entry in zip(files, entries)}
    (staged / MANIFEST).write_text(_sealed({"files": listed, "about": dict(about)}))
    for path in [staged / MANIFEST, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        flush(path)
    return _publish(staged, goal)


def adopt(staged: Path, goal: Path) -> Path:
    """Renames `staged`, a copy of a committed directory from elsewhere with its manifest, to `goal`.

    Raises CheckpointError, and publishes nothing, if a file is not what the manifest says.
    """
    verify(staged)
    for path in [*(p for p in staged.rglob("*")), staged]:
        flush(path)
    return _publish(staged, goal)


def _publish(staged: Path, goal: Path) -> Path:
    staged.chmod(0o755)
    goal.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.rename(goal)
    except OSError:
        if not is_committed(goal):
            raise
    flush(goal.parent)
    return goal


def _flushed_entry(path: Path) -> dict[str, Any]:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _sealed(body: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, "sha256": "", **body}, indent=1, allow_nan=False) + "\n"
    return text.replace('"sha256": ""', f'"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"', 1)


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_committed(directory: Path) -> bool:
    """Whether `directory` was published whole. (The rename is the commit, so the manifest's presence is enough.)"""
    return (directory / MANIFEST).is_file()


def about(directory: Path) -> dict[str, Any]:
    """What the manifest says the directory is about. Raises CheckpointError where there is no readable manifest."""
    return _read(directory)["about"]


def names(directory: Path) -> list[str]:
    """The files that the manifest lists. Raises CheckpointError as `about` does, and if one leads out of it."""
    listed = list(_read(directory)["files"])
    for name in listed:
        _check_inside(directory, name)
    return listed


def verify(directory: Path) -> dict[str, Any]:
    """Checks size and sha256 of every file against the manifest and returns `about`.

    Raises CheckpointError naming the first file that is missing or altered. Files that are not listed do not count.
    """
    body = _read(directory)
    for name, listed in body["files"].items():
        _check_inside(directory, name)
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {directory / MANIFEST} lists it.")
        if (size := path.stat().st_size) != listed["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, its manifest says {listed['bytes']}: it was altered.")
        if (digest := sha256_of_file(path)) != listed["sha256"]:
            raise CheckpointError(f"{path} has sha256 {digest}, its manifest says {listed['sha256']}: it was altered.")
    return body["about"]


def _check_inside(directory: Path, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{directory / MANIFEST} lists {name!r}, which leads out of it: it was altered.")


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
        body = json.loads(data)
        if (number := body["format"]) > FORMAT:
            raise NewerFormat(
                f"{path} has format {number}, this release reads formats {_UNSEALED} and {FORMAT}: a newer release "
                "made it. Use that one."
            )
        if number != _UNSEALED:
            _check_seal(data, body)
        if not isinstance(body["files"], dict) or not isinstance(body["about"], dict):
            raise TypeError("'files' and 'about' must be objects")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} has no {MANIFEST}: it was never completed.") from None
    except (ValueError, KeyError, TypeError, RecursionError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return body


def _check_seal(data: bytes, body: Mapping[str, Any]) -> None:
    if body["format"] != FORMAT:
        raise ValueError(f"there is no format {body['format']}")
    digest = hashlib.sha256(data.replace(str(body["sha256"]).encode(), b"", 1)).hexdigest()
    if digest != body["sha256"]:
        raise ValueError(f"its text has sha256 {digest}, and says {body['sha256']}")


def remove(directory: Path) -> None:
    """Removes a committed directory such that it is whole or gone at every instant."""
    doomed = directory.with_name(f"{TEMPORARY}removed-{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path, older_than_seconds: float = _STALE_SECONDS) -> None:
    """Removes what killed processes left half-made inside `parent`, from a certain age on."""
    for leftover in stale(parent, older_than_seconds):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def stale(parent: Path, older_than_seconds: float = _STALE_SECONDS) -> list[Path]:
    """What `sweep` would remove."""
    found = []
    for leftover in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= older_than_seconds:
                found.append(leftover)
    return found

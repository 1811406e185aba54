"""Directories and small files that are complete or do not exist.

Every step of the pipeline writes a directory: a corpus snapshot, token files, a checkpoint, an evaluation. The step
fills it under a temporary name in the same parent directory. `commit` then writes the manifest, which has the size and
sha256 of every file, flushes everything to disk, and renames the directory. A killed process leaves a `.tmp-` directory
that nothing reads and that the next process removes. So no step needs clean-up code to be correct. Example:

    def fill(staged: Path) -> dict[str, Any]:
        (staged / "scores.json").write_text(scores)
        return {"kind": "evaluation"}

    manifest.make_once(parent / name, fill)

The manifest, whose own sha256 is that of its text without the digest:

    {"format": 7, "sha256": "...", "files": {"scores.json": {"bytes": 12, "sha256": "..."}}, "about": {...}}

What each directory holds is up to the modules that write it. A file that changes, such as a record of what is running,
has no manifest: see `write_atomically`.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptcore.errors import CheckpointError, DiskFull, NewerFormat
from gptcore.progress import LOGGER
from gptcore.records import NotAFile, read_bytes

MANIFEST = "manifest.json"
FORMAT = 7
"""The format that this release writes. A flipped bit turns a 7 neither into a 1 nor into a larger digit, so a damaged
manifest never passes for one of another format."""
_UNSEALED = 1
"""The only earlier format: it has no checksum of the manifest itself. This release still reads it."""
TEMPORARY = ".tmp-"
"""Prefix of the names of incomplete directories."""
_STALE_SECONDS = 24 * 3600


def sha256_of(value: Any) -> str:
    """Return the hex sha256 of `value` as canonical JSON (sorted keys, no spaces). Equal values have equal hashes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes. Reads a little of the file at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_once(target: Path, fill: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Make the directory `target` unless it is committed and intact. Return `target`.

    Verifies an existing directory, and makes a damaged one again, with a warning in the log. `fill` writes the files
    into the staged directory that it gets, and returns the `about` of `commit`. Raises DiskFull as `stage` does.
    """
    set_aside_damaged(target)
    if not is_committed(target):
        with stage(target.parent) as staged:
            commit(staged, target, fill(staged))
    return target


def set_aside_damaged(directory: Path) -> None:
    """Rename a committed directory to a temporary name, with a warning in the log, if a file is missing or altered.

    Raises NewerFormat if a newer release wrote it.
    """
    if not is_committed(directory):
        return
    try:
        verify(directory)
    except NewerFormat:
        raise
    except CheckpointError as error:
        LOGGER.warning("%s The directory is set aside and made again.", error, extra={"step": "repair"})
        with contextlib.suppress(FileNotFoundError):  # another process has set it aside meanwhile
            set_aside(directory)


@contextlib.contextmanager
def stage(parent: Path) -> Iterator[Path]:
    """Make a temporary directory inside `parent`, and remove it on exit unless `commit` or `adopt` has renamed it.

    Raises DiskFull, with the bytes written and the bytes free, if the code inside runs out of disk space.
    """
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    try:
        with report_full_disk(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def report_full_disk(directory: Path) -> Iterator[None]:
    """Raise DiskFull, with the bytes that `directory` holds so far and the bytes free, if the code inside lacks space.

    Other exceptions pass.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_space(error):
            raise DiskFull(_describe_full_disk(directory)) from None
        raise


def is_out_of_space(error: BaseException) -> bool:
    """Whether the error says that the disk or the quota is full."""
    # safetensors reports the operating system's errors in its own class, with their numbers.
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or f"os error {errno.ENOSPC}" in str(error)


def _describe_full_disk(directory: Path) -> str:
    written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory.parent).free
    return (
        f"the disk that holds {directory.parent} is full: more than the {written:,} bytes written so far are needed "
        f"and {free:,} are free. Nothing that was complete is lost. Free space, then run the same command again."
    )


def commit(staged: Path, target: Path, about: Mapping[str, Any]) -> Path:
    """Write the manifest into `staged`, flush everything to disk, rename `staged` to `target` and return `target`.

    `about` describes the directory as an object for JSON; the manifest keeps it. If `target` exists already, it was
    made from the same inputs: `target` stays, and `stage` removes `staged`.
    """
    _write_manifest(staged, about, _flush_and_hash)
    for path in [staged / MANIFEST, *(p for p in staged.rglob("*") if p.is_dir()), staged]:
        flush(path)
    return _publish(staged, target)


def seal(directory: Path, about: Mapping[str, Any]) -> str:
    """Write the manifest of all files in `directory`, and return the manifest's own sha256.

    Nothing is flushed or renamed, because another program, such as MLflow, stores and publishes the directory.
    """
    return _write_manifest(directory, about, _hash)


def adopt(staged: Path, target: Path) -> Path:
    """Check and flush `staged`, rename it to `target` and return `target`.

    `staged` is a copy of a directory that was committed elsewhere, with its manifest. Raises CheckpointError, and
    publishes nothing, if a file differs from the manifest.
    """
    verify(staged)
    for path in [*(p for p in staged.rglob("*")), staged]:
        flush(path)
    return _publish(staged, target)


def _publish(staged: Path, target: Path) -> Path:
    staged.chmod(0o755)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.rename(target)
    except OSError:
        if not is_committed(target):
            raise
    flush(target.parent)
    return target


def _write_manifest(directory: Path, about: Mapping[str, Any], make_entry: Callable[[Path], dict[str, Any]]) -> str:
    """Write the manifest of all files in `directory`, with the entries that `make_entry` returns. Return its sha256."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    with ThreadPoolExecutor() as threads:  # hashing uses the CPU while flushing uses the disk
        entries = list(threads.map(make_entry, files))
    listed = {path.relative_to(directory).as_posix(): entry for path, entry in zip(files, entries)}
    body = {"format": FORMAT, "sha256": "", "files": listed, "about": dict(about)}
    text = json.dumps(body, indent=1, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_text(text.replace('"sha256": ""', f'"sha256": "{digest}"', 1))
    return digest


def _hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _flush_and_hash(path: Path) -> dict[str, Any]:
    flush(path)
    return _hash(path)


def flush(path: Path) -> None:
    """Force a file or a directory to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, all of it or nothing. The directory must exist.

    A reader finds the old content or the new one, even after a power cut: the file is flushed to disk under a temporary
    name in the same directory before the rename, and the directory after it.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def is_committed(directory: Path) -> bool:
    """Whether `directory` is complete. The rename is the commit, so the presence of the manifest is enough."""
    return (directory / MANIFEST).is_file()


def read_about(directory: Path) -> dict[str, Any]:
    """Return the `about` that was given to `commit`. Raises CheckpointError if no manifest can be read."""
    return _read(directory)["about"]


def read_sha256(directory: Path) -> str:
    """Return the manifest's own sha256. Raises CheckpointError if no manifest with a checksum can be read."""
    body = _read(directory)
    if body["format"] == _UNSEALED:
        raise CheckpointError(f"{directory / MANIFEST} has format {_UNSEALED}, which has no sha256 of its own.")
    return str(body["sha256"])


def list_files(directory: Path) -> list[str]:
    """Return the names of the files that the manifest lists, relative to `directory`.

    Raises CheckpointError if no manifest can be read, or if a name leads out of the directory.
    """
    listed = list(_read(directory)["files"])
    for name in listed:
        _check_inside(directory, name)
    return listed


def verify(directory: Path) -> dict[str, Any]:
    """Check size and sha256 of every file against the manifest and return its `about`.

    Raises CheckpointError with the first file that is missing or altered. Ignores files that the manifest does not
    list.
    """
    body = _read(directory)
    for name, listed in body["files"].items():
        _check_inside(directory, name)
        _compare(directory / name, listed)
    return body["about"]


def verify_file(directory: Path, name: str, path: Path) -> None:
    """Check size and sha256 of `path` against the entry `name` of the manifest in `directory`.

    Raises CheckpointError if the file is missing, altered or not listed, or if no manifest can be read.
    """
    listed = _read(directory)["files"].get(name)
    if listed is None:
        raise CheckpointError(f"{directory / MANIFEST} does not list {name}: it was altered.")
    _compare(path, listed)


def _compare(path: Path, listed: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the file is not the one that the manifest's entry describes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though its manifest lists it.")
    if (size := path.stat().st_size) != listed["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {listed['bytes']}: it was altered.")
    if (digest := sha256_of_file(path)) != listed["sha256"]:
        raise CheckpointError(f"{path} has sha256 {digest}, its manifest says {listed['sha256']}: it was altered.")


def _check_inside(directory: Path, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{directory / MANIFEST} lists {name!r}, which leads out of it: it was altered.")


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        data = read_bytes(path)
        body = json.loads(data)
        if (number := body["format"]) > FORMAT:
            raise NewerFormat(
                f"{path} has format {number}, this release reads formats {_UNSEALED} and {FORMAT}: a newer release "
                "made it. Use the newer release."
            )
        if number != _UNSEALED:
            _check_seal(data, body)
        if not isinstance(body["files"], dict) or not isinstance(body["about"], dict):
            raise TypeError("'files' and 'about' must be objects")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} has no {MANIFEST}: the directory was never completed.") from None
    except (ValueError, KeyError, TypeError, RecursionError, NotAFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return body


def _check_seal(data: bytes, body: Mapping[str, Any]) -> None:
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']} does not exist")
    digest = hashlib.sha256(data.replace(str(body["sha256"]).encode(), b"", 1)).hexdigest()
    if digest != body["sha256"]:
        raise ValueError(f"its text has sha256 {digest}, but it says {body['sha256']}")


def remove(directory: Path) -> None:
    """Remove a committed directory. At every instant the directory is complete or gone."""
    shutil.rmtree(set_aside(directory), ignore_errors=True)


def set_aside(directory: Path) -> Path:
    """Rename a committed directory to a temporary name, and return the new path. Open files stay readable.

    The time does not depend on the number of files. `sweep` removes the directory if the caller does not.
    """
    doomed = directory.with_name(f"{TEMPORARY}removed-{directory.name}")
    if doomed.exists():  # a killed process left it
        doomed = doomed.with_name(f"{doomed.name}-{secrets.token_hex(4)}")
    return directory.rename(doomed)


def sweep(parent: Path, older_than_seconds: float = _STALE_SECONDS) -> None:
    """Remove what killed processes left incomplete inside `parent`, if it is old enough."""
    for leftover in list_stale(parent, older_than_seconds):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def list_stale(parent: Path, older_than_seconds: float = _STALE_SECONDS) -> list[Path]:
    """List what `sweep` would remove."""
    leftovers = []
    for leftover in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime >= older_than_seconds:
                leftovers.append(leftover)
    return leftovers

"""The object store that mirrors what is complete in the state root, so that another machine can resume from it.

An object store has no rename. A committed directory (gptcore.manifest) becomes visible by one conditional write:

    PREFIX/state/<directory>/manifest.json          written last, and only if there is none (If-None-Match: *)
    PREFIX/state/<directory>/<seal>/<file>          before it; the seal is the beginning of that manifest's sha256

So a directory without a manifest object does not exist, even if a machine dies in the middle of an upload. If two
machines upload the same directory, one of them publishes all of it, and the other adopts that. The files of the second
have another seal, until `sweep` removes them by age. A small object that changes is written only if no other machine
changed it since it was read (If-Match). A downloaded directory is verified against its manifest before it is committed
here.

boto3 finds the credentials (AWS_* variables, a profile, a role); this module never reads them. Which directories are
mirrored, and when, is decided in flows/retrain/mirror.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptcore import manifest
from gptcore.errors import CheckpointError, GPTCoreError, SourceUnavailable
from gptcore.manifest import MANIFEST

_SEAL = r"[0-9a-f]{16}"
_STALE = timedelta(days=1)
_PROBE = "probe"
_THREADS = 8


class StoreUnreachable(SourceUnavailable):
    """The object store does not answer."""


class StoreRefused(GPTCoreError):
    """The object store refuses access, or lacks something that gptflow needs."""

    exit_code = 2


class ObjectChanged(GPTCoreError):
    """Another machine has written the object since it was read."""


@dataclass(frozen=True)
class StoredObject:
    """A small object as it was read."""

    body: bytes
    etag: str


@dataclass(frozen=True)
class Store:
    """The objects below `url`, s3://BUCKET/PREFIX. Keys are given without PREFIX/state/."""

    url: str

    @property
    def bucket(self) -> str:
        return urlsplit(self.url).netloc

    def key(self, relative: str) -> str:
        """Return the whole key of a path in the state."""
        return "/".join(filter(None, (urlsplit(self.url).path.strip("/"), "state", relative)))

    def check(self) -> None:
        """Check that the bucket exists and that the store honours conditional writes.

        Raises StoreRefused or StoreUnreachable.
        """
        self.check_reachable()
        for _ in range(2):  # the second write must fail
            if not self._put(_PROBE, b"", IfNoneMatch="*"):
                return
        raise StoreRefused(
            f"the object store of {self.url} ignores the condition of a write (If-None-Match), without which two "
            "machines could publish different halves of one directory. Upgrade it, or use another one."
        )

    def check_reachable(self) -> None:
        """Check that the bucket exists. Raises StoreRefused or StoreUnreachable."""
        with self._translate_errors("be reached"):
            _client().head_bucket(Bucket=self.bucket)

    def push(self, directory: Path, relative: str, check_allowed: Callable[[], None] = lambda: None) -> bool:
        """Publish a committed directory. Return False if there is a published directory of this name, which stays.

        `check_allowed` is called right before the directory becomes visible, and raises if it must not.
        """
        if self.read(f"{relative}/{MANIFEST}") is not None:
            return False
        text = (directory / MANIFEST).read_bytes()
        seal = _seal(text)
        names = json.loads(text)["files"]
        for name in names:
            self.upload(directory / name, f"{relative}/{seal}/{name}")
        if missing := {f"{relative}/{seal}/{name}" for name in names} - set(self.list_keys(f"{relative}/{seal}/")):
            raise StoreUnreachable(
                f"{self.url}: {min(missing)} was removed during the upload. Run the same command again."
            )
        check_allowed()
        return self._put(f"{relative}/{MANIFEST}", text, IfNoneMatch="*")

    def pull(self, relative: str, target: Path) -> bool:
        """Download a published directory and commit it as `target`. Return False if it is not in the store.

        An existing `target` stays. Raises CheckpointError if the directory in the store is damaged.
        """
        if manifest.is_committed(target):
            return True
        published = self.read(f"{relative}/{MANIFEST}")
        if published is None:
            return False
        with manifest.stage(target.parent) as staged:
            (staged / MANIFEST).write_bytes(published.body)
            for name in manifest.list_files(staged):
                path = staged / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.download(f"{relative}/{_seal(published.body)}/{name}", path)
            manifest.adopt(staged, target)
        return True

    def list_directories(self, relative: str) -> list[str]:
        """Return the names of the published directories directly below `relative`, sorted."""
        names = {key.removeprefix(f"{relative}/") for key, _ in self._list_objects(f"{relative}/")}
        return sorted(name.removesuffix(f"/{MANIFEST}") for name in names if re.fullmatch(rf"[^/]+/{MANIFEST}", name))

    def remove(self, relative: str) -> None:
        """Remove a published directory. Its manifest goes first, so that a reader finds all of it or nothing."""
        self.delete(f"{relative}/{MANIFEST}")
        for key, _ in list(self._list_objects(f"{relative}/")):
            self.delete(key)

    def unpublish(self, directories: Sequence[str]) -> None:
        """Remove the manifests of published directories, which hides the directories. `remove` deletes the rest."""
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda relative: self.delete(f"{relative}/{MANIFEST}"), directories))

    def sweep(self, older_than: timedelta = _STALE) -> list[str]:
        """Remove old files of killed or late uploads, which have the seal of no manifest. Return their keys."""
        objects = dict(self._list_objects(""))
        seals: dict[str, str | None] = {}
        removed = []
        for key, modified in objects.items():
            match = re.fullmatch(rf"(.+?)/({_SEAL})/(?!{MANIFEST}$).+", key)
            if match is None or datetime.now(UTC) - modified < older_than:
                continue
            directory, seal = match.groups()
            if directory not in seals:
                published = self.read(f"{directory}/{MANIFEST}") if f"{directory}/{MANIFEST}" in objects else None
                seals[directory] = _seal(published.body) if published else None
            if seals[directory] != seal:
                self.delete(key)
                removed.append(key)
        return removed

    def read(self, relative: str) -> StoredObject | None:
        """Read a small object; None if it does not exist."""
        with self._translate_errors("be read"):
            try:
                answer = _client().get_object(Bucket=self.bucket, Key=self.key(relative))
            except _client().exceptions.NoSuchKey:
                return None
            return StoredObject(answer["Body"].read(), answer["ETag"])

    def write(self, relative: str, body: bytes, before: StoredObject | None) -> None:
        """Write a small object that was `before` when it was read. Raises ObjectChanged if it has changed since."""
        condition = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before.etag}
        if not self._put(relative, body, **condition):
            raise ObjectChanged(
                f"{self.url}: {relative} was changed by another machine meanwhile. Nothing was written."
            )

    def put(self, relative: str, body: bytes) -> None:
        """Write a small object, and replace an existing one."""
        self._put(relative, body)

    def delete(self, relative: str) -> None:
        """Remove an object, if it exists."""
        with self._translate_errors("be written"):
            _client().delete_object(Bucket=self.bucket, Key=self.key(relative))

    def _put(self, relative: str, body: bytes, **condition: str) -> bool:
        """Write an object, and return whether the condition held."""
        from botocore.exceptions import ClientError

        with self._translate_errors("be written"):
            try:
                _client().put_object(Bucket=self.bucket, Key=self.key(relative), Body=body, **condition)
            except ClientError as error:
                # 409: another conditional write of the same object was under way, and it won.
                if condition and _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "404"):
                    return False
                raise
        return True

    def upload(self, path: Path, relative: str) -> None:
        """Write a file, in parts if it is large, and replace an existing object."""
        with self._translate_errors("be written"):
            _client().upload_file(str(path), self.bucket, self.key(relative))

    def download(self, relative: str, path: Path) -> None:
        """Read an object into a file. Raises CheckpointError if the object does not exist."""
        from botocore.exceptions import ClientError

        with self._translate_errors("be read"):
            try:
                _client().download_file(self.bucket, self.key(relative), str(path))
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey"):
                    raise
                raise CheckpointError(f"{self.url}: {self.key(relative)} is missing, though it is listed.") from None

    def list_keys(self, prefix: str) -> list[str]:
        """Return every key that begins with `prefix`."""
        return [key for key, _ in self._list_objects(prefix)]

    def list_times(self, prefix: str) -> dict[str, datetime]:
        """Return when the object of every key that begins with `prefix` was written."""
        return dict(self._list_objects(prefix))

    def _list_objects(self, prefix: str) -> Iterator[tuple[str, datetime]]:
        """Yield every key that begins with `prefix`, without PREFIX/state/, and when its object was written."""
        own = self.key("")
        with self._translate_errors("be listed"):
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{own}/{prefix}")
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(f"{own}/"), entry["LastModified"]

    @contextmanager
    def _translate_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except GPTCoreError:
            raise
        except Exception as error:
            if (translated := translate_error(error, self.url, action)) is None:
                raise
            raise translated from None


def translate_error(error: BaseException, url: str, action: str = "be used") -> GPTCoreError | None:
    """Return an error of boto3 as one of this module's errors; None if it is not an error of boto3.

    `action` completes the message "the object store URL cannot ...".
    """
    if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
        return None
    message = str(error).strip().partition("\n")[0]
    beginning = f"the object store {url} cannot {action}: {message}."
    code = _code(error)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError"):
        return StoreRefused(f"{beginning} Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    if code in ("NoSuchBucket", "404") or "NoSuchBucket" in message:
        return StoreRefused(f"{beginning} Create the bucket, or name another one.")
    if code in ("NotImplemented", "501"):
        return StoreRefused(
            f"{beginning} It must support conditional writes (If-None-Match, If-Match), which make publication atomic. "
            "Amazon's store does, and so do new releases of MinIO's and Ceph's. Upgrade it, or use another one."
        )
    if code in ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch") or (
        "AccessDenied" in message or "Forbidden" in message
    ):
        fix = "Allow s3:ListBucket, GetObject, PutObject and DeleteObject, or fix AWS_* in the environment."
        return StoreRefused(f"{beginning} {fix}")
    return StoreUnreachable(f"{beginning} Start it, or fix AWS_ENDPOINT_URL. Complete work is safe.")


def _code(error: BaseException) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _seal(manifest_text: bytes) -> str:
    return hashlib.sha256(manifest_text).hexdigest()[:16]


@lru_cache(maxsize=1)
def _client() -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError:
        raise StoreRefused("an object store needs a client: pip install 'gptflow[s3]'") from None
    patience = Config(connect_timeout=10, read_timeout=60)
    return Session().client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"), config=patience)

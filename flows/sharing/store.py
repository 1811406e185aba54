"""The object store that mirrors what is complete in the state root, so that another machine can go on with it.

There is no rename there. A committed directory (gptcore.manifest) becomes visible by one conditional write:

    PREFIX/state/<directory>/manifest.json          written last, and only if there is none (If-None-Match: *)
    PREFIX/state/<directory>/<seal>/<file>          before it; the seal is the beginning of that manifest's sha256

So a directory without a manifest object does not exist, whoever dies in the middle of an upload; of two that upload the
same one, one wins whole and the other adopts it; and what a loser leaves lies apart, until `sweep` removes it by age.
A small object that changes is written only if nobody changed it since it was read (If-Match). A directory that comes
back is verified against its manifest before it is committed here.

Credentials are those of boto3: AWS_* variables, a profile, a role. They are never read here.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
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


class StoreAway(SourceUnavailable):
    """The object store does not answer."""


class StoreRefuses(GPTCoreError):
    """The object store does not let us in, or lacks what is needed."""

    exit_code = 2


class Changed(GPTCoreError):
    """Somebody else has written the object since it was read."""


@dataclass(frozen=True)
class Object:
    """A small object as it was read."""

    body: bytes
    etag: str


@dataclass(frozen=True)
class Store:
    """What lies below `url`, s3://BUCKET/PREFIX."""

    url: str

    @property
    def bucket(self) -> str:
        return urlsplit(self.url).netloc

    def key(self, relative: str) -> str:
        """The whole key of what lies in the state."""
        return "/".join(filter(None, (urlsplit(self.url).path.strip("/"), "state", relative)))

    def check(self) -> None:
        """Makes sure that the bucket is there and that conditions are kept. Raises StoreRefuses or StoreAway."""
        self.answers()
        for _ in range(2):  # whoever comes second must be told so
            if not self._put(_PROBE, b"", IfNoneMatch="*"):
                return
        raise StoreRefuses(
            f"the object store of {self.url} ignores the condition of a write (If-None-Match), without which two "
            "machines could publish different halves of one directory. Upgrade it, or use another one."
        )

    def answers(self) -> None:
        """Looks whether the bucket is there. Raises StoreRefuses or StoreAway."""
        with self._explained("be looked at"):
            _client().head_bucket(Bucket=self.bucket)

    def push(self, directory: Path, relative: str, allowed: Callable[[], None] = lambda: None) -> bool:
        """Publishes a committed directory; False if somebody has published one of this name, which stays.

        `allowed` is asked right before it becomes visible, and raises if it must not.
        """
        if self.read(f"{relative}/{MANIFEST}") is not None:
            return False
        text = (directory / MANIFEST).read_bytes()
        seal = _seal(text)
        listed = json.loads(text)["files"]
        for name in listed:
            self.upload(directory / name, f"{relative}/{seal}/{name}")
        if missing := {f"{relative}/{seal}/{name}" for name in listed} - set(self.keys(f"{relative}/{seal}/")):
            raise StoreAway(f"{self.url}: {min(missing)} was removed during the upload. Run the same command again.")
        allowed()
        return self._put(f"{relative}/{MANIFEST}", text, IfNoneMatch="*")

    def pull(self, relative: str, goal: Path) -> bool:
        """Commits a published directory as `goal`; False where there is none. Raises CheckpointError if it is damaged.

        A `goal` that is there already stays.
        """
        if manifest.is_committed(goal):
            return True
        found = self.read(f"{relative}/{MANIFEST}")
        if found is None:
            return False
        with manifest.staging(goal.parent) as staged:
            (staged / MANIFEST).write_bytes(found.body)
            for name in manifest.names(staged):
                path = staged / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.download(f"{relative}/{_seal(found.body)}/{name}", path)
            manifest.adopt(staged, goal)
        return True

    def names(self, relative: str) -> list[str]:
        """The published directories directly below `relative`, sorted."""
        found = {key.removeprefix(f"{relative}/") for key, _ in self._listed(f"{relative}/")}
        return sorted(name.removesuffix(f"/{MANIFEST}") for name in found if re.fullmatch(rf"[^/]+/{MANIFEST}", name))

    def remove(self, relative: str) -> None:
        """Removes a published directory: its manifest first, so that it is whole or gone."""
        self.delete(f"{relative}/{MANIFEST}")
        for key, _ in list(self._listed(f"{relative}/")):
            self.delete(key)

    def sweep(self, older_than: timedelta = _STALE) -> list[str]:
        """Removes what killed or late uploads left, from an age on: files under no seal. Returns their keys."""
        every = dict(self._listed(""))
        seals: dict[str, str | None] = {}
        left = []
        for key, modified in every.items():
            inside = re.fullmatch(rf"(.+?)/({_SEAL})/(?!{MANIFEST}$).+", key)
            if inside is None or datetime.now(UTC) - modified < older_than:
                continue
            directory, seal = inside.groups()
            if directory not in seals:
                found = self.read(f"{directory}/{MANIFEST}") if f"{directory}/{MANIFEST}" in every else None
                seals[directory] = _seal(found.body) if found else None
            if seals[directory] != seal:
                self.delete(key)
                left.append(key)
        return left

    def read(self, relative: str) -> Object | None:
        """A small object; None where there is none."""
        with self._explained("be read"):
            try:
                answer = _client().get_object(Bucket=self.bucket, Key=self.key(relative))
            except _client().exceptions.NoSuchKey:
                return None
            return Object(answer["Body"].read(), answer["ETag"])

    def write(self, relative: str, body: bytes, before: Object | None) -> None:
        """Writes a small object that was as `before` when it was read. Raises Changed if it is not so any more."""
        condition = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before.etag}
        if not self._put(relative, body, **condition):
            raise Changed(f"{self.url}: {relative} was changed by another machine meanwhile. Nothing was written.")

    def put(self, relative: str, body: bytes) -> None:
        """Writes a small object, whatever was there."""
        self._put(relative, body)

    def delete(self, relative: str) -> None:
        """Removes an object; also where there is none."""
        with self._explained("be written"):
            _client().delete_object(Bucket=self.bucket, Key=self.key(relative))

    def _put(self, relative: str, body: bytes, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        with self._explained("be written"):
            try:
                _client().put_object(Bucket=self.bucket, Key=self.key(relative), Body=body, **condition)
            except ClientError as error:
                # 409: another conditional write of the same object was under way, and it won.
                if condition and _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "404"):
                    return False
                raise
        return True

    def upload(self, path: Path, relative: str) -> None:
        """Writes a file, in parts if it is large, whatever was there."""
        with self._explained("be written"):
            _client().upload_file(str(path), self.bucket, self.key(relative))

    def download(self, relative: str, path: Path) -> None:
        """Reads an object into a file. Raises CheckpointError if it is not there."""
        from botocore.exceptions import ClientError

        with self._explained("be read"):
            try:
                _client().download_file(self.bucket, self.key(relative), str(path))
            except ClientError as error:
                if _code(error) not in ("404", "NoSuchKey"):
                    raise
                raise CheckpointError(f"{self.url}: {self.key(relative)} is missing, though it is listed.") from None

    def keys(self, relative: str) -> list[str]:
        """Every object whose key begins so."""
        return [key for key, _ in self._listed(relative)]

    def _listed(self, relative: str) -> Iterator[tuple[str, datetime]]:
        """Every object below, without what all keys begin with, and when it was written."""
        own = self.key("")
        with self._explained("be listed"):
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{own}/{relative}")
            for page in pages:
                for found in page.get("Contents", ()):
                    yield found["Key"].removeprefix(f"{own}/"), found["LastModified"]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except GPTCoreError:
            raise
        except Exception as error:
            if (ours := explained(error, self.url, what)) is None:
                raise
            raise ours from None


def explained(error: BaseException, url: str, what: str = "be used") -> GPTCoreError | None:
    """An error of boto3's in our words; None if it is none."""
    if not type(error).__module__.startswith(("botocore", "boto3", "s3transfer")):
        return None
    said = str(error).strip().partition("\n")[0]
    beginning = f"the object store {url} cannot {what}: {said}."
    code = _code(error)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError"):
        return StoreRefuses(f"{beginning} Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.")
    if code in ("NoSuchBucket", "404") or "NoSuchBucket" in said:
        return StoreRefuses(f"{beginning} Create the bucket, or name another one.")
    if code in ("NotImplemented", "501"):
        return StoreRefuses(
            f"{beginning} It must support conditional writes (If-None-Match, If-Match), on which atomic publication "
            "rests: Amazon's does, and MinIO's and Ceph's in new releases. Upgrade it, or use another one."
        )
    if code in ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch") or (
        "AccessDenied" in said or "Forbidden" in said
    ):
        cure = "Allow s3:ListBucket, GetObject, PutObject and DeleteObject there, or mend AWS_* in the environment."
        return StoreRefuses(f"{beginning} {cure}")
    return StoreAway(f"{beginning} Start it, or mend AWS_ENDPOINT_URL. Nothing that was complete is lost.")


def _code(error: BaseException) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _seal(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


@lru_cache(maxsize=1)
def _client() -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError:
        raise StoreRefuses("an object store needs a client: pip install 'gptflow[s3]'") from None
    patience = Config(connect_timeout=10, read_timeout=60)
    return Session().client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"), config=patience)

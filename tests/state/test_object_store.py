"""The object store over real HTTP: whole directories or none, despite kills, races, refusals and outages."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.state import object_store as module
from flows.state.object_store import ObjectChanged, Store, StoreRefused, StoreUnreachable
from gptcore import manifest
from gptcore.errors import CheckpointError, GPTCoreError
from tests.state.objects import Objects

pytestmark = pytest.mark.slow
PUSH = "import sys; from pathlib import Path; from flows.state.object_store import Store\n"
PUSH += "Store('s3://bucket/here').push(Path(sys.argv[1]), 'corpora/one')"


@pytest.fixture
def store(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty bucket, and the environment variables that lead to it."""
    for name, value in objects.environment.items():
        monkeypatch.setenv(name, value)
    module._client.cache_clear()
    client = objects.client()
    client.create_bucket(Bucket="bucket")
    yield Store("s3://bucket/here")
    objects.refuse = lambda _: None
    for key in objects.keys("bucket"):
        client.delete_object(Bucket="bucket", Key=key)
    client.delete_bucket(Bucket="bucket")
    module._client.cache_clear()


def made(parent: Path, name: str, text: str) -> Path:
    """Commit a directory of three files, one of them in a subdirectory."""
    with manifest.stage(parent) as staged:
        (staged / "below").mkdir()
        for path in (staged / "a", staged / "b", staged / "below" / "c"):
            path.write_text(f"{text} {path.name}")
        return manifest.commit(staged, parent / name, {"kind": "test"})


def test_a_pulled_directory_equals_the_pushed_one_and_an_altered_one_is_refused(
    store: Store, objects: Objects, tmp_path: Path
) -> None:
    one = made(tmp_path, "one", "text")
    store.check()
    store.check()
    assert store.list_directories("corpora") == []
    assert store.push(one, "corpora/one") is True
    assert store.push(one, "corpora/one") is False
    assert store.list_directories("corpora") == ["one"] and store.list_directories("tokens") == []
    assert store.pull("corpora/one", tmp_path / "elsewhere" / "one")
    assert manifest.verify(tmp_path / "elsewhere" / "one") == {"kind": "test"}
    assert (tmp_path / "elsewhere" / "one" / "below" / "c").read_text() == "text c"
    assert not store.pull("corpora/two", tmp_path / "two") and not (tmp_path / "two").exists()
    key = next(key for key in objects.keys("bucket") if key.endswith("/b"))
    objects.client().put_object(Bucket="bucket", Key=key, Body=b"texx b")
    with pytest.raises(CheckpointError, match="sha256"):
        store.pull("corpora/one", tmp_path / "again")
    objects.client().delete_object(Bucket="bucket", Key=key)
    with pytest.raises(CheckpointError, match="missing"):
        store.pull("corpora/one", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".tmp-*"))
    store.remove("corpora/one")
    assert objects.keys("bucket") == ["here/state/probe"]


@pytest.mark.parametrize("fatal", [1, 3, 4])
def test_a_killed_push_leaves_nothing_visible_and_the_next_push_completes_it(
    fatal: int, store: Store, objects: Objects, tmp_path: Path
) -> None:
    one = made(tmp_path, "one", "text")
    seen: list[str] = []

    def kill(environ: dict[str, Any]) -> tuple[str, str] | None:
        if environ["REQUEST_METHOD"] == "PUT":
            seen.append(environ["PATH_INFO"])
            if len(seen) == fatal:
                os.kill(pushing.pid, signal.SIGKILL)
                return "500 Internal Server Error", "InternalError"
        return None

    objects.refuse = kill
    pushing = subprocess.Popen([sys.executable, "-c", PUSH, str(one)], stderr=subprocess.DEVNULL)
    assert pushing.wait(60) == -signal.SIGKILL and len(seen) >= fatal
    assert [path.endswith("manifest.json") for path in seen[:fatal]] == [False] * min(fatal, 3) + [True] * (fatal - 3)
    objects.refuse = lambda _: None
    assert store.list_directories("corpora") == [] and not store.pull("corpora/one", tmp_path / "two")
    assert store.sweep() == [], "recent files may belong to an upload that still runs"
    assert store.push(one, "corpora/one") and store.pull("corpora/one", tmp_path / "two")
    assert store.sweep(timedelta()) == []


def test_the_second_of_two_pushes_under_one_name_adopts_the_first_directory(
    store: Store, objects: Objects, tmp_path: Path
) -> None:
    ours, theirs = made(tmp_path, "ours", "ours"), made(tmp_path, "theirs", "theirs")
    assert store.push(ours, "tokens/one", lambda: store.push(theirs, "tokens/one") and None) is False
    assert store.pull("tokens/one", tmp_path / "one") and (tmp_path / "one" / "a").read_text() == "theirs a"
    assert len(store.sweep(timedelta())) == 3
    assert store.pull("tokens/one", tmp_path / "again"), "the sweep must remove only the files of the second push"

    def forbidden() -> None:
        raise GPTCoreError("the lock is lost")

    with pytest.raises(GPTCoreError, match="lock is lost"):
        store.push(ours, "tokens/two", forbidden)
    assert store.list_directories("tokens") == ["one"]
    store.write("current.json", b"1", None)
    before = store.read("current.json")
    store.write("current.json", b"2", before)
    for stale in (before, None):
        with pytest.raises(ObjectChanged, match="another machine"):
            store.write("current.json", b"3", stale)
    found = store.read("current.json")
    assert found is not None and found.body == b"2"


def test_a_refusal_or_a_missing_feature_of_the_store_is_reported_with_the_fix(
    store: Store, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(tmp_path, "one", "text")

    def without_conditions(environ: dict[str, Any]) -> tuple[str, str] | None:
        return ("501 Not Implemented", "NotImplemented") if "HTTP_IF_NONE_MATCH" in environ else None

    def forgetful(environ: dict[str, Any]) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)

    objects.refuse = without_conditions
    with pytest.raises(StoreRefused, match=r"conditional writes .*MinIO's"):
        store.push(one, "corpora/one")
    objects.refuse = forgetful
    with pytest.raises(StoreRefused, match="ignores the condition"):
        store.check()
    objects.refuse = lambda _: ("403 Forbidden", "AccessDenied")
    with pytest.raises(StoreRefused, match=r"Allow s3:ListBucket, .* or fix AWS_"):
        store.check()
    objects.refuse = lambda _: None
    with pytest.raises(StoreRefused, match="Create the bucket"):
        Store("s3://nobody/here").check()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    module._client.cache_clear()
    with pytest.raises(StoreUnreachable, match=r"Start it, or fix AWS_ENDPOINT_URL"):
        store.check()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    module._client.cache_clear()
    with pytest.raises(StoreRefused, match="Set AWS_ACCESS_KEY_ID"):
        store.check()
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    module._client.cache_clear()
    with pytest.raises(StoreRefused, match=r"pip install 'gptflow\[s3\]'"):
        store.check()

"""What a source looks like from outside: what is noticed, what is not, and that no text is read."""

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gptcore.errors import CorpusError, SourceUnavailable
from gptcore.text.glance import fingerprint


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "one.txt").write_text("one")
    (tmp_path / "texts" / "deep" / "two.md").write_text("two")
    return tmp_path / "texts"


def longer(texts: Path) -> None:
    (texts / "one.txt").write_text("one and more")


def as_long(texts: Path) -> None:
    (texts / "deep" / "two.md").write_text("six")


def touched(texts: Path) -> None:
    os.utime(texts / "one.txt", ns=(1, 1))


def deleted(texts: Path) -> None:
    (texts / "deep" / "two.md").unlink()


def added(texts: Path) -> None:
    (texts / "deep" / "three.jsonl").write_text("{}")


def renamed(texts: Path) -> None:
    (texts / "one.txt").rename(texts / "uno.txt")


def replaced(texts: Path) -> None:
    """By a file of the same size and age."""
    before = (texts / "one.txt").stat()
    (texts / "new").write_text("eno")
    os.utime(texts / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (texts / "new").rename(texts / "one.txt")


@pytest.mark.parametrize("change", [longer, as_long, touched, deleted, added, renamed, replaced])
def test_whatever_happens_to_a_directory_is_seen(texts: Path, change) -> None:
    before = fingerprint("texts", texts.parent)
    assert fingerprint("texts", texts.parent) == before
    change(texts)
    assert fingerprint("texts", texts.parent) != before


def test_what_is_no_text_and_what_is_read_changes_nothing(texts: Path) -> None:
    before = fingerprint("texts", texts.parent)
    (texts / "picture.png").write_bytes(b"png")
    (texts / "one.txt").read_text()
    assert fingerprint("texts", texts.parent) == before


@pytest.mark.parametrize("source", ["texts/one.txt", "texts/*.txt"])
def test_files_and_globs_are_looked_at_one_by_one(texts: Path, source: str) -> None:
    before = fingerprint(source, texts.parent)
    touched(texts)
    after = fingerprint(source, texts.parent)
    assert after != before
    deleted(texts)  # another file
    assert fingerprint(source, texts.parent) == after


def test_a_missing_source_is_an_error_and_not_a_fingerprint(texts: Path) -> None:
    shutil.rmtree(texts)
    with pytest.raises(CorpusError, match="'texts' does not exist"):
        fingerprint("texts", texts.parent)


def test_what_comes_with_python_and_what_is_pinned_never_change(tmp_path: Path) -> None:
    assert fingerprint("python-docs", tmp_path) == fingerprint("python-docs", tmp_path)
    nobody = "http://127.0.0.1:9/text.txt#sha256="
    assert fingerprint(nobody + "a" * 64, tmp_path) != fingerprint(nobody + "b" * 64, tmp_path)


class Web(HTTPServer):
    """Serves one text, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.headers = {"ETag": '"one"', "Content-Length": "3"}
        self.status = {"HEAD": 200, "GET": 200}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/text.txt"


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        self.server.asked.append(self.command)
        self.send_response(self.server.status[self.command])
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("change", [{"ETag": '"two"'}, {"Last-Modified": "Mon, 02 Mar 2026 00:00:00 GMT"}])
def test_a_web_server_is_asked_for_headers_only(web: Web, tmp_path: Path, change: dict[str, str]) -> None:
    before = fingerprint(web.address, tmp_path)
    web.headers["Date"] = "some other day"
    assert fingerprint(web.address, tmp_path) == before
    web.headers |= change
    assert fingerprint(web.address, tmp_path) != before
    assert web.asked == ["HEAD"] * 3


def test_a_server_without_head_is_asked_by_get_which_is_left_unread(web: Web, tmp_path: Path) -> None:
    before = fingerprint(web.address, tmp_path)
    web.status["HEAD"] = 405
    web.headers["Content-Length"] = str(10**12)
    web.headers["ETag"] = '"one"'
    assert fingerprint(web.address, tmp_path) != before
    assert web.asked == ["HEAD", "HEAD", "GET"]


def test_a_server_that_fails_or_tells_nothing_is_unavailable(web: Web, tmp_path: Path) -> None:
    web.headers = {}
    with pytest.raises(SourceUnavailable, match="tells none of ETag"):
        fingerprint(web.address, tmp_path)
    web.status["HEAD"] = 503
    with pytest.raises(SourceUnavailable, match="503"):
        fingerprint(web.address, tmp_path)
    with pytest.raises(SourceUnavailable, match="does not answer"):
        fingerprint("http://127.0.0.1:9/text.txt", tmp_path)


def test_a_store_of_fsspec_is_listed(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/glance/one.txt", b"one")
    for source in ("memory://glance", "memory://glance/*.txt", "memory://glance/one.txt"):
        before = fingerprint(source, tmp_path)
        assert fingerprint(source, tmp_path) == before
        store.pipe("/glance/one.txt", b"eno")
        assert fingerprint(source, tmp_path) != before
    store.rm("/glance", recursive=True)
    with pytest.raises(CorpusError, match="does not exist"):
        fingerprint("memory://glance", tmp_path)

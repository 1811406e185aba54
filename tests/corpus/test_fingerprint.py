"""Fingerprints of sources: which changes they show, which they ignore, and that no text is read."""

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gptcore.corpus.fingerprint import fingerprint_source
from gptcore.errors import CorpusError, SourceUnavailable


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
    """Replace a file by another one of the same size and age."""
    before = (texts / "one.txt").stat()
    (texts / "new").write_text("eno")
    os.utime(texts / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (texts / "new").rename(texts / "one.txt")


def test_a_change_of_a_file_that_is_excluded_or_ignored_does_not_count(texts: Path) -> None:
    (texts / ".gitignore").write_text("one.txt\n")
    before = fingerprint_source("texts", texts.parent, ["*.jsonl"])
    longer(texts)
    added(texts)
    assert fingerprint_source("texts", texts.parent, ["*.jsonl"]) == before
    assert fingerprint_source("texts", texts.parent) != before


@pytest.mark.parametrize("change", [longer, as_long, touched, deleted, added, renamed, replaced])
def test_every_change_in_a_directory_changes_its_fingerprint(texts: Path, change) -> None:
    before = fingerprint_source("texts", texts.parent)
    assert fingerprint_source("texts", texts.parent) == before
    change(texts)
    assert fingerprint_source("texts", texts.parent) != before


def test_files_that_are_not_text_and_reading_do_not_change_the_fingerprint(texts: Path) -> None:
    before = fingerprint_source("texts", texts.parent)
    (texts / "picture.png").write_bytes(b"png")
    (texts / "one.txt").read_text()
    assert fingerprint_source("texts", texts.parent) == before


@pytest.mark.parametrize("source", ["texts/one.txt", "texts/*.txt"])
def test_the_fingerprint_of_a_file_or_glob_ignores_other_files(texts: Path, source: str) -> None:
    before = fingerprint_source(source, texts.parent)
    touched(texts)
    after = fingerprint_source(source, texts.parent)
    assert after != before
    deleted(texts)  # another file
    assert fingerprint_source(source, texts.parent) == after


def test_a_missing_source_is_an_error_and_not_a_fingerprint(texts: Path) -> None:
    shutil.rmtree(texts)
    with pytest.raises(CorpusError, match="'texts' does not exist"):
        fingerprint_source("texts", texts.parent)


def test_the_fingerprints_of_python_docs_and_pinned_addresses_never_change(tmp_path: Path) -> None:
    assert fingerprint_source("python-docs", tmp_path) == fingerprint_source("python-docs", tmp_path)
    nobody = "http://127.0.0.1:9/text.txt#sha256="
    assert fingerprint_source(nobody + "a" * 64, tmp_path) != fingerprint_source(nobody + "b" * 64, tmp_path)


class Web(HTTPServer):
    """Serves one text, and records the method of every request."""

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
def test_only_headers_are_requested_from_a_web_server(web: Web, tmp_path: Path, change: dict[str, str]) -> None:
    before = fingerprint_source(web.address, tmp_path)
    web.headers["Date"] = "some other day"
    assert fingerprint_source(web.address, tmp_path) == before
    web.headers |= change
    assert fingerprint_source(web.address, tmp_path) != before
    assert web.asked == ["HEAD"] * 3


def test_a_server_without_head_receives_a_get_request_whose_body_is_not_read(web: Web, tmp_path: Path) -> None:
    before = fingerprint_source(web.address, tmp_path)
    web.status["HEAD"] = 405
    web.headers["Content-Length"] = str(10**12)
    web.headers["ETag"] = '"one"'
    assert fingerprint_source(web.address, tmp_path) != before
    assert web.asked == ["HEAD", "HEAD", "GET"]


def test_a_server_that_fails_or_sends_no_useful_headers_is_unavailable(web: Web, tmp_path: Path) -> None:
    web.headers = {}
    with pytest.raises(SourceUnavailable, match="sends none of the headers ETag"):
        fingerprint_source(web.address, tmp_path)
    web.status["HEAD"] = 503
    with pytest.raises(SourceUnavailable, match="503"):
        fingerprint_source(web.address, tmp_path)
    with pytest.raises(SourceUnavailable, match="does not answer"):
        fingerprint_source("http://127.0.0.1:9/text.txt", tmp_path)


def test_a_store_behind_fsspec_is_listed(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/glance/one.txt", b"one")
    for source in ("memory://glance", "memory://glance/*.txt", "memory://glance/one.txt"):
        before = fingerprint_source(source, tmp_path)
        assert fingerprint_source(source, tmp_path) == before
        store.pipe("/glance/one.txt", b"eno")
        assert fingerprint_source(source, tmp_path) != before
    store.rm("/glance", recursive=True)
    with pytest.raises(CorpusError, match="does not exist"):
        fingerprint_source("memory://glance", tmp_path)

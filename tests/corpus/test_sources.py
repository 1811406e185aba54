"""Sources of text: formats, compression, encodings, directories, globs, downloads and stores."""

import csv
import gzip
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import zstandard

from gptcore.corpus import remote, sources
from gptcore.corpus.compression import CHUNK_BYTES
from gptcore.corpus.encoding import Errors
from gptcore.corpus.formats import ReadOptions
from gptcore.errors import CorpusError, SourceUnavailable

TEXT = "First line.\r\nÄpfel, 日本語, 🎈 and a NUL \0.\n\nLast line without an end"
ROWS = ["one", TEXT, "", "x" * 200_000, 'quotes " and, commas\n']


def read_sources(given: Sequence[str], base: Path, errors: Errors = "strict") -> Iterator[sources.Document]:
    for file in sources.find_files(given, base, base / "downloads").files:
        with file.open(base / "downloads") as content:
            yield from file.read_documents(content, ReadOptions(errors))


def texts(given: Sequence[str], base: Path, errors: Errors = "strict") -> list[str]:
    found = read_sources(given, base, errors)
    return [b"".join(document.chunks).decode() for document in found]


def names(given: Sequence[str], base: Path) -> list[str]:
    found = []
    for document in read_sources(given, base):
        found.append(document.name)
        assert all(len(chunk) <= 2**20 for chunk in document.chunks)
    return found


def encoded(kind: str, rows: Sequence[str]) -> bytes:
    if kind == ".jsonl":
        return b"".join(json.dumps({"id": 7, "text": row}).encode() + b"\n" for row in rows)
    if kind == ".csv":
        written = io.StringIO(newline="")
        csv.writer(written).writerows([["id", "text"], *([7, row] for row in rows)])
        return written.getvalue().encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"id": [7] * len(rows), "text": list(rows)}), file, row_group_size=2)
    return file.getvalue()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".log", ""])
def test_plain_text_in_any_compression_is_read_byte_for_byte(tmp_path: Path, kind: str, suffix: str) -> None:
    (tmp_path / f"a{kind}{suffix}").write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + TEXT.encode()))
    assert texts([f"a{kind}{suffix}"], tmp_path) == [TEXT]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_every_row_of_a_table_is_a_document(tmp_path: Path, kind: str, suffix: str) -> None:
    (tmp_path / f"a{kind}{suffix}").write_bytes(COMPRESS[suffix](encoded(kind, ROWS)))
    assert texts([f"a{kind}{suffix}"], tmp_path) == ROWS


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_byte_order_mark_before_a_table_is_not_part_of_its_text(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a{kind}").write_bytes(b"\xef\xbb\xbf" + encoded(kind, ["text"]))
    assert texts([f"a{kind}"], tmp_path) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": 1, "id": 2}\n', [r"a\.jsonl:2", "'text'", "body, id"]),
        ("a.jsonl", b'{"text": "x"}\n{"text":', [r"a\.jsonl:2", "not JSON"]),
        ("a.jsonl", b"[1]\n", [r"a\.jsonl:1", "object"]),
        ("a.jsonl", b'{"text": 5}\n', [r"a\.jsonl:1", "int 5"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', [r"a\.jsonl:1", "surrogate", "errors: replace"]),
        ("a.csv", b"id,body\n1,x\n", [r"a\.csv:1", "'text'", "id, body"]),
        ("a.csv", b"id,text\n1\n", [r"a\.csv:2", "2 columns", "found 1"]),
        ("a.csv", b'text\n"never closed\n', [r"a\.csv", "not CSV"]),
        ("a.parquet", b"PAR1 not at all", [r"a\.parquet", "Parquet"]),
        ("a.txt.gz", gzip.compress(os.urandom(1000))[:-20], [r"a\.txt\.gz", "whole compressed"]),
        ("a.txt.zst", COMPRESS[".zst"](os.urandom(1000))[:-20], [r"a\.txt\.zst", "whole compressed"]),
        ("a.txt.zst", b"plain text", [r"a\.txt\.zst", "whole compressed"]),
    ],
)
def test_a_damaged_file_is_named_with_the_row_and_the_problem(
    tmp_path: Path, name: str, content: bytes, said: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        texts([name], tmp_path)
    for part in said:
        assert caught.match(part)


@pytest.mark.parametrize("columns", [{"body": ["x"]}, {"text": [1]}])
def test_a_parquet_file_without_a_column_of_text_is_refused(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet.*(body|text)"):
        texts(["a.parquet"], tmp_path)


@pytest.mark.parametrize("at", [0, 5, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 7])
@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xe4\xb8"])
def test_a_byte_that_is_not_utf8_is_refused_with_its_offset_or_replaced(tmp_path: Path, at: int, bad: bytes) -> None:
    content = b"a" * at + bad + b"z" * 10
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        CorpusError, match=rf"a\.txt is not UTF-8: byte 0x{bad[0]:02x} at offset {at}\..*errors: replace"
    ):
        texts(["a.txt"], tmp_path)
    assert texts(["a.txt"], tmp_path, "replace") == [content.decode(errors="replace")]


def test_a_character_cut_off_by_the_end_of_the_file_is_not_lost_silently(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ab日".encode()[:-1])
    with pytest.raises(CorpusError, match="offset 2"):
        texts(["a.txt"], tmp_path)
    assert texts(["a.txt"], tmp_path, "replace") == ["ab\ufffd"]


def test_a_bad_byte_in_a_table_is_named_by_its_offset_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match="offset 24"):
        texts(["a.jsonl"], tmp_path)
    assert texts(["a.jsonl"], tmp_path, "replace") == ["x", "\ufffd"]


def test_characters_across_a_chunk_border_survive(tmp_path: Path) -> None:
    text = "a" + "🎈" * 300_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = read_sources(["a.txt"], tmp_path)
    chunks = list(next(found).chunks)
    assert len(chunks) > 1
    assert "".join(chunk.decode() for chunk in chunks) == text


def test_a_lone_surrogate_in_json_is_replaced_and_a_pair_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83c\\udf88 \\ud800"}\n')
    assert texts(["a.jsonl"], tmp_path, "replace") == ["🎈 \ufffd"]


def test_python_docs_are_the_topics_in_order(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    found = [
        (document.name, b"".join(document.chunks).decode()) for document in read_sources(["python-docs"], tmp_path)
    ]
    assert found == [(f"python-docs:{topic}", topics[topic]) for topic in sorted(topics)]


def make_tree(root: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.txt.gz", "picture.png", "notes.rst"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())


def test_a_directory_gives_its_text_files_in_order_and_nothing_else(tmp_path: Path) -> None:
    make_tree(tmp_path / "texts")
    assert names(["texts"], tmp_path) == ["texts/a.md", "texts/b.txt", "texts/notes.rst", "texts/sub/c.txt.gz"]


def test_a_document_outside_the_project_is_named_relative_to_its_source(tmp_path: Path) -> None:
    make_tree(tmp_path / "texts")
    elsewhere = tmp_path / "elsewhere"
    for source in (str(tmp_path / "texts"), "../texts"):
        assert names([source], elsewhere) == ["texts/a.md", "texts/b.txt", "texts/notes.rst", "texts/sub/c.txt.gz"]
    assert names([f"{tmp_path}/texts/*.md"], elsewhere) == ["texts/a.md"]
    assert names([f"{tmp_path}/texts/a.md"], elsewhere) == ["a.md"]


def test_a_glob_gives_its_matches_in_order_with_any_suffix(tmp_path: Path) -> None:
    base = tmp_path / "odd [name]"
    make_tree(base / "texts")
    assert names(["texts/*.[tr]*"], base) == ["texts/b.txt", "texts/notes.rst"]
    assert names([f"{tmp_path}/*/texts/?.md"], tmp_path) == ["odd [name]/texts/a.md"]
    assert names(["odd [name]/texts/a.md"], tmp_path) == ["odd [name]/texts/a.md"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty", "has no file of text"),
        ("pipe.txt", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("notes [2024]/a.txt", r"matches no file .*for a \[ in a name, write 'notes \[\[\]2024\]/a.txt'"),
        (" ", "empty"),
        ("https:///path", "no host"),
        ("http://[::1/x", "not an address"),
        ("https://example.org/a.txt#sha256=12", "64 hexadecimal digits"),
        ("https://example.org/a.txt#md5=12", "64 hexadecimal digits"),
    ],
)
def test_a_source_that_cannot_exist_is_refused_before_anything_is_read(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "image.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CorpusError, match=said):
        sources.check([source], tmp_path)


def test_a_storage_whose_package_is_missing_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, package in {"s3": "s3fs", "gs": "gcsfs"}.items():
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(CorpusError, match=f"pip install {package}"):
            sources.check([f"{scheme}://bucket/a.txt"], tmp_path)
        with pytest.raises(CorpusError, match=f"(?s){package}.*pip install"):
            texts([f"{scheme}://bucket/a.txt"], tmp_path)


def test_any_path_that_fsspec_opens_is_a_source(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/b.txt": TEXT.encode(), "/corpus/a.jsonl": encoded(".jsonl", ["r"]), "/corpus/x.png": b"\xff"})
    assert texts(["memory://corpus/b.txt"], tmp_path) == [TEXT]
    assert texts(["memory://corpus/*.txt"], tmp_path) == [TEXT]
    assert texts(["memory://corpus"], tmp_path) == ["r", TEXT]
    with pytest.raises(CorpusError, match="does not exist"):
        texts(["memory://nothing"], tmp_path)
    with pytest.raises(CorpusError, match="nonsense"):
        texts(["nonsense://a"], tmp_path)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`, with Range and If-None-Match. It can cut a transfer and answer with a status."""

    def do_GET(self) -> None:
        site: Any = self.server
        site.requests.append(dict(self.headers))
        if self.path.startswith("/status/"):
            self.send_error(int(self.path.split("/")[2]))
            return
        tag = site.tag
        if tag and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        asked = self.headers.get("Range")
        resumes = asked is not None and self.headers.get("If-Range") == tag
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and resumes else 0
        if start >= len(site.content):
            self.send_error(416)
            return
        body = site.content[start:]
        self.send_response(206 if resumes else 200)
        if resumes:
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        if tag:
            self.send_header("ETag", tag)
        if site.encoding:
            self.send_header("Content-Encoding", site.encoding)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: site.cut_after])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.tag, server.cut_after = TEXT.encode() * 20_000, '"v1"', None
    server.requests, server.encoding = [], ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_from_the_web_is_downloaded_once_and_then_checked_for_changes(tmp_path: Path, site: Any) -> None:
    url = f"{site.url}/a.txt?key=1"
    assert texts([url], tmp_path) == texts([url], tmp_path) == [site.content.decode()]
    assert [asked.get("If-None-Match") for asked in site.requests] == [None, '"v1"']
    site.content, site.tag = b"changed", '"v2"'
    assert texts([url], tmp_path) == ["changed"]


def test_a_downloaded_file_that_was_altered_here_is_downloaded_again(tmp_path: Path, site: Any) -> None:
    url = f"{site.url}/a.txt"
    texts([url], tmp_path)
    body = next((tmp_path / "downloads").glob("*/body"))
    body.write_bytes(body.read_bytes()[:-1] + b"?")
    assert texts([url], tmp_path) == [site.content.decode()]
    assert [asked.get("If-None-Match") for asked in site.requests] == [None, None]
    texts([url], tmp_path)
    assert site.requests[-1].get("If-None-Match") == '"v1"'


@pytest.mark.parametrize(("name", "layers"), [("a.txt.gz", 1), ("a.txt.gz", 2), ("a.txt", 1), ("a.txt", 0)], ids=str)
def test_a_file_labelled_as_gzip_is_decoded_only_if_the_server_has_compressed_it(
    tmp_path: Path, site: Any, name: str, layers: int
) -> None:
    plain, site.encoding = site.content, "gzip"
    for _ in range(layers):
        site.content = gzip.compress(site.content)
    site.cut_after = len(site.content) // 2
    with pytest.raises(SourceUnavailable, match="an interrupted download is resumed"):
        texts([f"{site.url}/{name}"], tmp_path)
    site.cut_after = None
    for _ in range(2):  # the second time, the server answers that nothing has changed
        assert texts([f"{site.url}/{name}"], tmp_path) == [plain.decode()]
    assert "Range" in site.requests[1]


def test_a_file_in_an_encoding_that_was_not_asked_for_is_refused(tmp_path: Path, site: Any) -> None:
    site.encoding = "br"
    with pytest.raises(CorpusError, match=r"Content-Encoding 'br' \(expected gzip or none\)"):
        texts([f"{site.url}/a.txt"], tmp_path)


def test_a_file_with_a_sha256_is_never_downloaded_again_unless_the_copy_is_damaged(tmp_path: Path, site: Any) -> None:
    url = f"{site.url}/a.txt#sha256={hashlib.sha256(site.content).hexdigest()}"
    for _ in range(2):
        assert texts([url], tmp_path) == [site.content.decode()]
    assert len(site.requests) == 1
    next((tmp_path / "downloads").glob("*/body")).write_bytes(b"damaged")
    assert texts([url], tmp_path) == [site.content.decode()]
    assert len(site.requests) == 2


def test_a_file_with_the_wrong_sha256_is_removed_and_both_hashes_are_named(tmp_path: Path, site: Any) -> None:
    found, wanted = hashlib.sha256(site.content).hexdigest(), "0" * 64
    with pytest.raises(CorpusError, match=rf"sha256 {found}, expected {wanted}.*#sha256={found}"):
        texts([f"{site.url}/a.txt#sha256={wanted}"], tmp_path)
    assert not list((tmp_path / "downloads").glob("*/body"))


def test_an_interrupted_download_is_resumed(tmp_path: Path, site: Any) -> None:
    site.cut_after = 300_000
    for _ in range(2):
        with pytest.raises(SourceUnavailable, match="an interrupted download is resumed"):
            texts([f"{site.url}/a.txt"], tmp_path)
    site.cut_after = None
    assert texts([f"{site.url}/a.txt"], tmp_path) == [site.content.decode()]
    first, second, third = [int(asked.get("Range", "bytes=0-")[6:-1]) for asked in site.requests]
    assert first == 0 < second < third


@pytest.mark.parametrize("tag", [None, 'W/"weak"', '"v2"'])
def test_an_interrupted_download_restarts_if_the_file_may_have_changed(
    tmp_path: Path, site: Any, tag: str | None
) -> None:
    site.cut_after, site.tag = 300_000, tag if tag != '"v2"' else '"v1"'
    with pytest.raises(SourceUnavailable):
        texts([f"{site.url}/a.txt"], tmp_path)
    site.cut_after, site.tag, site.content = None, tag, b"new content " * 50_000
    assert texts([f"{site.url}/a.txt"], tmp_path) == [site.content.decode()]


def test_a_complete_download_that_was_not_committed_is_downloaded_again(tmp_path: Path, site: Any) -> None:
    texts([f"{site.url}/a.txt"], tmp_path)
    body = next((tmp_path / "downloads").glob("*/body"))
    body.rename(body.with_name("part"))
    body.with_name("body.json").rename(body.with_name("part.json"))
    assert texts([f"{site.url}/a.txt"], tmp_path) == [site.content.decode()]


def test_several_threads_can_download_the_same_file_at_once(tmp_path: Path, site: Any) -> None:
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(texts([f"{site.url}/a.txt"], tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[site.content.decode()]] * 4


@pytest.mark.parametrize(("status", "error"), [(404, CorpusError), (403, CorpusError), (503, SourceUnavailable)])
def test_a_refused_request_is_an_error_of_the_user_and_a_failing_server_is_not(
    tmp_path: Path, site: Any, status: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"/status/{status} .*{status}"):
        texts([f"{site.url}/status/{status}"], tmp_path)


def test_a_server_that_does_not_answer_is_named_with_the_fix(tmp_path: Path, site: Any) -> None:
    texts([f"{site.url}/a.txt"], tmp_path)
    site.shutdown()
    site.server_close()
    with pytest.raises(SourceUnavailable, match=rf"{site.url}/a.txt is unavailable: .*#sha256=[0-9a-f]{{64}}"):
        texts([f"{site.url}/a.txt"], tmp_path)

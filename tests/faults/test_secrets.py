"""Secrets in the addresses of sources, webhooks and servers: canaries, and a search for them in everything written."""

import base64
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from flows.config.pipelines import PipelinesFile
from gptcore.config import CorpusConfig
from gptcore.corpus.fingerprint import fingerprint_source
from gptcore.corpus.http import download
from gptcore.corpus.ingest import ingest
from gptcore.corpus.remote import find_objects
from gptcore.errors import ConfigError, CorpusError, SourceUnavailable
from tests.servers import Prefect, Receiver, gptflow
from tests.tiny import prose, write_pipelines

PASSWORD, TOKEN, HOOK = "c4n4ry-p/ssw@rd", "c4n4ry-t0ken", "c4n4ry-h00k"


class Web(ThreadingHTTPServer):
    """Serves one text to those who have the password and the token, and answers 401 to others."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.location = ""
        """Redirects there if it is not empty."""
        self.is_closed = False
        """Whether nobody gets the text any more."""
        self.text = prose(1, num_words=9000)

    @property
    def source(self) -> str:
        return f"http://me:${{CANARY_PASSWORD}}@127.0.0.1:{self.server_port}/book.txt?v=1&token=${{CANARY_TOKEN}}"


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        is_known = self.headers["Authorization"] == expected and parse_qs(urlsplit(self.path).query)["token"] == [TOKEN]
        body = self.server.text.encode()
        if not is_known or self.server.is_closed:
            self.send_response(401)
        elif self.server.location:
            self.send_response(302)
            self.send_header("Location", self.server.location)
        else:
            self.send_response(200)
            self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body)))
        self.wfile.write(b"".join(self._headers_buffer) + b"a line that is not a header\r\n\r\n")
        self._headers_buffer = []
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("CANARY_PASSWORD", PASSWORD.replace("@", "%40"))
    monkeypatch.setenv("CANARY_TOKEN", TOKEN)
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def find_canaries(directory: Path, *canaries: str) -> list[str]:
    """Return the files below the directory that contain a canary, in their bytes or in their name."""
    return [
        f"{canary} in {path}"
        for path in directory.rglob("*")
        for canary in canaries or ("c4n4ry",)
        if canary in path.name or (path.is_file() and canary.encode() in path.read_bytes())
    ]


def test_a_secret_is_inserted_into_the_request_and_written_nowhere(
    web: Web, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = CorpusConfig(sources=(web.source,), block_bytes=256, val_fraction=0.15, holdout_fraction=0.15)
    with caplog.at_level(logging.DEBUG):
        snapshot = ingest(cfg, tmp_path / "corpora", tmp_path)
        before = fingerprint_source(web.source, tmp_path)
        assert before == fingerprint_source(web.source, tmp_path)
    (line,) = (snapshot.path / "documents.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == f"http://127.0.0.1:{web.server_port}/book.txt", "the address without its query"
    assert json.loads(line)["source"] == web.source, "as it is in the configuration"
    assert find_canaries(tmp_path) == [] and "c4n4ry" not in caplog.text


@pytest.mark.parametrize(
    "location", ["file:///x?token={}", "//me:{}@example.invalid:x/", "ftp://h/{}", "http://h:x/?a={}"]
)
def test_errors_show_the_address_without_its_secrets(web: Web, tmp_path: Path, location: str) -> None:
    errors: list[Exception] = []

    def fail(kind: type[Exception], *call: Any) -> None:
        with pytest.raises(kind) as raised:
            call[0](*call[1:])
        errors.append(raised.value)

    web.location = location.format(TOKEN)
    fail(CorpusError, download, web.source, None, tmp_path)
    web.location, web.is_closed = "", True
    fail(CorpusError, download, web.source, None, tmp_path)
    fail(SourceUnavailable, fingerprint_source, web.source, tmp_path)
    nobody = web.source.replace(f":{web.server_port}/", ":9/")
    fail(SourceUnavailable, download, nobody, None, tmp_path)
    fail(SourceUnavailable, fingerprint_source, nobody, tmp_path)
    fail((CorpusError, SourceUnavailable), find_objects, nobody.replace("http:", "ftp:"))  # type: ignore[arg-type]
    for error in errors:
        assert "c4n4ry" not in str(error) and "me:${CANARY_PASSWORD}@127.0.0.1" in str(error)
        assert error.__context__ is None or error.__suppress_context__, "a traceback would show the library's error"
    assert find_canaries(tmp_path) == []


@pytest.mark.parametrize(
    "value", ["[{}]", "{}", "[{}", "{{{}: 1}}", "!{}", "['{}', 1]", "&a {}", "{{a: 1, a: '{}'}}", "{{x: '{}'}}"]
)
def test_a_secret_on_the_command_line_or_in_a_file_is_not_repeated_in_its_error(
    project: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(project)
    file = PipelinesFile(Path("pipelines.yaml"))
    given = value.format("http://me:c4n4ry@127.0.0.1:9/c4n4ry?sig=c4n4ry")
    for key in ("corpus.sources", "corpus", "notify", "train.seed", "tags"):
        with pytest.raises(ConfigError) as refusal:
            file.pipeline("tiny", [f"{key}={given}"])
        assert "c4n4ry" not in str(refusal.value)
    path = Path("other.yaml")
    path.write_text(f"pipelines: {{tiny: {{corpus: {{sources: {given}}}}}}}")
    with pytest.raises(ConfigError) as refusal:
        PipelinesFile(path).pipeline("tiny")
    assert "c4n4ry" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_canary_of_a_source_webhook_or_server_is_in_any_record_output_or_message(
    project: Path, server: Prefect, web: Web, receiver: Receiver
) -> None:
    literal = f"{receiver.url}/{HOOK}"
    notify = [{"webhook": literal}, {"webhook": "${CANARY_HOOK}"}]
    write_pipelines(project, tiny={"corpus": {"sources": [web.source]}, "notify": notify})
    environment = {
        "PREFECT_API_URL": server.url.replace("//", "//me:c4n4ry-prefect@"),
        "CANARY_HOOK": f"{receiver.url}/c4n4ry-named",
    }
    said: list[str] = []

    def run(*arguments: str, code: int = 0, **more: str) -> str:
        done = gptflow(project, *arguments, **{**environment, **more})
        said.append(done.stdout + done.stderr)
        assert done.returncode == code, said[-1]
        return said[-1]

    run("run", "tiny")
    web.is_closed = True
    assert "answered 401" in run("run", "tiny", "--set", "train.seed=7", code=2)
    run("show", "models:/gpt-tiny@champion")
    run("models", "--json")
    run("doctor")
    run("export", "models:/gpt-tiny@champion", "exported")
    assert "CANARY_TOKEN, which is not set" in run("run", "tiny", code=2, CANARY_TOKEN="")
    run("models", code=1, GPTFLOW_DATABASE="postgresql://me:c4n4ry-postgres@127.0.0.1:9/none")
    away = {"MLFLOW_TRACKING_URI": "http://me:c4n4ry-mlflow@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    run("models", code=1, **away)

    (project / "pipelines.yaml").unlink()
    assert len(receiver.got) == 4, "two messages, each to two webhooks"
    assert [text for text in said if "c4n4ry" in text] == []
    assert "c4n4ry" not in json.dumps(receiver.got)
    assert find_canaries(project) == []
    runs = json.dumps([server.runs(), server.ask("logs/filter", {"limit": 200}), server.ask("artifacts/filter", {})])
    assert HOOK in runs, "the parameters of a run have the literal webhook, as documented"
    assert "c4n4ry" not in runs.replace(literal, "")

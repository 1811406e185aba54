"""Who may use the endpoint, the log of its requests, and its description."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from flows.cli import cli
from flows.endpoint import openapi
from flows.endpoint.access import read_key
from flows.endpoint.protocol import CompletionRequest
from gptcore.errors import ConfigError
from tests.endpoint.endpoint import Endpoint, endpoint
from tests.servers import wait_for

MODEL = "gpt-tiny@champion"
KEY = "swordfish-1"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Endpoint]:
    with endpoint(key=KEY) as made:
        yield made


def post(served: Endpoint, headers: dict[str, str] | None = None, **asked: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "The", "max_tokens": 3, **asked}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize(
    "given", [None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer swordfish-2", f"Bearer {KEY}x", f"Bearer {KEY} x"]
)
def test_a_request_without_the_key_is_refused(guarded: Endpoint, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for answer in (post(guarded, headers), httpx.get(f"{guarded.url}/v1/models", headers=headers)):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "invalid_request_error")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("openapi.json", "metrics", "card"):
        assert httpx.get(f"{guarded.url}/{path}", headers=headers).status_code == 401
    assert httpx.get(f"{guarded.url}/health", headers=headers).status_code == 200, "needs no key"


def test_a_request_with_the_key_is_answered(guarded: Endpoint) -> None:
    assert post(guarded, {"authorization": f"Bearer {KEY}"}).status_code == 200
    assert post(guarded, {"Authorization": f"bearer  {KEY}"}).status_code == 200


def test_the_key_comes_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTFLOW_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    for content in ("", " \n", "two words", "schlüssel"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="has no key"):
            read_key(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key(tmp_path / "nothing")
    monkeypatch.setenv("GPTFLOW_API_KEY", KEY)
    assert read_key(None) == KEY
    with pytest.raises(ConfigError, match="GPTFLOW_API_KEY is set too"):
        read_key(file)
    monkeypatch.setenv("GPTFLOW_API_KEY", "")
    with pytest.raises(ConfigError, match="GPTFLOW_API_KEY has no key"):
        read_key(None)


def test_a_server_for_other_machines_needs_a_key_or_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTFLOW_API_KEY", raising=False)
    served: list[tuple[str, str | None]] = []
    monkeypatch.setattr("flows.cli.open_state_root", lambda file: None)
    monkeypatch.setattr("flows.endpoint.server.serve", lambda *given: served.append((given[2].host, given[2].key)))

    def serve(*arguments: str) -> str:
        return " ".join(str(CliRunner().invoke(cli, ["serve-model", "gpt-tiny/1", *arguments]).output).split())

    for host in ("0.0.0.0", "::", "192.168.0.7", "gpu-box"):
        assert "set GPTFLOW_API_KEY or --key-file" in serve("--host", host)
    assert not served
    serve("--host", "0.0.0.0", "--no-key")
    serve()
    monkeypatch.setenv("GPTFLOW_API_KEY", KEY)
    serve("--host", "0.0.0.0")
    assert "--no-key is given, and a key too" in serve("--no-key")
    assert served == [("0.0.0.0", None), ("127.0.0.1", None), ("0.0.0.0", KEY)]


def raw(served: Endpoint, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(sent)
        received = b""
        while more := client.recv(10_000):
            received += more
        return received


def test_every_request_is_logged_once_with_its_id_and_every_error_has_openais_form(
    guarded: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flows.endpoint.access")
    with_key = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{guarded.url}/health").status_code == 200, "not logged"
    answers = [
        post(guarded, {**with_key, "x-request-id": "mine-1"}, prompt="Swordfish"),
        post(guarded, {**with_key, "x-request-id": "two words"}, model="gpt-5\n"),
        post(guarded, {**with_key, "host": "evil.example"}),
        post(guarded, {**with_key, "origin": "https://evil.example"}),
        post(guarded),
        httpx.get(f"{guarded.url}/nowhere%0A", headers=with_key),
        httpx.put(f"{guarded.url}/v1/models", headers=with_key),
        httpx.post(f"{guarded.url}/health"),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 400, 403, 401, 404, 405, 405]
    wait_for(lambda: len(caplog.messages) == len(answers), 20)
    records = [json.loads(message) for message in caplog.messages]
    for answer, record in zip(answers, records):
        assert answer.headers["x-request-id"] == record["id"] and answer.status_code == record["status"]
        assert record["client"] == "127.0.0.1" and record["seconds"] >= 0
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and record["error"] == error["message"]
    first, second, *_ = records
    assert (first["id"], first["model"], first["texts"], first["ended"]) == ("mine-1", "gpt-tiny/1", 1, 1)
    assert (first["prompt_tokens"], first["completion_tokens"]) == (9, 3) and second["id"] != "two words"
    assert not any("\n" in message for message in caplog.messages)
    assert "Swordfish" not in caplog.text and KEY not in caplog.text
    malformed = raw(guarded, b"NOT HTTP\r\n\r\n")
    assert malformed.startswith(b"HTTP/1.1 400 ") and b'"code": "malformed_request"' in malformed


def test_the_description_has_all_routes_and_parameters(guarded: Endpoint) -> None:
    described = httpx.get(f"{guarded.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert described == openapi.describe() and described["openapi"].startswith("3.1")
    routes = {
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/metrics",
        "/openapi.json",
        "/",
        "/card",
    }
    assert set(described["paths"]) == routes
    operation = described["paths"]["/v1/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() >= CompletionRequest.model_fields.keys() and "best_of" in schema["properties"]
    jsonschema = pytest.importorskip("jsonschema")
    answer = post(guarded, {"authorization": f"Bearer {KEY}"}, logprobs=1)
    jsonschema.validate(answer.json(), operation["responses"]["200"]["content"]["application/json"]["schema"])
    body = {"model": MODEL, "prompt": ["a", "b"], "stop": None, "n": 2, "suffix": "", "stream_options": None}
    jsonschema.validate(body, schema)
    for wrong in ({"n": 0}, {"prompt": []}, {"prompt": [[]]}, {"stop": ["a"] * 5}, {"best_of": 2}, {"x": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**body, **wrong}, schema)


def test_the_page_is_one_file_that_contacts_this_server_only_and_can_be_switched_off(guarded: Endpoint) -> None:
    page = httpx.get(guarded.url)
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-inline" not in policy
    assert "http://" not in page.text and "https://" not in page.text
    card = httpx.get(f"{guarded.url}/card", headers={"authorization": f"Bearer {KEY}"})
    assert card.text == "# Card 1" and card.headers["content-type"].startswith("text/plain")
    with endpoint(page=False) as bare:
        assert [httpx.get(f"{bare.url}/{path}").status_code for path in ("", "card", "health")] == [404, 404, 200]

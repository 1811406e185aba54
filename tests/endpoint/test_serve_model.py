"""`gptflow serve-model` as a process: a promotion during requests, lost clients, signals and wrong arguments."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.state.root import StateRoot
from tests.registry.made_versions import bring_versions
from tests.servers import begin, free_ports, gptflow, refused, wait_for

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
MODEL = "gpt-tiny@champion"


class Served:
    """The process and its address."""

    def __init__(self, project: Path, *arguments: str) -> None:
        self.port = free_ports(1)[0]
        self.url, self.log = f"http://127.0.0.1:{self.port}", project / "serve-model.log"
        self.process = begin(project, self.log, "serve-model", "--port", str(self.port), *arguments)

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health").json())

    def said(self) -> str:
        return self.log.read_text()

    def post(self, **asked: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"model": MODEL, "prompt": "The", **asked}, timeout=60)

    def stream(self, **asked: Any) -> Any:
        body = {"model": MODEL, "prompt": "The", "stream": True, "max_tokens": 4096, **asked}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60)


@contextmanager
def serving(project: Path, *arguments: str) -> Iterator[Served]:
    served = Served(project, *arguments)
    try:
        wait_for(lambda: served.process.poll() is not None or "is served at" in served.said(), 240)
        assert served.process.poll() is None, served.said()
        yield served
    finally:
        served.process.kill()
        served.process.wait()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line[6:]) for line in lines if line.startswith("data: {"))


def test_a_promotion_is_served_within_seconds_and_no_request_fails(root: StateRoot, project: Path) -> None:
    bring_versions(root, "gpt-tiny", 2)
    answered: list[tuple[int, str]] = []
    with serving(project, MODEL) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        def ask(number: int) -> None:
            while not stop.is_set():
                answer = client.completions.create(model=MODEL, prompt="swordfish", max_tokens=30, seed=number)
                answered.append((number, answer.model))

        stop = threading.Event()
        clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for one in clients:
            one.start()
        wait_for(lambda: len(answered) > 10, 30)
        done = gptflow(project, "promote", "gpt-tiny", "2", "--reason", "reads better")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: served.health()["version"] == "2", 30)
        count = len(answered)
        wait_for(lambda: len(answered) > count + 10, 30)
        stop.set()
        for one in clients:
            one.join()
        assert {model for _, model in answered} == {"gpt-tiny/1", "gpt-tiny/2"}
        for number in range(4):
            own = [model for asker, model in answered if asker == number]
            assert own == sorted(own), "no client returns to the old version"
        assert "gpt-tiny/2 is served from now on" in served.said() and "Traceback" not in served.said()
        assert "swordfish" not in served.said(), "prompts are not logged"


def test_lost_clients_free_their_places_and_sigterm_lets_texts_finish(root: StateRoot, project: Path) -> None:
    bring_versions(root, "gpt-tiny", 1)
    with serving(project, "gpt-tiny/1", "--max-tokens", "1000000") as served:
        for is_streamed in (True, False):
            body = json.dumps({"model": "gpt-tiny", "prompt": "a", "max_tokens": 10**6, "stream": is_streamed}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
            with socket.create_connection(("127.0.0.1", served.port)) as vanishing:
                vanishing.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
                wait_for(lambda: served.health()["writing"] == 1, 20)
            wait_for(lambda: served.health()["writing"] == 0, 20)
        with served.stream(model="gpt-tiny", max_tokens=1500) as answer:
            lines = answer.iter_lines()
            heard = [next(events(lines))]
            served.process.terminate()
            wait_for(lambda: "stopping" in served.said(), 20)
            with pytest.raises(httpx.ConnectError):
                served.post(max_tokens=1)
            heard += events(lines)
        assert heard[-1]["choices"][0]["finish_reason"] == "length"
        assert served.process.wait(20) == 0
        assert "stopped" in served.said()


def test_a_second_signal_stops_the_server_at_once(root: StateRoot, project: Path) -> None:
    bring_versions(root, "gpt-tiny", 1, emb_dim=256, n_layers=6)
    with serving(project, MODEL, "--max-tokens", "1000000") as served, served.stream(max_tokens=10**6, n=8) as answer:
        lines = answer.iter_lines()
        assert next(events(lines))["model"] == "gpt-tiny/1"
        os.kill(served.process.pid, signal.SIGINT)
        wait_for(lambda: "stopping; 8 texts under way" in served.said(), 20)
        os.kill(served.process.pid, signal.SIGINT)
        assert served.process.wait(20) == 130, "an orderly stop would return 0"


def test_a_wrong_model_or_a_port_in_use_is_refused_with_the_fix(root: StateRoot, project: Path) -> None:
    bring_versions(root, "gpt-tiny", 1)
    refused(gptflow(project, "serve-model", "gpt-tiny@/7"), 2, "does not name a version", "NAME@ALIAS")
    refused(gptflow(project, "serve-model", "gpt-tiny/7"), 2, "models:/gpt-tiny/7 does not exist", "gptflow models")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = gptflow(project, "serve-model", MODEL, "--port", port)
    refused(done, 1, f"port {port} on 127.0.0.1 cannot be used", "--port")

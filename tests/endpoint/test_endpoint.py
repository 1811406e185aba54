"""The OpenAI-compatible endpoint with OpenAI's own client, wrong requests, lost connections and too many clients."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from gptcore.generation.generate import generate
from gptcore.generation.sampling import Sampling
from tests.endpoint.endpoint import Endpoint, endpoint, tiny_version
from tests.servers import wait_for

MODEL = "gpt-tiny@champion"


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint() as made:
        yield made


@pytest.fixture
def client(served: Endpoint) -> Iterator[Any]:
    """OpenAI's own client."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def written(prompt: str, seed: int, number: int = 1, **settings: Any) -> str:
    """Generate 12 tokens with gptcore itself."""
    loaded = tiny_version(number).loaded
    ids = generate(
        loaded.model, loaded.tokenizer.encode(prompt), 12, seed=seed, eos_id=loaded.tokenizer.eot, **settings
    )
    return loaded.tokenizer.decode(list(ids))


@pytest.mark.slow
def test_a_completion_is_the_text_that_gptcore_writes_and_each_text_has_its_own_seed(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt=["The", "A"], n=2, max_tokens=12, seed=5, echo=True)
    texts = [prompt + written(prompt, seed) for seed, prompt in enumerate(("The", "The", "A", "A"), 5)]
    assert [(one.index, one.text, one.finish_reason) for one in answer.choices] == [
        (index, text, "length") for index, text in enumerate(texts)
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 48, 52)
    assert (answer.model, answer.system_fingerprint, answer.object) == ("gpt-tiny/1", "weights-1", "text_completion")


@pytest.mark.slow
def test_a_prompt_may_be_token_ids_and_our_own_settings_are_applied(client: Any) -> None:
    ids = [list(b"The"), list(b"A")]
    greedy = client.completions.create(model=MODEL, prompt=ids, max_tokens=12, temperature=0)
    assert [one.text for one in greedy.choices] == [written(prompt, 0, temperature=0) for prompt in ("The", "A")]
    one = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=12, seed=1, extra_body={"top_k": 1})
    assert one.choices[0].text == greedy.choices[0].text


@pytest.mark.slow
def test_a_stream_sends_the_same_text_in_chunks_and_ends_with_the_usage(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "The", "max_tokens": 40, "n": 2, "seed": 3}
    whole = client.completions.create(**asked)
    *events, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for index in range(2):
        own = [event.choices[0] for event in events if event.choices[0].index == index]
        assert "".join(one.text for one in own) == whole.choices[index].text
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["length"]
        assert len(own) > 10
    assert last.choices == [] and last.usage == whole.usage


@pytest.mark.slow
def test_a_text_ends_before_its_stop_string_and_a_stream_sends_no_part_of_it(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "The", "max_tokens": 200, "seed": 8}
    text = client.completions.create(**asked).choices[0].text
    stop = text[60:63]
    before = text[: text.index(stop)]
    whole = client.completions.create(**asked, stop=["never to be met", stop])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (before, "stop")
    assert whole.usage is not None and whole.usage.completion_tokens < 200
    pieces = [event.choices[0].text for event in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(pieces) == before


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-5"}, 404, "model", "gpt-5"),
        ({"prompt": None}, 400, "prompt", "missing"),
        ({"prompt": []}, 400, "prompt", "list of token ids"),
        ({"prompt": ["a", 1]}, 400, "prompt", "list of token ids"),
        ({"prompt": [[1], []]}, 400, "prompt", "none of them empty"),
        ({"prompt": [257]}, 400, "prompt", "0 to 256"),
        ({"prompt": [-1]}, 400, "prompt", "no token id -1"),
        ({"prompt": "a" * 33}, 400, "prompt", "has 33 tokens, and the context of gpt-tiny/1 holds 32"),
        ({"prompt": ["a"] * 5, "n": 3}, 400, "prompt", "15 texts"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1 token, or set echo"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"logprobs": 6}, 400, "logprobs", "less than or equal to 5"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "at most 4096"),
        ({"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, 400, "temperature", "finite"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"top_k": -3}, 400, "top_k", "greater than or equal to 0"),
        ({"min_p": 2}, 400, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e-39}, 400, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e300}, 400, "repetition_penalty", "less than or equal to 100"),
        ({"repetition_penalty": float("inf")}, 400, "repetition_penalty", "finite"),
        ({"temperature": 1e300}, 400, "temperature", "less than or equal to 2"),
        ({"max_tokens": 10**4000}, 400, "max_tokens", "at most 4096"),
        ({"seed": 10**4000}, 400, "seed", "less than or equal to"),
        ({"prompt": [10**4000]}, 400, "prompt", "no token id"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"n": 129}, 400, "n", "128"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "none of them empty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "set stream to true"),
        ({"best_of": 2}, 400, "best_of", "not supported"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"frequency_penalty": -1}, 400, "frequency_penalty", "not supported"),
        ({"temprature": 1}, 400, "temprature", "unknown parameter"),
    ],
)
def test_a_wrong_request_is_refused_with_its_parameter(
    served: Endpoint, change: dict[str, Any], status: int, param: str, words: str
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", **change})
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"model": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'"' + b"a" * 2**20 + b'"', 413),
    ],
)
def test_a_body_that_is_not_a_request_is_refused(served: Endpoint, body: bytes, status: int) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unsupported_parameters_with_neutral_values_are_accepted(served: Endpoint) -> None:
    nothing = {"suffix": None, "logprobs": None, "logit_bias": {}, "best_of": 1, "presence_penalty": 0, "user": "me"}
    body = {"model": "models:/gpt-tiny@champion", "prompt": "", "temperature": None, "stop": None, **nothing}
    answer = httpx.post(f"{served.url}/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17}


def test_a_foreign_web_page_cannot_use_the_endpoint(served: Endpoint) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    url = f"{served.url}/v1/completions"
    assert httpx.post(url, json=body, headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.post(url, json=body, headers={"origin": "null"}).status_code == 403
    assert httpx.post(url, json=body, headers={"origin": "http://[::1"}).status_code == 400
    assert httpx.post(url, json=body, headers={"host": f"evil.example:{served.port}"}).status_code == 400
    assert httpx.post(url, content=json.dumps(body), headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, json=body, headers={"origin": served.url}).status_code == 200
    assert httpx.post(url.replace("127.0.0.1", "localhost"), json=body).status_code == 200


def complete(served: Endpoint, **asked: Any) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": MODEL, "prompt": "The", **asked})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_log_probabilities_are_those_of_the_model_for_the_prompt_too_and_a_stream_sends_the_same(
    served: Endpoint,
) -> None:
    asked = {"prompt": ["The sea", "A"], "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": True}
    choices = complete(served, **asked)["choices"]
    loaded = tiny_version(1).loaded
    for choice, prompt in zip(choices, asked["prompt"]):
        lists = choice["logprobs"]
        ids = [ord(token) if len(token) == 1 else int(token[-2:], 16) for token in lists["tokens"]]
        assert ids[: len(prompt)] == list(prompt.encode()) and len(ids) == len(prompt) + 12
        with torch.no_grad():
            expected = torch.log_softmax(loaded.model(torch.tensor([ids]))[0], dim=-1)
        assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
        for place in range(1, len(ids)):
            own = expected[place - 1, ids[place]].item()
            top = lists["top_logprobs"][place]
            assert lists["token_logprobs"][place] == pytest.approx(own, abs=1e-4)
            assert list(top.values())[:3] == pytest.approx(expected[place - 1].topk(3).values.tolist(), abs=1e-4)
            assert top[lists["tokens"][place]] == lists["token_logprobs"][place] and 3 <= len(top) <= 4
        for token, offset in zip(lists["tokens"], lists["text_offset"]):
            assert token.startswith("bytes:") or choice["text"][offset] == token
    body = {"model": MODEL, **asked, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as stream:
        events = [json.loads(line[6:])["choices"][0] for line in stream.iter_lines() if line.startswith("data: {")]
    for index, choice in enumerate(choices):
        own = [event["logprobs"] for event in events if event["index"] == index]
        assert {name: [one for part in own for one in part[name]] for name in own[0]} == choice["logprobs"]


def test_an_echo_alone_scores_a_prompt_as_evaluation_harnesses_do(served: Endpoint) -> None:
    prompt, continuation = list(b"The sea"), list(b" is calm")
    asked = {"prompt": [prompt + continuation], "logprobs": 1, "echo": True, "temperature": 0}
    scored, with_one_more = (complete(served, **asked, max_tokens=count)["choices"][0] for count in (0, 1))
    assert scored["text"] == "The sea is calm" and scored["finish_reason"] == "length"
    assert scored["logprobs"]["token_logprobs"] == with_one_more["logprobs"]["token_logprobs"][:-1]
    with torch.no_grad():
        ids = torch.tensor([prompt + continuation])
        expected = torch.log_softmax(tiny_version(1).loaded.model(ids)[0], dim=-1)
    likelihood = sum(expected[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation))
    assert sum(scored["logprobs"]["token_logprobs"][len(prompt) :]) == pytest.approx(likelihood, abs=1e-4)
    assert complete(served, prompt="", echo=True, max_tokens=0, logprobs=0)["choices"][0]["logprobs"] is not None


def test_log_probabilities_end_where_the_text_ends(served: Endpoint) -> None:
    asked = {"max_tokens": 60, "seed": 8, "logprobs": 0}
    whole = complete(served, **asked)["choices"][0]
    stop = whole["text"][20:23]
    choice = complete(served, **asked, stop=stop)["choices"][0]
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    lists = choice["logprobs"]
    assert lists["tokens"] == whole["logprobs"]["tokens"][: len(lists["tokens"])]
    assert lists["text_offset"][-1] < len(choice["text"]) <= whole["logprobs"]["text_offset"][len(lists["tokens"])]
    assert [list(top) for top in lists["top_logprobs"]] == [[token] for token in lists["tokens"]]


@pytest.mark.slow
def test_the_model_is_listed_and_found_by_its_names(served: Endpoint, client: Any) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.owned_by, listed.created) == (MODEL, "gptflow", 1_700_000_000)
    for name in (MODEL, "gpt-tiny", "gpt-tiny/1", "models:/gpt-tiny/1"):
        assert client.models.retrieve(name) == listed
    with pytest.raises(pytest.importorskip("openai").NotFoundError, match="not served here"):
        client.models.retrieve("gpt-tiny/2")
    answer = httpx.get(f"{served.url}/v1/chat/completions")
    assert answer.status_code == 404 and "/openapi.json" in answer.json()["error"]["message"]


def test_a_full_endpoint_asks_clients_to_retry_and_a_lost_connection_frees_its_place() -> None:
    with endpoint(max_running=1, max_waiting=1, max_tokens=10**9) as small:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 10**8, "stream": True}
        url = f"{small.url}/v1/completions"
        with httpx.stream("POST", url, json=body) as first:
            assert first.status_code == 200
            pieces = first.iter_bytes()
            assert next(pieces).startswith(b"data: {")
            with httpx.stream("POST", url, json=body) as second:
                assert second.status_code == 200
                third = httpx.post(url, json=body)
                assert (third.status_code, third.headers["retry-after"]) == (429, "1")
                assert third.json()["error"]["code"] == "rate_limit_exceeded"
                assert small.scheduler.counts == (1, 1)
        with socket.create_connection(("127.0.0.1", small.port)) as impatient:  # does not wait for the answer
            plain = json.dumps({**body, "stream": False}).encode()
            impatient.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(plain), plain)
            )
            wait_for(lambda: small.scheduler.counts[0] == 1, 10)
        wait_for(lambda: small.scheduler.counts == (0, 0), 10)
        assert httpx.post(url, json={**body, "stream": False, "max_tokens": 3}).status_code == 200


def test_a_new_champion_answers_new_requests_and_the_old_one_finishes_its_own() -> None:
    with endpoint(max_running=2) as made:
        url = f"{made.url}/v1/completions"
        body = {"model": MODEL, "prompt": "The", "max_tokens": 400, "seed": 1, "stream": True}
        with httpx.stream("POST", url, json=body) as old:
            lines = old.iter_lines()
            first = next(lines)
            made.followed.current = tiny_version(2)
            new = httpx.post(url, json={**body, "max_tokens": 12, "stream": False}).json()
            events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
        assert (new["model"], new["choices"][0]["text"]) == ("gpt-tiny/2", written("The", 1, number=2))
        assert {event["model"] for event in events} == {"gpt-tiny/1"}
        assert "".join(event["choices"][0]["text"] for event in events).startswith(written("The", 1).rstrip("\ufffd"))
        assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_text_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint() as made:
        url, body = f"{made.url}/v1/completions", {"model": MODEL, "prompt": "The", "max_tokens": 400, "seed": 1}
        draw = Sampling.draw
        monkeypatch.setattr(Sampling, "draw", lambda self, *given: 1 / 0 if self.top_k == 7 else draw(self, *given))
        with httpx.stream("POST", url, json={**body, "stream": True}) as other:
            lines = other.iter_lines()
            first = next(lines)
            failed = httpx.post(url, json={**body, "top_k": 7})
            assert (failed.status_code, failed.json()["error"]["type"]) == (503, "server_error")
            assert "ZeroDivisionError" in failed.json()["error"]["message"]
            events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_extreme_settings_in_range_leave_other_texts_alone(served: Endpoint) -> None:
    smallest = 5e-324
    extremes = [{"temperature": smallest}, {"top_p": smallest}, {"min_p": smallest}, {"min_p": 1, "top_k": 2**70}]
    extremes += [{"repetition_penalty": penalty, "temperature": 2} for penalty in (0.01, 100)]
    for extreme in extremes:
        body = {"model": MODEL, "prompt": "aaa", "max_tokens": 40, **extreme}
        assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200, extreme


def test_a_failed_generation_reports_its_error_and_later_requests_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint() as made:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
        monkeypatch.setattr("flows.endpoint.scheduler.Batch.step", lambda self: 1 / 0)
        for more in ({}, {"stream": True}):
            answer = httpx.post(f"{made.url}/v1/completions", json={**body, **more})
            assert "ZeroDivisionError" in answer.text and '"type": "server_error"' in answer.text.replace('":"', '": "')
        monkeypatch.undo()
        assert httpx.post(f"{made.url}/v1/completions", json=body).status_code == 200

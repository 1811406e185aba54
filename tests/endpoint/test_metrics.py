"""What Prometheus reads from the endpoint."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.endpoint.endpoint import Endpoint, endpoint, tiny_version
from tests.servers import wait_for

BODY = {"model": "gpt-tiny@champion", "prompt": ["The", "A"], "max_tokens": 5}


def scrape(served: Endpoint) -> dict[str, float]:
    """Return the value of each sample, under its name and labels as in the text."""
    answer = httpx.get(f"{served.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for sample in samples
    }


def test_requests_tokens_times_and_the_version_are_measured_under_vllms_names() -> None:
    with endpoint(max_running=2, max_tokens=10**9) as served:
        url = f"{served.url}/v1/completions"
        assert httpx.post(url, json=BODY).status_code == 200
        assert httpx.post(url, json={**BODY, "max_tokens": 0, "echo": True}).status_code == 200
        assert httpx.post(url, json={**BODY, "n": 0}).status_code == 400
        assert httpx.get(f"{served.url}/nowhere").status_code == 404
        with httpx.stream("POST", url, json={**BODY, "n": 2, "max_tokens": 10**8, "stream": True}) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            found = scrape(served)
            assert (found["vllm:num_requests_running gpt-tiny"], found["vllm:num_requests_waiting gpt-tiny"]) == (2, 2)
        wait_for(lambda: served.scheduler.counts == (0, 0), 20)
        served.followed.current = tiny_version(2)
        found = scrape(served)
        assert found["vllm:request_success_total length gpt-tiny"] == 4
        assert found["vllm:request_success_total abort gpt-tiny"] == 2
        assert found["vllm:prompt_tokens_total gpt-tiny"] == 4 + 4 + 2 * 3
        assert found["vllm:generation_tokens_total gpt-tiny"] > 10
        assert found["vllm:time_to_first_token_seconds_count gpt-tiny"] == 4
        tokens = found["vllm:generation_tokens_total gpt-tiny"]
        assert found["vllm:inter_token_latency_seconds_count gpt-tiny"] == tokens - 4
        assert found["vllm:inter_token_latency_seconds_bucket +Inf gpt-tiny"] == tokens - 4
        assert found["vllm:request_queue_time_seconds_count gpt-tiny"] == 6
        assert found["vllm:e2e_request_latency_seconds_count gpt-tiny"] == 6
        assert found["vllm:e2e_request_latency_seconds_sum gpt-tiny"] > 0
        assert [key for key in found if "model_info" in key] == ["gptflow:model_info weights-2 gpt-tiny 2"]
        assert found["gptflow:http_requests_total /v1/completions 400"] == 1
        assert found["gptflow:http_requests_total other 404"] == 1
        assert found["process_resident_memory_bytes"] > 10**6

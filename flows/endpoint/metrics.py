"""What the endpoint measures for Prometheus, under vLLM's names where vLLM measures the same.

So dashboards for vLLM work. A "request" there is one text; an HTTP request may ask for several.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from flows.endpoint.followed_version import FollowedVersion

CONTENT_TYPE = CONTENT_TYPE_LATEST
PATHS = ("/", "/v1/completions", "/v1/models", "/card", "/health", "/metrics", "/openapi.json")
"""Paths that are counted under their own name."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper ends of the histograms' buckets."""
_LABELS = ("model_name",)


class Metrics:
    """All measurements of one server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time and open files of the process
        self._http = Counter("gptflow:http_requests", "HTTP requests answered.", ("path", "status"), registry=registry)
        self._version = Gauge(
            "gptflow:model_info",
            "1 for the version that is served.",
            (*_LABELS, "version", "fingerprint"),
            registry=registry,
        )
        self._running = Gauge("vllm:num_requests_running", "Texts being generated.", _LABELS, registry=registry)
        self._waiting = Gauge("vllm:num_requests_waiting", "Texts waiting.", _LABELS, registry=registry)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts read.", _LABELS, registry=registry)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.", _LABELS, registry=registry)
        self.finished = Counter(
            "vllm:request_success",
            "Texts that have ended: stop, length, abort (the client is gone) or error.",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self.queue_time = _make_histogram("vllm:request_queue_time_seconds", "Time in the queue.", registry)
        self.first_token = _make_histogram("vllm:time_to_first_token_seconds", "Time to the first token.", registry)
        self.between_tokens = _make_histogram("vllm:inter_token_latency_seconds", "Time between two tokens.", registry)
        self.whole_time = _make_histogram("vllm:e2e_request_latency_seconds", "Time to the end of a text.", registry)

    def count_http(self, path: str, status: int) -> None:
        """Count an HTTP request that was answered."""
        self._http.labels(path if path in PATHS else "other", status).inc()

    def render(self, followed: FollowedVersion, running: int, waiting: int) -> bytes:
        """Return everything in Prometheus's text format. `running` and `waiting` are the numbers of texts now."""
        current = followed.current
        self._version.clear()
        self._version.labels(current.name, current.version, current.fingerprint).set(1)
        self._running.labels(current.name).set(running)
        self._waiting.labels(current.name).set(waiting)
        return generate_latest(self.registry)


class TextTimer:
    """Measures one text, from its request to its end. Times are in seconds, by one clock."""

    def __init__(self, metrics: Metrics, model_name: str, submitted: float, num_prompt_tokens: int, now: float) -> None:
        """Begin to generate the text, which was submitted earlier."""
        self._metrics, self._model_name, self._submitted = metrics, model_name, submitted
        self._last: float | None = None
        self._between_tokens = metrics.between_tokens.labels(model_name)
        self._generation_tokens = metrics.generation_tokens.labels(model_name)
        metrics.queue_time.labels(model_name).observe(now - submitted)
        metrics.prompt_tokens.labels(model_name).inc(num_prompt_tokens)

    def add_token(self, now: float) -> None:
        """Count a token."""
        self._generation_tokens.inc()
        if self._last is None:
            self._metrics.first_token.labels(self._model_name).observe(now - self._submitted)
        else:
            self._between_tokens.observe(now - self._last)
        self._last = now

    def finish(self, reason: str, now: float) -> None:
        """Count the end of the text."""
        self._metrics.finished.labels(self._model_name, reason).inc()
        self._metrics.whole_time.labels(self._model_name).observe(now - self._submitted)


def _make_histogram(name: str, meaning: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, meaning, _LABELS, registry=registry, buckets=_SECONDS)

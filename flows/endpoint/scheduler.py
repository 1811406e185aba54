"""The scheduler: one thread that generates the texts of all requests side by side.

Each decode step adds one token to every running text. Requests join and leave between two steps (continuous batching:
Yu et al. 2022, "Orca"). A text keeps the version that was served when its request arrived. While the champion changes,
the batches of two versions take turns. The event loop's own thread delivers the new chunks, once per step. See
completion.py for what an HTTP request makes of them.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from flows.endpoint.followed_version import ServedVersion
from flows.endpoint.metrics import Metrics, TextTimer
from gptcore.errors import GPTCoreError
from gptcore.generation.batch import Batch, Request
from gptcore.generation.generate import TextStream
from gptcore.generation.logprobs import ScoredToken, score_prompt
from gptcore.generation.sampling import Sampling

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """The part of a text that was generated since the chunk before."""

    index: int
    """The text's position among the texts of its HTTP request."""
    text: str
    num_tokens: int
    """Tokens of the whole text so far."""
    finish_reason: str | None = None
    """`stop` or `length` in the last chunk of a text."""
    problem: str | None = None
    """Why the text ends too early."""
    scores: Sequence[ScoredToken] = ()
    """The tokens since the chunk before, if the request asks for log probabilities. The first chunk begins with those
    of the prompt, if the request asks for them."""

    @property
    def is_last(self) -> bool:
        """Whether the text has ended."""
        return bool(self.finish_reason or self.problem)


@dataclass(eq=False)
class TextRequest:
    """The request for one text. An HTTP request may ask for several texts."""

    version: ServedVersion
    index: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    stop: Sequence[str]
    on_chunk: Callable[[Chunk], None]
    """Called in the event loop's thread."""
    top_logprobs: int | None = None
    """Number of likeliest tokens to report with each token, or None for no log probabilities."""
    scores_prompt: bool = False
    """Whether the tokens of the prompt get log probabilities too."""
    submitted: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False
    """The client no longer waits for the text."""


class QueueFull(Exception):
    """No further text fits: the maximum of running and waiting texts is reached."""


class ServerStopping(Exception):
    """The server is stopping and accepts no further requests."""


@dataclass(eq=False)
class _RunningText:
    """A text that is being generated."""

    request: TextRequest
    row: Request
    """The text's row of the batch."""
    stream: TextStream
    timer: TextTimer
    num_sent: int = 0
    """Tokens that earlier chunks have covered."""
    scores: list[ScoredToken] = field(default_factory=list)
    """Scores that no chunk has covered."""
    num_scored: int = 0
    """Drawn tokens whose scores have been taken."""

    def next_chunk(self) -> Chunk:
        """Decode the tokens that are new since the last call."""
        index, row, stream = self.request.index, self.row, self.stream
        if row.error is not None:
            return _failed_chunk(self.request, row.error)
        new_ids = row.ids[self.num_sent :]
        self.num_sent = len(row.ids)
        try:
            decoded = "".join(stream.push(token) for token in new_ids)
        except Exception as error:  # for example, a model may have more ids than its tokenizer
            return _failed_chunk(self.request, error)
        if row.finish_reason and not stream.stopped:
            decoded += stream.finish()
        reason = "stop" if stream.stopped else row.finish_reason
        self.scores += row.scores[self.num_scored :]
        self.num_scored = len(row.scores)
        if not (decoded or reason):
            return Chunk(index, "", self.num_sent)
        scores, self.scores = self.scores, []
        return Chunk(index, decoded, self.num_sent, reason, scores=scores)


class _VersionBatch:
    """The running texts of one version, and the batch that generates them."""

    def __init__(self, version: ServedVersion, rows: int, metrics: Metrics) -> None:
        self.version, self.metrics = version, metrics
        self.batch = Batch(version.loaded.model, rows)
        self.running: dict[int, _RunningText] = {}

    def add(self, request: TextRequest) -> Chunk | None:
        """Begin to generate the text of a request. Return its only chunk if it asks for no new token."""
        loaded, top = request.version.loaded, request.top_logprobs
        scores = []
        if request.scores_prompt and top is not None:
            scores = score_prompt(loaded.model, request.prompt_ids, top)
        now = time.perf_counter()
        timer = TextTimer(self.metrics, self.version.name, request.submitted, len(request.prompt_ids), now)
        if request.max_new_tokens == 0:
            timer.finish("length", now)
            return Chunk(request.index, "", 0, "length", scores=scores)
        row = self.batch.add(
            request.prompt_ids,
            request.max_new_tokens,
            request.sampling,
            seed=request.seed,
            eos_id=loaded.tokenizer.eot,
            top_logprobs=top,
        )
        stream = TextStream(loaded.tokenizer, request.stop)
        self.running[id(row)] = _RunningText(request, row, stream, timer, scores=scores)
        return None

    def drop(self, running: _RunningText) -> None:
        """Stop generating a text, whether or not it has ended."""
        self.batch.drop(running.row)
        del self.running[id(running.row)]

    def step(self) -> list[tuple[TextRequest, Chunk]]:
        """Generate one token of every text. Return the chunks to deliver, each with its request."""
        for running in [running for running in self.running.values() if running.request.is_cancelled]:
            self.drop(running)
            running.timer.finish("abort", time.perf_counter())
        deliveries = []
        rows = self.batch.step() if self.running else ()
        now = time.perf_counter()
        for row in rows:
            running = self.running[id(row)]
            if len(row.ids) > running.num_sent:
                running.timer.add_token(now)
            chunk = running.next_chunk()
            if chunk.text or chunk.is_last:
                deliveries.append((running.request, chunk))
            if row.error is not None:
                _log.error("%s could not continue a text: %r", self.version.id, row.error)
            if chunk.is_last:
                running.timer.finish(chunk.finish_reason or "error", now)
            if row.finish_reason:
                del self.running[id(row)]
            elif chunk.is_last:
                self.drop(running)
        return deliveries


@dataclass
class Scheduler:
    """Generates up to `max_running` texts at once. Up to `max_waiting` more texts wait for a free row of a batch."""

    max_running: int
    max_waiting: int
    metrics: Metrics = field(default_factory=Metrics)
    _batches: dict[ServedVersion, _VersionBatch] = field(default_factory=dict)
    _waiting: deque[TextRequest] = field(default_factory=deque)
    _changed: Condition = field(default_factory=Condition)
    _num_running: int = 0
    _accepts_requests: bool = True
    _stop_reason: str | None = None
    """Set when everything has to end."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread. The thread ends with the process, or after `stop`."""
        self._loop = loop
        Thread(target=self._run, name="scheduler", daemon=True).start()

    @property
    def capacity(self) -> int:
        """The maximum number of texts, running and waiting."""
        return self.max_running + self.max_waiting

    @property
    def counts(self) -> tuple[int, int]:
        """The number of running texts and the number of waiting texts."""
        return self._num_running, len(self._waiting)

    @property
    def accepts_requests(self) -> bool:
        return self._accepts_requests

    def submit(self, requests: Sequence[TextRequest]) -> None:
        """Queue all of the requests, or none. Raise QueueFull or ServerStopping."""
        with self._changed:
            if not self._accepts_requests:
                raise ServerStopping
            if self._num_running + len(self._waiting) + len(requests) > self.capacity:
                raise QueueFull
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, requests: Iterable[TextRequest]) -> None:
        """Forget the requests: waiting ones at once, running ones before the next step."""
        with self._changed:
            for request in requests:
                request.is_cancelled = True
                with suppress(ValueError):
                    self._waiting.remove(request)

    def stop_accepting(self) -> None:
        """Accept no further requests. Texts that were accepted before are still generated."""
        with self._changed:
            self._accepts_requests = False

    def stop(self, reason: str) -> None:
        """End the thread and all texts. The last chunk of each text has `reason` as its problem."""
        self.stop_accepting()
        with self._changed:
            self._stop_reason = reason
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_for_work() is None:
            for request in self._take_waiting():
                self._add_to_batch(request)
            deliveries = [delivery for batch in list(self._batches.values()) for delivery in self._step(batch)]
            self._deliver(deliveries)
            self._release_idle_batches()
        self._fail_all(str(self._stop_reason))

    def _wait_for_work(self) -> str | None:
        """Wait until a text is waiting or running. Return the reason if everything has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason or self._waiting or self._num_running)
            return self._stop_reason

    def _take_waiting(self) -> list[TextRequest]:
        """Take as many requests out of the queue as there are free rows, in the order of their arrival."""
        with self._changed:
            count = min(self.max_running - self._num_running, len(self._waiting))
            self._num_running += count
            return [self._waiting.popleft() for _ in range(count)]

    def _add_to_batch(self, request: TextRequest) -> None:
        try:
            if request.version not in self._batches:
                self._batches[request.version] = _VersionBatch(request.version, self.max_running, self.metrics)
            if chunk := self._batches[request.version].add(request):
                self._deliver([(request, chunk)])
        except Exception as error:  # a text that cannot be started must not end the other texts
            _log.exception("a text could not be started")
            self._deliver([(request, _failed_chunk(request, error))])

    def _step(self, batch: _VersionBatch) -> list[tuple[TextRequest, Chunk]]:
        try:
            return batch.step()
        except Exception as error:  # later requests get a new batch, which may work
            _log.exception("%s failed while it generated", batch.version.id)
            del self._batches[batch.version]
            for running in batch.running.values():
                running.timer.finish("error", time.perf_counter())
            return [(running.request, _failed_chunk(running.request, error)) for running in batch.running.values()]

    def _release_idle_batches(self) -> None:
        """Count the running texts, and release the memory of idle versions. The newest version keeps its batch."""
        with self._changed:
            self._num_running = sum(len(batch.running) for batch in self._batches.values())
        for version in [version for version, batch in self._batches.items() if not batch.running]:
            if version is not next(reversed(self._batches)):
                del self._batches[version]

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            running = [running.request for batch in self._batches.values() for running in batch.running.values()]
            unfinished = [*running, *self._waiting]
            self._waiting.clear()
            self._num_running = 0
        self._deliver([(request, Chunk(request.index, "", 0, problem=reason)) for request in unfinished])

    def _deliver(self, deliveries: Sequence[tuple[TextRequest, Chunk]]) -> None:
        with suppress(RuntimeError):  # the event loop is closed, so no client waits
            if deliveries:
                self._loop.call_soon_threadsafe(_call_clients, deliveries)


def _call_clients(deliveries: Sequence[tuple[TextRequest, Chunk]]) -> None:
    for request, chunk in deliveries:
        if not request.is_cancelled:
            request.on_chunk(chunk)


def _failed_chunk(request: TextRequest, error: Exception) -> Chunk:
    """Return the last chunk of a text that failed.

    It has the message of a GPTCoreError, but only the class of another error, whose message may hold anything.
    """
    reason = str(error) if isinstance(error, GPTCoreError) else type(error).__name__
    return Chunk(request.index, "", 0, problem=f"the text could not be generated: {reason}")

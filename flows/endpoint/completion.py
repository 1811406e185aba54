"""One HTTP request for completions, from its prompts to the last chunk of its answer."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.endpoint.access import add_to_log
from flows.endpoint.followed_version import ServedVersion
from flows.endpoint.protocol import (
    LOGPROB_LISTS,
    Answer,
    CompletionRequest,
    Prompt,
    RequestError,
    choice_body,
    encode_event,
    usage_body,
)
from flows.endpoint.scheduler import Chunk, QueueFull, Scheduler, ServerStopping, TextRequest
from gptcore.errors import ConfigError
from gptcore.generation.logprobs import ScoredToken
from gptcore.generation.sampling import Sampling
from gptcore.tokens.tokenizer import Tokenizer

RETRY_AFTER_SECONDS = 1
"""When a client may try again after it was refused because the queue was full."""


@dataclass
class Completion:
    """An answer that is being generated."""

    request: CompletionRequest
    version: ServedVersion
    scheduler: Scheduler
    prompts: Sequence[Sequence[int]]
    answer: Answer
    text_requests: list[TextRequest] = field(default_factory=list)
    queue: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    num_tokens: dict[int, int] = field(default_factory=dict)
    """Tokens of each text so far."""
    num_ended: int = 0
    scope: Scope = field(default_factory=dict)

    @classmethod
    async def create(cls, request: CompletionRequest, version: ServedVersion, scheduler: Scheduler) -> "Completion":
        """Tokenize the prompts. Raises RequestError if there are too many texts or a prompt does not fit."""
        if (count := len(request.prompt) * request.n) > scheduler.capacity:
            raise RequestError(
                f"the request asks for {count} texts; this server has room for {scheduler.capacity} at once", "prompt"
            )
        prompts = await asyncio.to_thread(lambda: [_encode_prompt(prompt, version) for prompt in request.prompt])
        return cls(request, version, scheduler, prompts, Answer(version.id, version.fingerprint))

    def submit(self, scope: Scope) -> None:
        """Submit all texts to the scheduler. Raises RequestError if there is no room.

        What becomes of them is logged with the HTTP request that has this scope.
        """
        request, self.scope = self.request, scope
        try:
            sampling = Sampling(
                temperature=request.temperature,
                top_k=request.top_k or None,
                top_p=request.top_p,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
            )
        except ConfigError as error:
            raise RequestError(str(error)) from None
        self.text_requests = [
            TextRequest(
                version=self.version,
                index=index,
                prompt_ids=self.prompts[index // request.n],
                max_new_tokens=request.max_tokens,
                sampling=sampling,
                seed=None if request.seed is None else request.seed + index,
                stop=request.stop,
                on_chunk=self.queue.put_nowait,
                top_logprobs=request.logprobs,
                scores_prompt=request.echo and self.prompt_of(index) != "",
            )
            for index in range(len(self.prompts) * request.n)
        ]
        try:
            self.scheduler.submit(self.text_requests)
        except QueueFull:
            raise _busy_error("the server's queue is full", 429, "rate_limit_exceeded") from None
        except ServerStopping:
            raise _busy_error("the server is stopping", 503, "stopping") from None

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield chunks as they arrive, until all texts have ended. Raises RequestError if a text failed.

        If the request asks for an echo, the first chunk of a text begins with its prompt.
        """
        unechoed = set(range(len(self.text_requests))) if self.request.echo else set()
        while self.num_ended < len(self.text_requests):
            chunk = await self.queue.get()
            if chunk.problem:
                raise RequestError(chunk.problem, status=503, type="server_error")
            self.num_tokens[chunk.index] = chunk.num_tokens
            self.num_ended += chunk.is_last
            if chunk.index in unechoed:
                unechoed.remove(chunk.index)
                prompt, tokenizer = self.prompt_of(chunk.index), self.version.loaded.tokenizer
                text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
                chunk = replace(chunk, text=text + chunk.text)
            yield chunk

    def prompt_of(self, index: int) -> Prompt:
        """Return the prompt of a text, as the request gives it."""
        return self.request.prompt[index // self.request.n]

    def start_logprobs(self) -> "list[_Logprobs] | None":
        """Return a collection of log probabilities for each text, or None if the request does not ask for them."""
        if self.request.logprobs is None:
            return None
        return [_Logprobs(self.version.loaded.tokenizer) for _ in self.text_requests]

    async def respond(self, http_request: Request) -> Response:
        """Return the whole answer, or an empty response (status 499) as soon as the client has disconnected."""
        disconnect = asyncio.ensure_future(_wait_for_disconnect(http_request))
        collected = asyncio.ensure_future(self.collect())
        try:
            await asyncio.wait((disconnect, collected), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(collected.result()) if collected.done() else Response(status_code=499)
        finally:
            disconnect.cancel()
            collected.cancel()
            self.close()

    async def collect(self) -> dict[str, Any]:
        """Wait for all texts, and return the JSON of the whole answer."""
        choices = [choice_body(index, "", None) for index in range(len(self.text_requests))]
        logprobs = self.start_logprobs()
        async for chunk in self.chunks():
            choice = choices[chunk.index]
            choice["text"] += chunk.text
            choice["finish_reason"] = chunk.finish_reason
            if logprobs is not None:
                more, known = logprobs[chunk.index].release(chunk), choice["logprobs"] or {}
                choice["logprobs"] = {name: [*known.get(name, ()), *more[name]] for name in LOGPROB_LISTS}
        return self.answer.body(choices, usage=self.usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events. A failure on the way is an event too."""
        more = {"usage": None} if self.request.include_usage else {}
        logprobs = self.start_logprobs()
        try:
            async for chunk in self.chunks():
                scores = None if logprobs is None else logprobs[chunk.index].release(chunk)
                choice = choice_body(chunk.index, chunk.text, chunk.finish_reason, scores)
                yield encode_event(self.answer.body([choice], **more))
        except RequestError as error:
            add_to_log(self.scope, error=str(error))
            yield encode_event(error.body)
            return
        if self.request.include_usage:
            yield encode_event(self.answer.body([], usage=self.usage()))
        yield encode_event("[DONE]")

    def usage(self) -> dict[str, int]:
        """Count the tokens read and generated so far."""
        return usage_body(sum(map(len, self.prompts)), sum(self.num_tokens.values()))

    def close(self) -> None:
        """Cancel the texts that have not ended, and log what was generated."""
        self.scheduler.cancel(self.text_requests)
        texts = {"texts": len(self.text_requests), "ended": self.num_ended}
        add_to_log(self.scope, model=self.version.id, **texts, **self.usage())


class _Logprobs:
    """The log probabilities of one text, as OpenAI's lists. They arrive in chunks.

    A token is released with the text that it begins in. So the tokens of a stop string, which the text does not show,
    are not reported. An end-of-text token has no text, and is reported.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_decoded, self._num_shown = 0, 0
        self._pending: list[tuple[int, ScoredToken]] = []
        """Tokens that have not been released, each after the number of characters before it."""

    def release(self, chunk: Chunk) -> dict[str, list[Any]]:
        """Return the lists for the tokens that a chunk shows."""
        eot = self._tokenizer.eot
        for score in chunk.scores:
            spelled = self._tokenizer.decode_bytes([score.token])
            incomplete, _ = self._decoder.getstate()
            is_new = bool(incomplete) and not 0x80 <= spelled[0] < 0xC0  # the bytes before become a U+FFFD
            self._pending.append((self._num_decoded + is_new, score))
            self._num_decoded += len(self._decoder.decode(spelled))
        self._num_shown += len(chunk.text)
        ends_whole = chunk.finish_reason == "length"
        ends_by_eot = chunk.finish_reason == "stop" and bool(self._pending) and self._pending[-1][1].token == eot
        count = len(self._pending) if ends_whole or ends_by_eot else self._count_shown()
        released, self._pending = self._pending[:count], self._pending[count:]
        return {
            "tokens": [self._spell(score.token) for _, score in released],
            "token_logprobs": [score.logprob for _, score in released],
            "top_logprobs": [self._make_top(score) for _, score in released],
            "text_offset": [offset for offset, _ in released],
        }

    def _count_shown(self) -> int:
        return sum(offset < self._num_shown for offset, _ in self._pending)

    def _make_top(self, score: ScoredToken) -> dict[str, float] | None:
        """Return the likeliest tokens with their log probabilities, and the token itself after them."""
        if score.logprob is None:
            return None
        return {self._spell(token): logprob for token, logprob in (*score.top, (score.token, score.logprob))}

    def _spell(self, token: int) -> str:
        """Return the token's text, or, if it is only a part of a character, its bytes as OpenAI writes them."""
        spelled = self._tokenizer.decode_bytes([token])
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class EventStream(StreamingResponse):
    """A completion as a stream of events. The completion is closed however the response ends."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.completion.close()


def _encode_prompt(prompt: Prompt, version: ServedVersion) -> list[int]:
    """Return the prompt's ids. An empty string begins a new document.

    Raises RequestError for ids that do not exist, and for a prompt longer than the model's context.
    """
    tokenizer, context = version.loaded.tokenizer, version.loaded.model.context_length
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    wrong = next((token for token in ids if not 0 <= token < tokenizer.n_vocab), None)
    if wrong is not None:
        raise RequestError(f"prompt: there is no token id {wrong} (expected 0 to {tokenizer.n_vocab - 1})", "prompt")
    if len(ids) > context:
        message = f"the prompt has {len(ids)} tokens, and the context of {version.id} holds {context}: shorten it"
        raise RequestError(message, "prompt", code="context_length_exceeded")
    return ids


def _busy_error(message: str, status: int, code: str) -> RequestError:
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    kind = "rate_limit_error" if status == 429 else "server_error"
    return RequestError(f"{message}: try again in a moment", status=status, type=kind, code=code, headers=headers)


async def _wait_for_disconnect(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass

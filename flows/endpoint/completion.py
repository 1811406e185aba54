"""One HTTP request for completions, from its prompts to the last chunk of its answer."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.endpoint.followed_version import ServedVersion
from flows.endpoint.protocol import (
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
from gptcore.generation.sampling import Sampling

RETRY_AFTER_SECONDS = 1
"""When a client may try again after it was refused because the queue was full."""
_log = logging.getLogger(__name__)


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
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    async def create(cls, request: CompletionRequest, version: ServedVersion, scheduler: Scheduler) -> "Completion":
        """Tokenize the prompts. Raises RequestError if there are too many texts or a prompt does not fit."""
        if (count := len(request.prompt) * request.n) > scheduler.capacity:
            raise RequestError(
                f"the request asks for {count} texts; this server has room for {scheduler.capacity} at once", "prompt"
            )
        prompts = await asyncio.to_thread(lambda: [_encode_prompt(prompt, version) for prompt in request.prompt])
        return cls(request, version, scheduler, prompts, Answer(version.id, version.fingerprint))

    def submit(self) -> None:
        """Submit all texts to the scheduler. Raises RequestError if there is no room."""
        request = self.request
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
        """Yield chunks as they arrive, until all texts have ended. Raises RequestError if a text failed."""
        if self.request.echo:
            for index, text_request in enumerate(self.text_requests):
                prompt = self.request.prompt[index // self.request.n]
                tokenizer = self.version.loaded.tokenizer
                text = prompt if isinstance(prompt, str) else tokenizer.decode(text_request.prompt_ids)
                yield Chunk(index, text, 0)
        while self.num_ended < len(self.text_requests):
            chunk = await self.queue.get()
            if chunk.problem:
                raise RequestError(chunk.problem, status=503, type="server_error")
            self.num_tokens[chunk.index] = chunk.num_tokens
            self.num_ended += chunk.is_last
            yield chunk

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
        texts, reasons = [""] * len(self.text_requests), [""] * len(self.text_requests)
        async for chunk in self.chunks():
            texts[chunk.index] += chunk.text
            reasons[chunk.index] = chunk.finish_reason or ""
        choices = [choice_body(index, text, reasons[index]) for index, text in enumerate(texts)]
        return self.answer.body(choices, usage=self.usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events. A failure on the way is an event too."""
        more = {"usage": None} if self.request.include_usage else {}
        try:
            async for chunk in self.chunks():
                choice = choice_body(chunk.index, chunk.text, chunk.finish_reason)
                yield encode_event(self.answer.body([choice], **more))
        except RequestError as error:
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
        usage = self.usage()
        _log.info(
            "%s: %d of %d texts, %d + %d tokens, %.2f s",
            self.version.id,
            self.num_ended,
            len(self.text_requests),
            usage["prompt_tokens"],
            usage["completion_tokens"],
            time.perf_counter() - self.began,
        )


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

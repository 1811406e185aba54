"""An answer under way, from the request's texts to the last piece of them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flows.serving.following import Served
from flows.serving.protocol import Answer, CompletionRequest, Prompt, Refused, choice, event, usage
from flows.serving.writer import Full, Order, Piece, Stopping, Writer
from gptcore.errors import ConfigError
from gptcore.writing.sampling import Sampling

RETRY_SECONDS = 1
"""When a client that found no room may ask again."""
_log = logging.getLogger(__name__)


@dataclass
class Completion:
    """An answer under way."""

    asked: CompletionRequest
    served: Served
    prompts: Sequence[Sequence[int]]
    answer: Answer
    orders: list[Order] = field(default_factory=list)
    pieces: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    num_tokens: dict[int, int] = field(default_factory=dict)
    """Of each text so far."""
    num_ended: int = 0
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    async def of(cls, asked: CompletionRequest, served: Served, most: int) -> "Completion":
        """Raises Refused if the prompts do not fit. `most` is how many texts there may be."""
        if (count := len(asked.prompt) * asked.n) > most:
            raise Refused(f"{count} texts are asked for; this server has room for {most} at once", "prompt")
        prompts = await asyncio.to_thread(lambda: [_ids(prompt, served) for prompt in asked.prompt])
        return cls(asked, served, prompts, Answer(served.id, served.fingerprint))

    def begin(self, writer: Writer) -> None:
        """Hands all texts to the writer. Raises Refused if there is no room."""
        asked = self.asked
        try:
            sampling = Sampling(
                asked.temperature, asked.top_k or None, asked.top_p, asked.min_p, asked.repetition_penalty
            )
        except ConfigError as error:
            raise Refused(str(error)) from None
        for index in range(len(self.prompts) * asked.n):
            ids, seed = self.prompts[index // asked.n], None if asked.seed is None else asked.seed + index
            given = (self.served, index, ids, asked.max_tokens, sampling, seed, asked.stop, self.pieces.put_nowait)
            self.orders.append(Order(*given))
        try:
            writer.submit(self.orders)
        except Full:
            raise _busy(
                "as many texts are written and waited for as there may be", 429, "rate_limit_exceeded"
            ) from None
        except Stopping:
            raise _busy("the server is stopping", 503, "stopping") from None
        self.writer = writer

    async def texts(self) -> AsyncIterator[Piece]:
        """Pieces as they come, until all texts have ended. Raises Refused if one could not be written."""
        if self.asked.echo:
            for index, order in enumerate(self.orders):
                prompt = self.asked.prompt[index // self.asked.n]
                said = prompt if isinstance(prompt, str) else self.served.loaded.tokenizer.decode(order.ids)
                yield Piece(index, said, 0)
        while self.num_ended < len(self.orders):
            piece = await self.pieces.get()
            if piece.problem:
                raise Refused(piece.problem, status=503, type="server_error")
            self.num_tokens[piece.index] = piece.num_tokens
            self.num_ended += piece.is_last
            yield piece

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; an empty one that nobody reads, once the client has gone away."""
        gone = asyncio.ensure_future(_gone(request))
        collected = asyncio.ensure_future(self.collected())
        try:
            await asyncio.wait((gone, collected), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(collected.result()) if collected.done() else Response(status_code=499)
        finally:
            gone.cancel()
            collected.cancel()
            self.end()

    async def collected(self) -> dict[str, Any]:
        """The JSON of the whole answer."""
        texts, reasons = [""] * len(self.orders), [""] * len(self.orders)
        async for piece in self.texts():
            texts[piece.index] += piece.text
            reasons[piece.index] = piece.finish_reason or ""
        choices = [choice(index, text, reasons[index]) for index, text in enumerate(texts)]
        return self.answer.part(choices, usage=self.usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. What goes wrong in its midst is an event, too."""
        more = {"usage": None} if self.asked.include_usage else {}
        try:
            async for piece in self.texts():
                part = choice(piece.index, piece.text, piece.finish_reason)
                yield event(self.answer.part([part], **more))
        except Refused as error:
            yield event(error.body)
            return
        if self.asked.include_usage:
            yield event(self.answer.part([], usage=self.usage()))
        yield event("[DONE]")

    def usage(self) -> dict[str, int]:
        """What was read and written so far."""
        return usage(sum(map(len, self.prompts)), sum(self.num_tokens.values()))

    def end(self) -> None:
        """Lets go of what is still to be written, and says what was."""
        self.writer.drop(self.orders)
        took, used = time.perf_counter() - self.began, self.usage()
        _log.info(
            "%s: %d of %d texts, %d + %d tokens, %.2f s",
            *(self.served.id, self.num_ended, len(self.orders)),
            *(used["prompt_tokens"], used["completion_tokens"], took),
        )


class EventStream(StreamingResponse):
    """Events, and an end to the writing however the response ends."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.completion.end()


def _ids(prompt: Prompt, served: Served) -> list[int]:
    """An empty string begins a new document. Raises Refused for ids that do not exist, and for more than fit."""
    tokenizer, context = served.loaded.tokenizer, served.loaded.model.context_length
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    wrong = next((token for token in ids if not 0 <= token < tokenizer.n_vocab), None)
    if wrong is not None:
        raise Refused(f"prompt: there is no token id {wrong}; they are 0 to {tokenizer.n_vocab - 1}", "prompt")
    if len(ids) > context:
        message = f"the prompt has {len(ids)} tokens, and the context of {served.id} holds {context}: shorten it"
        raise Refused(message, "prompt", code="context_length_exceeded")
    return ids


def _busy(message: str, status: int, code: str) -> Refused:
    again = {"retry-after": str(RETRY_SECONDS)}
    kind = "rate_limit_error" if status == 429 else "server_error"
    return Refused(f"{message}: try again in a moment", status=status, type=kind, code=code, headers=again)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

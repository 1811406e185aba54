"""Several requests that one model continues at the same time, each with its own length, settings and end.

A decode step predicts one token for every request, so the weights are read from memory once for all of them. Requests
join and leave between two steps: a new request does not wait for the others to finish. This is "continuous batching"
(Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI). The KV cache is in
kv_cache.py. Queues and clients are in flows/endpoint/scheduler.py.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from operator import index
from typing import Literal

import torch
from torch import Tensor, nn

from gptcore.errors import CheckpointError, ConfigError
from gptcore.generation.kv_cache import Decoder, UncachedDecoder
from gptcore.generation.logprobs import ScoredToken, score_tokens
from gptcore.generation.quantize import INT8_KINDS
from gptcore.generation.sampling import NOT_NUMBERS, Sampling
from gptcore.model.gpt import GPTModel, is_untouched_gpt

_PREFILL_TOKENS = 4096
"""Limit on the tokens of several prompts in one prefill: their features are in memory together."""


class Request:
    """One prompt and the tokens that the model has added to it."""

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        eos_ids: frozenset[int],
        top_logprobs: int | None,
    ) -> None:
        self.ids: list[int] = []
        """The ids drawn so far, without the end-of-text id."""
        self.scores: list[ScoredToken] = []
        """The ids drawn so far, with the end-of-text id, and their log probabilities, if the request asks for them."""
        self.finish_reason: Literal["stop", "length", "error"] | None = None
        """Why the request ended: "stop" by an end-of-text id, "length" by max_new_tokens, "error". None before that."""
        self.error: Exception | None = None
        """The error that ended the request, if `finish_reason` is "error"."""
        self.window = list(prompt)
        """The ids from which the next one is predicted."""
        self.sampling = sampling
        self._max_new_tokens, self._eos_ids, self._top_logprobs = max_new_tokens, eos_ids, top_logprobs
        self._generator = torch.Generator()
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        self._seen = set(prompt)

    def advance(self, logits: Tensor) -> None:
        """Draw the next id from logits (vocabulary,) on the CPU and append it. An error finishes this request alone."""
        try:
            token = self.sampling.draw(logits, self._seen, self._generator)
            self.score(token, logits)
            self.append(token)
        except Exception as error:  # of any kind: the other requests of the batch continue
            self.fail(error)

    @staticmethod
    def advance_together(requests: "Sequence[Request]", logits: Tensor) -> None:
        """Do what `advance` does for all requests, from logits (requests, vocabulary), on the device of the logits.

        Requests with the same settings are drawn at once.
        """
        by_sampling: dict[Sampling, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            by_sampling[request.sampling].append(row)
        for sampling, rows in by_sampling.items():
            chosen = [requests[row] for row in rows]
            seen, generators = [one._seen for one in chosen], [one._generator for one in chosen]
            try:
                ids = sampling.draw_rows(logits[rows] if len(by_sampling) > 1 else logits, seen, generators)
            except Exception as error:  # of any kind: requests with other settings continue
                for request in chosen:
                    request.fail(error)
                continue
            for row, request, token in zip(rows, chosen, ids):
                if token < 0:
                    request.fail(CheckpointError(NOT_NUMBERS))
                else:
                    request.score(token, logits[row])
                    request.append(token)

    def fail(self, error: Exception) -> None:
        """Finish the request because of an error."""
        self.error, self.finish_reason = error, "error"

    def score(self, token: int, logits: Tensor) -> None:
        """Store the log probability of the token that was drawn from logits (vocabulary,), if they are asked for."""
        if self._top_logprobs is not None:
            self.scores += score_tokens(logits[None], [token], self._top_logprobs)

    def append(self, token: int) -> None:
        """Append the id that was drawn, or finish the request."""
        if token in self._eos_ids:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        self.window.append(token)
        self._seen.add(token)
        if len(self.ids) == self._max_new_tokens:
            self.finish_reason = "length"


class Batch:
    """Up to `rows` requests at once. A request gets the same text alone or among others, up to rounding.

    When a request's context is full, the batch drops its older half and reads the rest again from position 0: positions
    may be learned, so keys cannot be moved. Dropout is never applied.

    Example: `batch = Batch(model, rows=8)`, `request = batch.add(ids, max_new_tokens=50)`, then `batch.step()` until
    `request.finish_reason` is set; `request.ids` holds the new ids.
    """

    def __init__(self, model: GPTModel, rows: int, max_tokens: int | None = None) -> None:
        """Allocate the KV cache: `rows` requests of `max_tokens` tokens, prompt included (default: the context)."""
        self._decoder: Decoder | UncachedDecoder = (
            Decoder(model, rows, max_tokens) if is_untouched_gpt(model, *INT8_KINDS) else UncachedDecoder(model)
        )
        # Copying the logits and filtering them row by row would take longer than a GPU's decode step. Apple's GPUs have
        # no doubles, which a draw needs.
        self._draws_on_gpu = next(model.parameters()).device.type == "cuda"
        self._rows, self._context = rows, model.context_length
        embedding = model.tok_emb.weight if isinstance(model.tok_emb, nn.Embedding) else None
        self._vocab_size = sys.maxsize if embedding is None else len(embedding)  # a user's embedding checks its ids
        self._decoding: list[Request] = []
        """Requests in the KV cache, in the order of its rows."""
        self._waiting: list[Request] = []
        """Requests to prefill in the next step."""

    @property
    def free(self) -> int:
        """How many requests may be added."""
        return self._rows - len(self._decoding) - len(self._waiting)

    def add(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        eos_id: int | Collection[int] | None = None,
        top_logprobs: int | None = None,
    ) -> Request:
        """Add a request that continues `ids`; if they exceed the context, only the last ones count.

        The same seed draws the same ids; without a seed, every request differs. An id of `eos_id` ends the request.
        With `top_logprobs`, `request.scores` has the log probability of each id, and of as many likeliest ids.
        Raises ConfigError for an empty prompt, an id outside the vocabulary, and numbers out of range.
        """
        assert self.free > 0, "the caller checks `free`"
        prompt = _check_ids(ids)
        self._check(prompt, max_new_tokens, seed)
        eos_ids = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
        request = Request(prompt, max_new_tokens, sampling or Sampling(), seed, eos_ids, top_logprobs)
        request.window = prompt[-self._context :]
        self._waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Add one token to every request. Return all of them; finished requests have left the batch.

        A request finishes with its `error` if its prompt cannot be prefilled or no token can be drawn for it.
        """
        failed: list[Request] = []
        with torch.inference_mode():
            self._requeue_full()
            # _prefill adds the new requests to _decoding, in the order of their logits.
            self._advance([*self._decode(), *self._prefill(failed)])
        stepped = [*self._decoding, *failed]
        for request in stepped:
            if request.finish_reason is not None:
                self.drop(request)
        return stepped

    def drop(self, request: Request) -> None:
        """Remove a request, finished or not. Do nothing if it is not in the batch."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._decoding:
            row = self._decoding.index(request)
            self._decoder.drop(row)
            last = self._decoding.pop()
            if last is not request:
                self._decoding[row] = last

    def _advance(self, logits: list[Tensor]) -> None:
        """Add a token to every request in the cache. `logits` are those of its rows in order, in groups of rows."""
        if self._draws_on_gpu and logits:
            Request.advance_together(self._decoding, torch.cat(logits))
            return
        for request, row in zip(self._decoding, [row for group in logits for row in group.cpu()], strict=True):
            request.advance(row)

    def _requeue_full(self) -> None:
        """Halve the windows that exceed the context, and queue their requests for a new prefill."""
        for request in list(self._decoding):
            if len(request.window) > self._context:
                self.drop(request)
                request.window = request.window[-max(self._context // 2, 1) :]
                self._waiting.append(request)

    def _decode(self) -> list[Tensor]:
        """Decode one token for all requests in the cache -> logits (rows, vocabulary), in a list of at most one."""
        return [self._decoder.decode([request.window[-1] for request in self._decoding])] if self._decoding else []

    def _prefill(self, failed: list[Request]) -> Iterator[Tensor]:
        """Prefill the waiting requests -> logits (requests, vocabulary) of each group.

        A group holds prompts of similar lengths, so that at most half of it is padding. If the prefill of a group
        fails, its requests finish with the error and are appended to `failed`.
        """
        waiting = sorted(self._waiting, key=lambda request: len(request.window), reverse=True)
        while waiting:
            longest = len(waiting[0].window)
            group = waiting[: max(1, _PREFILL_TOKENS // longest)]
            group = [request for request in group if 2 * len(request.window) > longest]
            waiting = waiting[len(group) :]
            try:
                logits = self._decoder.prefill([request.window for request in group])
            except Exception as error:  # such as too little memory: requests that are decoding continue
                for request in group:
                    request.fail(error)
                failed += group
                continue
            self._decoding += group
            yield logits
        self._waiting = []

    def _check(self, prompt: list[int], max_new_tokens: int, seed: int | None) -> None:
        if not prompt:
            raise ConfigError("the prompt has no tokens; give at least one (the end-of-text id starts a new document).")
        wrong = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise ConfigError(
                f"token id {wrong} of the prompt is outside the model's vocabulary of {self._vocab_size} ids."
            )
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if seed is not None and not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed}; it must be at least 0 and below 2^64.")


def _check_ids(ids: Sequence[int]) -> list[int]:
    """Return one prompt as a list of ints. Raises ConfigError for anything else, such as a batch of prompts."""
    try:
        if getattr(ids, "ndim", 1) == 1:
            return [int(index(token)) for token in ids]
    except TypeError:
        pass
    raise ConfigError(
        f"the prompt must be one row of whole numbers, found {ids!r:.80}. Give several prompts to generate_batch."
    )

"""Texts that one model writes side by side. They come and go: a text that begins need not wait for others to end.

Every step predicts one token for every text, so the weights are read from memory once for all of them ("continuous
batching", Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI).
"""

from collections.abc import Collection, Iterator, Sequence
from operator import index
from typing import Literal

import torch
from torch import Tensor

from gptcore.errors import ConfigError
from gptcore.model import GPTModel, is_ours
from gptcore.writing.decoder import Decoder, WholeWindows
from gptcore.writing.quantize import INT8_KINDS
from gptcore.writing.sampling import Sampling

_READ_TOKENS = 4096
"""At most so many tokens of several prompts are read at once: their features are in memory together."""


class Text:
    """One text that is being written."""

    def __init__(
        self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int | None, eos_ids: frozenset[int]
    ) -> None:
        self.ids: list[int] = []
        """What was drawn so far, without the end-of-text id."""
        self.finish_reason: Literal["stop", "length"] | None = None
        """Why it ended: an end-of-text id was drawn, or it has all its tokens. None while it goes on."""
        self._max_new_tokens, self._sampling, self._eos_ids = max_new_tokens, sampling, eos_ids
        self._generator = torch.Generator()
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        self._seen = set(prompt)
        self.window = list(prompt)
        """The ids that the next one is predicted from."""

    def draw(self, logits: Tensor) -> int:
        """The next id from logits (vocabulary,)."""
        return self._sampling.draw(logits, self._seen, self._generator)

    def take(self, token: int) -> None:
        """Adds the id that was drawn, or ends."""
        if token in self._eos_ids:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        self.window.append(token)
        self._seen.add(token)
        if len(self.ids) == self._max_new_tokens:
            self.finish_reason = "length"


class Batch:
    """Up to `rows` texts at once. A text is the same whether written alone or among others, up to rounding.

    When a text's context is full, its older half is forgotten and the rest is read again from position 0: positions
    may be learned, so keys cannot be moved along. Dropout is never applied.
    """

    def __init__(self, model: GPTModel, rows: int, max_tokens: int | None = None) -> None:
        """Takes the memory for `rows` texts of `max_tokens` tokens, prompt included; by default the whole context."""
        self._decoder: Decoder | WholeWindows = (
            Decoder(model, rows, max_tokens) if is_ours(model, *INT8_KINDS) else WholeWindows(model)
        )
        self._rows, self._context, self._vocab_size = rows, model.context_length, len(model.tok_emb.weight)
        self._texts: list[Text] = []
        """In the order of the decoder's rows."""
        self._unread: list[Text] = []

    @property
    def free(self) -> int:
        """How many texts may be added."""
        return self._rows - len(self._texts) - len(self._unread)

    def add(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        eos_id: int | Collection[int] | None = None,
    ) -> Text:
        """A text that continues `ids`, of which the last ones count where they are more than the context.

        The same seed draws the same ids; without one, every text differs. An id of `eos_id` ends the text. Raises
        ConfigError for an empty prompt, an id outside the vocabulary, and numbers out of range.
        """
        assert self.free > 0, "there is a free row"
        prompt = _whole_numbers(ids)
        self._check(prompt, max_new_tokens, seed)
        eos_ids = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
        text = Text(prompt, max_new_tokens, sampling or Sampling(), seed, eos_ids)
        text.window = prompt[-self._context :]
        self._unread.append(text)
        return text

    def step(self) -> list[Text]:
        """One more token for every text. Returns them all; those that ended are no longer in the batch."""
        with torch.inference_mode():
            self._forget()
            rows = [row for part in (*self._extended(), *self._begun()) for row in part.cpu()]
            for text, logits in zip(self._texts, rows, strict=True):
                text.take(text.draw(logits))
        stepped = list(self._texts)
        for text in stepped:
            if text.finish_reason is not None:
                self.drop(text)
        return stepped

    def drop(self, text: Text) -> None:
        """Forgets a text, before its end too. Nothing happens where it is not there."""
        if text in self._unread:
            self._unread.remove(text)
        elif text in self._texts:
            row = self._texts.index(text)
            self._decoder.drop(row)
            last = self._texts.pop()
            if last is not text:
                self._texts[row] = last

    def _forget(self) -> None:
        for text in list(self._texts):
            if len(text.window) > self._context:
                self.drop(text)
                text.window = text.window[-max(self._context // 2, 1) :]
                self._unread.append(text)

    def _extended(self) -> list[Tensor]:
        return [self._decoder.extend([text.window[-1] for text in self._texts])] if self._texts else []

    def _begun(self) -> Iterator[Tensor]:
        """Reads prompts of like lengths together, so that at most half of what is read is padding."""
        waiting = sorted(self._unread, key=lambda text: len(text.window), reverse=True)
        while waiting:
            longest = len(waiting[0].window)
            together = waiting[: max(1, _READ_TOKENS // longest)]
            together = [text for text in together if 2 * len(text.window) > longest]
            yield self._decoder.begin([text.window for text in together])
            self._texts += together
            waiting = waiting[len(together) :]
        self._unread = []

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


def _whole_numbers(ids: Sequence[int]) -> list[int]:
    try:
        if getattr(ids, "ndim", 1) == 1:
            return [int(index(token)) for token in ids]
    except TypeError:
        pass
    raise ConfigError(
        f"the prompt must be one row of whole numbers, found {ids!r:.80}. Give several prompts to generate_batch."
    )

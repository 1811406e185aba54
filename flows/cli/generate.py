"""The texts of `gptflow generate`: generated side by side, printed one after the other."""

from collections import deque
from collections.abc import Sequence
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from flows.state.root import StateRoot

if TYPE_CHECKING:
    from gptcore.generation.batch import Batch, Request
    from gptcore.generation.generate import TextStream

_MAX_CONCURRENT = 16


def print_texts(
    root: StateRoot,
    uri: str,
    prompt: str,
    num_samples: int,
    seed: int | None,
    max_new_tokens: int,
    stop: Sequence[str],
    quantize: str | None,
    **settings: Any,
) -> None:
    """Print `num_samples` continuations of `prompt`. The first text is printed token by token, the others follow.

    `settings` are those of Sampling. Text number i, counted from 0, is drawn with seed + i. Raises ConfigError for
    settings out of range, RegistryError for the URI, and CheckpointError for the version's files.
    """
    Thread(target=import_module, args=("gptcore.bundle",)).start()  # imports torch beside MLflow
    from flows.registry import versions
    from gptcore.bundle import load
    from gptcore.generation.batch import Batch
    from gptcore.generation.generate import TextStream
    from gptcore.generation.quantize import quantize as round_weights
    from gptcore.generation.sampling import Sampling

    sampling = Sampling(**settings)
    version = versions.resolve(root, uri)
    loaded = load(versions.locate_bundle(root, version.name, str(version.version)))
    if quantize is not None:
        round_weights(loaded.model, quantize)
    tokenizer = loaded.tokenizer
    prompt_ids = tokenizer.encode_prompt(prompt)
    batch = Batch(loaded.model, min(num_samples, _MAX_CONCURRENT), len(prompt_ids) + max_new_tokens)
    unfinished: deque[_Sample] = deque()
    num_started = 0
    while num_started < num_samples or unfinished:
        while num_started < num_samples and batch.free:
            text_seed = None if seed is None else seed + num_started
            request = batch.add(prompt_ids, max_new_tokens, sampling, seed=text_seed, eos_id=tokenizer.eot)
            unfinished.append(_Sample(request, TextStream(tokenizer, stop), prompt))
            num_started += 1
        batch.step()
        for sample in unfinished:
            sample.update(batch)
        while unfinished and unfinished[0].print_new_text():
            unfinished.popleft()


class _Sample:
    """A text, and the part of it that has not been printed yet."""

    def __init__(self, request: "Request", stream: "TextStream", prompt: str) -> None:
        self._request, self._stream, self._unprinted = request, stream, prompt
        self._num_decoded, self._has_ended = 0, False

    def update(self, batch: "Batch") -> None:
        """Decode the tokens that were drawn since the last call. Drop the text from the batch after a stop string."""
        if self._has_ended:
            return
        for token in self._request.ids[self._num_decoded :]:
            self._unprinted += self._stream.push(token)
        self._num_decoded = len(self._request.ids)
        if self._stream.stopped:
            batch.drop(self._request)
        self._has_ended = self._stream.stopped or self._request.finish_reason is not None
        if self._has_ended:
            self._unprinted += self._stream.finish() + "\n"

    def print_new_text(self) -> bool:
        """Print what is new. Return whether the text has ended."""
        click.echo(self._unprinted, nl=False)
        self._unprinted = ""
        return self._has_ended

"""Texts of a registered version on the terminal."""

from collections import deque
from collections.abc import Sequence
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from flows.state import StateRoot

if TYPE_CHECKING:
    from gptcore.generate import TextStream
    from gptcore.writing.batch import Batch, Text

_SIDE_BY_SIDE = 16
"""So many samples are written at once."""


def write(
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
    """Prints continuations of `prompt`, one after the other, the first as it comes and the others at once after it.

    Raises ConfigError for settings out of range, RegistryError for the URI, CheckpointError for its files.
    """
    Thread(target=import_module, args=("gptcore.bundle",)).start()  # torch, while MLflow is imported and asked
    from flows.releases import registry
    from gptcore.bundle import load
    from gptcore.generate import TextStream
    from gptcore.writing.batch import Batch
    from gptcore.writing.quantize import quantize as round_weights
    from gptcore.writing.sampling import Sampling

    sampling = Sampling(**settings)
    found = registry.resolve(root, uri)
    loaded = load(registry.bundle_path(root, found.name, str(found.version)))
    if quantize is not None:
        round_weights(loaded.model, quantize)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode_prompt(prompt)
    batch = Batch(loaded.model, min(num_samples, _SIDE_BY_SIDE), len(ids) + max_new_tokens)
    unfinished: deque[_Sample] = deque()
    begun = 0
    while begun < num_samples or unfinished:
        while begun < num_samples and batch.free:
            own_seed = None if seed is None else seed + begun
            text = batch.add(ids, max_new_tokens, sampling, seed=own_seed, eos_id=tokenizer.eot)
            unfinished.append(_Sample(text, TextStream(tokenizer, stop), prompt))
            begun += 1
        batch.step()
        for sample in unfinished:
            sample.follow(batch)
        while unfinished and unfinished[0].show():
            unfinished.popleft()


class _Sample:
    """One text, and what of it was not printed yet."""

    def __init__(self, text: "Text", stream: "TextStream", prompt: str) -> None:
        self._text, self._stream, self._unshown = text, stream, prompt
        self._followed, self._ended = 0, False

    def follow(self, batch: "Batch") -> None:
        """Takes what was drawn since the last time."""
        if self._ended:
            return
        for token in self._text.ids[self._followed :]:
            self._unshown += self._stream.push(token)
        self._followed = len(self._text.ids)
        if self._stream.stopped:
            batch.drop(self._text)
        self._ended = self._stream.stopped or self._text.finish_reason is not None
        if self._ended:
            self._unshown += self._stream.finish() + "\n"

    def show(self) -> bool:
        """Prints what there is. Whether that was all."""
        click.echo(self._unshown, nl=False)
        self._unshown = ""
        return self._ended

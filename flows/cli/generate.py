"""`gptflow generate`: continuations of a prompt, generated side by side and printed one after the other."""

from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from flows.cli.options import DEVICE, FILE, QUANTIZE, choose_generation_device, open_state_root

if TYPE_CHECKING:
    from flows.state.root import StateRoot
    from gptcore.bundle import LoadedModel
    from gptcore.generation.batch import Batch, Request
    from gptcore.generation.generate import TextStream

_MAX_CONCURRENT = 16


@click.command("generate", short_help="Continue a prompt with a registered version.")
@click.argument("uri")
@click.option("--prompt", default="", help="The text to continue. Default: begin a new document.")
@click.option(
    "--max-new-tokens", default=100, show_default=True, type=click.IntRange(1), help="Maximum length of a text."
)
@click.option(
    "--temperature",
    default=0.8,
    show_default=True,
    type=click.FloatRange(0),
    help="Randomness of the choice of tokens. 0 always takes the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(1), help="Choose among this number of likeliest tokens.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Choose among the likeliest tokens that together have this probability.",
)
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Choose among tokens with at least this share of the likeliest token's probability.",
)
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.01, 100),
    help="A value above 1 makes tokens less likely that have occurred before.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same texts. Default: a new seed.")
@click.option("--num-samples", default=1, show_default=True, type=click.IntRange(1), help="Number of texts.")
@DEVICE
@QUANTIZE
@FILE
def generate_texts(
    uri: str,
    prompt: str,
    num_samples: int,
    seed: int | None,
    max_new_tokens: int,
    stop: Sequence[str],
    device: str,
    quantize: str | None,
    file: str | None,
    **settings: Any,
) -> None:
    """Continue a prompt with the version URI. The text appears token by token.

    The champion is the version that the alias @champion names.

    Example: gptflow generate models:/gpt-quickstart@champion --prompt "The assert statement"
    """
    device = choose_generation_device(device, quantize)
    root = open_state_root(file)
    Thread(target=import_module, args=("gptcore.bundle",)).start()  # imports torch beside MLflow
    from gptcore.generation.batch import Batch
    from gptcore.generation.generate import TextStream
    from gptcore.generation.sampling import Sampling

    sampling = Sampling(**settings)
    loaded = _load(root, uri, device, quantize)
    tokenizer = loaded.tokenizer
    prompt_ids = tokenizer.encode_prompt(prompt)
    batch = Batch(loaded.model, min(num_samples, _MAX_CONCURRENT), len(prompt_ids) + max_new_tokens)

    def start_sample(number: int) -> _Sample:
        own_seed = None if seed is None else seed + number
        request = batch.add(prompt_ids, max_new_tokens, sampling, seed=own_seed, eos_id=tokenizer.eot)
        return _Sample(request, TextStream(tokenizer, stop), prompt)

    _print_in_order(batch, map(start_sample, range(num_samples)))


COMMANDS = (generate_texts,)


def _load(root: "StateRoot", uri: str, device: str, quantization: str | None) -> "LoadedModel":
    from flows.registry import versions
    from flows.registry.loading import load_verified
    from gptcore.generation.quantize import quantize

    loaded = load_verified(root, versions.resolve(root, uri), device)
    if quantization is not None:
        quantize(loaded.model, quantization)
    return loaded


def _print_in_order(batch: "Batch", samples: "Iterator[_Sample]") -> None:
    """Generate all samples, as many at once as the batch has room for, and print one after the other.

    A sample takes its place in the batch when `samples` yields it. The first unfinished one is printed token by token.
    """
    unfinished: deque[_Sample] = deque()
    while True:
        while batch.free and (started := next(samples, None)) is not None:
            unfinished.append(started)
        if not unfinished:
            return
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
        if self._request.error:
            raise self._request.error
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

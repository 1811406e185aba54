"""Text that a trained model writes for people to read, and what can be counted about it.

A sample says more than a score, and can mislead more: a small model that knows its training text by heart writes well.
So each sample comes with three measures: how varied it is, how much it repeats itself, and the longest run of
characters that is copied from the training text. generate.py generates the tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gptcore.config import SampleConfig
from gptcore.generation.generate import generate
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.preserve import preserve_training_state

_CHUNK_CHARS = 2**20
_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that it has an inverse modulo 2^64."""
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_TABLE_BITS = 20


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt, and what was counted about it."""

    prompt: str
    temperature: float
    seed: int
    text: str
    """The continuation alone, without the prompt."""
    tokens: int
    distinct_1: float
    """Different words / words (Li et al. 2016, arXiv:1510.03055). White space separates words."""
    distinct_2: float
    """Different pairs of words / pairs of words."""
    repetition: float
    """Share of runs of four words that occurred earlier in the sample."""
    longest_copied: int
    """Characters in the longest run that also occurs, letter by letter, in the training text."""
    copied_text: str
    """The longest copied run itself."""


def write_samples(
    model: GPTModel, tokenizer: Tokenizer, cfg: SampleConfig, seed: int, train_text: Path, out: Path
) -> list[Sample]:
    """Continue every prompt once at every temperature; write samples.json and samples.md into the directory `out`.

    Sample i uses the seed `seed` + i and ends early at an end-of-text id. An empty prompt starts a new document: it is
    the end-of-text id alone. The model's mode and torch's random states stay as they were.
    """
    pairs = [(prompt, temperature) for prompt in cfg.prompts for temperature in cfg.temperatures]
    with preserve_training_state(model):
        continuations = [
            _continue_prompt(model, tokenizer, cfg, prompt=prompt, temperature=temperature, seed=seed + i)
            for i, (prompt, temperature) in enumerate(pairs)
        ]
    texts = [tokenizer.decode(ids) for ids in continuations]
    copies = find_longest_copies(texts, train_text)
    samples = [
        Sample(
            prompt=prompt,
            temperature=temperature,
            seed=seed + i,
            text=texts[i],
            tokens=len(continuations[i]),
            distinct_1=compute_distinct(texts[i].split(), 1),
            distinct_2=compute_distinct(texts[i].split(), 2),
            repetition=1 - compute_distinct(texts[i].split(), 4),
            longest_copied=len(copies[i]),
            copied_text=copies[i],
        )
        for i, (prompt, temperature) in enumerate(pairs)
    ]
    (out / "samples.json").write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    (out / "samples.md").write_text(render_samples(samples), encoding="utf-8")
    return samples


def _continue_prompt(
    model: GPTModel, tokenizer: Tokenizer, cfg: SampleConfig, prompt: str, temperature: float, seed: int
) -> list[int]:
    tokens = generate(
        model,
        tokenizer.encode_prompt(prompt),
        cfg.max_new_tokens,
        temperature=temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        seed=seed,
        eos_id=tokenizer.eot,
    )
    return list(tokens)


def compute_distinct(words: Sequence[str], n: int) -> float:
    """Return different runs of n words / runs of n words; 1 if there is no such run, since nothing repeats.

    For example, "a b a b" has 2 different words among 4, so distinct-1 is 0.5.
    """
    runs = list(zip(*(words[begin:] for begin in range(n))))
    return len(set(runs)) / len(runs) if runs else 1.0


def find_longest_copies(texts: Sequence[str], corpus: Path) -> list[str]:
    """Find for each text its longest substring that also occurs in the file `corpus` (UTF-8).

    Returns any one of them if several are equally long. The result is exact: every match of hashes is compared letter
    by letter. One pass over the file is enough, and the memory does not grow with the file. A rolling polynomial
    modulo 2^64 hashes the file's characters, a mebichar at a time, only to look for a substring longer than the best
    so far. Takes about 0.1 s per text and 10 MB of the file, plus a bisection for each new best.
    """
    best = [""] * len(texts)
    hashed = [_Hashes(text) for text in texts]
    for chunk_text in _read_chunks(corpus, overlap=max(map(len, texts), default=0)):
        chunk = _Hashes(chunk_text)
        best = [_find_longer_copy(text, chunk, copy) for text, copy in zip(hashed, best)]
    return best


class _Hashes:
    """A text, and the hash of every run of its characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
        terms = codes * _compute_powers(_BASE, len(codes))  # (characters,)
        self._sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms)))  # (characters + 1,)
        self._inverse = _compute_powers(_INVERSE, len(codes))  # (characters,)

    def hash_runs(self, length: int) -> np.ndarray:
        """Return (runs,) the hash of each run of `length` characters, by the position where it begins."""
        runs = max(0, len(self.text) - length + 1)
        return (self._sums[length : length + runs] - self._sums[:runs]) * self._inverse[:runs]


def _compute_powers(base: np.uint64, count: int) -> np.ndarray:
    """Return (count,) the powers base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _find_longer_copy(text: _Hashes, chunk: _Hashes, best: str) -> str:
    """Return the longest run of `text` that also occurs in `chunk` if it is longer than `best`, else `best`."""
    if (longer := _find_common_run(text, chunk, len(best) + 1)) is None:
        return best
    best, limit = longer, len(text.text)
    while len(best) < limit:
        middle = (len(best) + limit + 1) // 2
        if (longer := _find_common_run(text, chunk, middle)) is None:
            limit = middle - 1
        else:
            best = longer
    return best


def _find_common_run(text: _Hashes, chunk: _Hashes, length: int) -> str | None:
    """Return the first run of `length` characters of `text` that also occurs in `chunk`."""
    text_hashes, chunk_hashes = text.hash_runs(length), chunk.hash_runs(length)
    table = np.zeros(2**_TABLE_BITS, dtype=bool)  # whether a hash of `text` begins with these bits
    shift = np.uint64(64 - _TABLE_BITS)
    table[text_hashes >> shift] = True
    likely = chunk_hashes[table[chunk_hashes >> shift]]
    for begin in np.flatnonzero(np.isin(text_hashes, likely)):
        if (run := text.text[begin : begin + length]) in chunk.text:
            return run
    return None


def _read_chunks(path: Path, overlap: int) -> Iterator[str]:
    """Read the file's text in chunks. Each chunk begins with the last `overlap` characters of the one before."""
    with path.open(encoding="utf-8", newline="") as file:
        kept = ""
        while more := file.read(_CHUNK_CHARS):
            chunk = kept + more
            yield chunk
            kept = chunk[-overlap:] if overlap else ""


def render_samples(samples: Sequence[Sample]) -> str:
    """Render the samples as a Markdown page, each below a heading with its prompt."""
    return "# Samples\n\n" + "\n".join(_render_sample(sample) for sample in samples)


def _render_sample(sample: Sample) -> str:
    return (
        f"## {sample.prompt!r} at temperature {sample.temperature:g}\n\n"
        f"{sample.tokens} tokens, seed {sample.seed}, distinct-1 {sample.distinct_1:.2f}, "
        f"distinct-2 {sample.distinct_2:.2f}, repeated 4-word runs {sample.repetition:.0%}, "
        f"longest run copied from the training text {sample.longest_copied} characters\n\n"
        + "\n".join(f"    {line}" for line in (sample.prompt + sample.text).splitlines())
        + "\n"
    )

"""Text that a trained model writes for people to read, and what can be counted about it.

A sample says more than a score, and can mislead more: a small model that knows its training text by heart writes
well. So beside each sample stand how varied it is, how much it repeats itself, and the longest stretch that is copied
letter by letter from the training text. How tokens are drawn stands in generate.py.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.config import SampleConfig
from gptcore.evaluate import undisturbed
from gptcore.generate import generate
from gptcore.model import GPTModel
from gptcore.tokenizer import Tokenizer

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
    """Different words / words, words being what stands between white space (Li et al. 2016, arXiv:1510.03055)."""
    distinct_2: float
    """Different pairs of words / pairs of words."""
    repetition: float
    """Share of runs of four words that stood in the sample before."""
    longest_copied: int
    """Characters of the longest stretch that stands, letter by letter, in the training text."""
    copied_text: str
    """That stretch."""


def write_samples(
    model: GPTModel, tokenizer: Tokenizer, cfg: SampleConfig, seed: int, train_text: Path, out: Path
) -> list[Sample]:
    """Continues every prompt once at every temperature; writes samples.json and samples.md into the directory `out`.

    Sample i is drawn with the seed `seed` + i and ends early at an end-of-text id. An empty prompt starts a new
    document: it is the end-of-text id alone. The model's mode and torch's random states stay as they were.
    """
    pairs = [(prompt, temperature) for prompt in cfg.prompts for temperature in cfg.temperatures]
    with undisturbed(model):
        written = [_continue(model, tokenizer, cfg, *pair, seed + i) for i, pair in enumerate(pairs)]
    texts = [tokenizer.decode(ids) for ids in written]
    samples = [
        Sample(prompt, temperature, seed + i, texts[i], len(written[i]), *_variety(texts[i]), len(copied), copied)
        for i, ((prompt, temperature), copied) in enumerate(zip(pairs, longest_copies(texts, train_text)))
    ]
    (out / "samples.json").write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")
    (out / "samples.md").write_text(samples_markdown(samples), encoding="utf-8")
    return samples


def _continue(
    model: GPTModel, tokenizer: Tokenizer, cfg: SampleConfig, prompt: str, temperature: float, seed: int
) -> list[int]:
    ids = tokenizer.encode_prompt(prompt)
    drawn = generate(
        model,
        ids,
        cfg.max_new_tokens,
        temperature=temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        seed=seed,
        eos_id=tokenizer.eot,
    )
    return list(drawn)


def _variety(text: str) -> tuple[float, float, float]:
    words = text.split()
    return distinct(words, 1), distinct(words, 2), 1 - distinct(words, 4)


def distinct(words: Sequence[str], n: int) -> float:
    """Different runs of n words / runs of n words; 1 where there is no such run, since nothing repeats."""
    runs = list(zip(*(words[begin:] for begin in range(n))))
    return len(set(runs)) / len(runs) if runs else 1.0


def longest_copies(texts: Sequence[str], corpus: Path) -> list[str]:
    """For each text its longest substring that also stands in the file `corpus` (UTF-8); one of them
    where several are as long.

    Exact, in one pass over the file with memory that does not grow with it: the file's characters are hashed by a
    rolling polynomial modulo 2^64, a mebichar at a time, only to look for a substring longer than the best so far,
    and every hit is compared. Takes about 0.1 s per text and 10 MB, plus a bisection for each new best.
    """
    best = [""] * len(texts)
    hashed = [_Hashes(text) for text in texts]
    for piece in _pieces(corpus, max(map(len, texts), default=0)):
        chunk = _Hashes(piece)
        best = [_longer_copy(text, chunk, found) for text, found in zip(hashed, best)]
    return best


class _Hashes:
    """A text, and the hash of every run of its characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
        self._sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(codes * _powers(_BASE, len(codes)))))
        self._inverse = _powers(_INVERSE, len(codes))

    def of_runs(self, length: int) -> np.ndarray:
        """Hashes of the runs of `length` characters, by where they begin."""
        runs = max(0, len(self.text) - length + 1)
        return (self._sums[length : length + runs] - self._sums[:runs]) * self._inverse[:runs]


def _powers(base: np.uint64, count: int) -> np.ndarray:
    powers = np.full(count, base)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _longer_copy(text: _Hashes, chunk: _Hashes, best: str) -> str:
    """The longest run of `text` that stands in `chunk`, if it is longer than `best`, else `best`."""
    if (longer := _common_run(text, chunk, len(best) + 1)) is None:
        return best
    best, limit = longer, len(text.text)
    while len(best) < limit:
        middle = (len(best) + limit + 1) // 2
        if (longer := _common_run(text, chunk, middle)) is None:
            limit = middle - 1
        else:
            best = longer
    return best


def _common_run(text: _Hashes, chunk: _Hashes, length: int) -> str | None:
    """The first run of `length` characters of `text` that also stands in `chunk`."""
    wanted, offered = text.of_runs(length), chunk.of_runs(length)
    table = np.zeros(2**_TABLE_BITS, dtype=bool)
    shift = np.uint64(64 - _TABLE_BITS)
    table[wanted >> shift] = True
    likely = offered[table[offered >> shift]]
    for begin in np.flatnonzero(np.isin(wanted, likely)):
        if (run := text.text[begin : begin + length]) in chunk.text:
            return run
    return None


def _pieces(path: Path, overlap: int) -> Iterator[str]:
    """The file's text in pieces, each with the last `overlap` characters of the one before it."""
    with path.open(encoding="utf-8", newline="") as file:
        kept = ""
        while more := file.read(_CHUNK_CHARS):
            piece = kept + more
            yield piece
            kept = piece[-overlap:] if overlap else ""


def samples_table(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row per sample, rounded for reading, with the whole text at the end."""
    return [
        {
            "prompt": sample.prompt,
            "temperature": sample.temperature,
            "tokens": sample.tokens,
            "distinct-1": round(sample.distinct_1, 3),
            "distinct-2": round(sample.distinct_2, 3),
            "repetition": round(sample.repetition, 3),
            "longest copied (characters)": sample.longest_copied,
            "text": sample.text,
        }
        for sample in samples
    ]


def samples_markdown(samples: Sequence[Sample]) -> str:
    """The samples as a page to read, the prompt in bold before each continuation."""
    return "# Samples\n\n" + "\n".join(_markdown(sample) for sample in samples)


def _markdown(sample: Sample) -> str:
    return (
        f"## {sample.prompt!r} at temperature {sample.temperature:g}\n\n"
        f"{sample.tokens} tokens, seed {sample.seed}, distinct-1 {sample.distinct_1:.2f}, "
        f"distinct-2 {sample.distinct_2:.2f}, repeated 4-word runs {sample.repetition:.0%}, "
        f"longest run copied from the training text {sample.longest_copied} characters\n\n"
        + "\n".join(f"    {line}" for line in (sample.prompt + sample.text).splitlines())
        + "\n"
    )

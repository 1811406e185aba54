"""One contender in its own process, or the machine itself: `python -m bench.contender SPEC`, with requests over pipes.

SPEC is JSON: the contender's name, the shape, drop_rate, threads, whether it trains, and the path of a nanoGPT checkout
if there is one. The name `machine` measures what the processor and the memory can do at most.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import peers
from bench.shapes import SEED, Shape
from bench.workers import Answers, serve
from gptcore.training import memory
from gptcore.training.batches import Batches

MACHINE = "machine"
MATMUL = 2048
_READ_SHAPE = (8192, 16384)
_READ_BYTES = 4 * _READ_SHAPE[0] * _READ_SHAPE[1]
_LOADER_TOKENS = 4_000_000


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def machine() -> Answers:
    """Measure the arithmetic and memory traffic of this machine, with as many threads as the contenders have."""
    left, right = torch.rand(MATMUL, MATMUL), torch.rand(MATMUL, MATMUL)
    out = torch.empty(MATMUL, MATMUL)
    matrix: list[torch.Tensor] = []

    def matmul() -> dict[str, Any]:
        return {"gflops": 2 * MATMUL**3 / seconds_of(lambda: torch.mm(left, right, out=out)) / 1e9}

    def read() -> dict[str, Any]:
        if not matrix:
            matrix.append(torch.ones(_READ_SHAPE))
        whole, vector = matrix[0], torch.ones(_READ_SHAPE[1])
        fastest = min(seconds_of(lambda: torch.mv(whole, vector)), seconds_of(whole.sum))
        return {"gb_per_second": _READ_BYTES / fastest / 1e9}

    return {"matmul": matmul, "read": read}


def contender(name: str, shape: Shape, drop_rate: float, nanogpt: str | None) -> Answers:
    """Answer requests for steps, texts and, for ours only, batches of the loader."""
    made = peers.make(name, shape, drop_rate, nanogpt)
    loaders: list[Batches] = []

    def step(index: int) -> dict[str, Any]:
        inputs, targets = shape.batch(index)
        began = time.perf_counter()
        loss = made.step(inputs, targets)
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def generate(batch: int, prompt: int, new: int) -> dict[str, Any]:
        idx, _ = replace(shape, batch_size=batch, context_length=prompt).batch(0)
        began = time.perf_counter()
        ids = made.generate(idx, new)
        seconds = time.perf_counter() - began
        assert ids.shape == (batch, prompt + new), ids.shape
        return {"seconds": seconds, "ids": ids[:, prompt:].tolist()}

    def load(first: int, count: int) -> dict[str, Any]:
        loader = loaders[0] if loaders else _loader(shape)
        loaders[:] = [loader]
        return {
            "seconds": seconds_of(lambda: [loader.make_micro_batches(step) for step in range(first, first + count)])
            / count
        }

    return {"step": step, "generate": generate, "load": load}


def _loader(shape: Shape) -> Batches:
    """Return batches of a token file, as the trainer reads them."""
    file = Path(tempfile.mkdtemp()) / "train.bin"
    np.random.default_rng(SEED).integers(shape.vocab_size, size=_LOADER_TOKENS).astype(np.uint16).tofile(file)
    tokens = np.memmap(file, dtype=np.uint16, mode="r")
    file.unlink()
    file.parent.rmdir()
    return Batches(tokens, shape.context_length, shape.context_length, shape.batch_size, 1, SEED)


def _prepared() -> Answers:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if spec["name"] == MACHINE:
        return machine()
    if spec["name"] == peers.OURS and spec["trains"]:
        memory.keep_freed_memory()  # as the trainer does at its start
    return contender(spec["name"], Shape(**spec["shape"]), spec["drop_rate"], spec["nanogpt"])


if __name__ == "__main__":
    serve(_prepared)

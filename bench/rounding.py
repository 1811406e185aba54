"""What rounded weights cost and gain: bits per byte of a trained model on its holdout, and tokens per second.

    python -m bench.rounding BUNDLE SNAPSHOT

Both are directories: the bundle of a version (from `mlflow artifacts download`), and the snapshot that it was judged on
(mlruns/corpora/* in the state root).
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

import gptcore
from bench.report import table
from gptcore.bundle import LoadedModel
from gptcore.corpus.snapshot import read_blocks
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.generation.generate import generate
from gptcore.generation.quantize import quantize

_NEW, _ROUNDS = 100, 5


def main() -> None:
    """Measure the bundle with its own weights and with rounded ones, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    plain, rounded = gptcore.load(asked.bundle), gptcore.load(asked.bundle)
    quantize(rounded.model)
    held_out = list(read_blocks(asked.snapshot, "holdout"))
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for loaded, rate in zip((plain, rounded), rates):
            rate.append(_tokens_per_second(loaded))
    scores = [evaluate_blocks(one.model, one.tokenizer, held_out, "cpu") for one in (plain, rounded)]
    rows = [
        (name, f"{score.bits_per_byte:.4f}", f"{score.top1:.2%}", f"{statistics.median(rate):.0f}")
        for name, score, rate in zip(("fp32", "int8"), scores, rates)
    ]
    size = f"{len(held_out)} blocks, {scores[0].bytes} bytes"
    print(table((size, "bits per byte", "likeliest is right", "tokens per second"), rows))


def _tokens_per_second(loaded: LoadedModel) -> float:
    began = time.perf_counter()
    for _ in generate(loaded.model, [loaded.tokenizer.eot], _NEW, temperature=0):
        pass
    return _NEW / (time.perf_counter() - began)


if __name__ == "__main__":
    main()

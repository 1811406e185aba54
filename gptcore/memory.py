"""What a training needs of memory at the very least, so that one that cannot fit is refused and not killed half-way.

The figures are lower bounds: a training that passes may still run out of memory, one that does not could only do so.
And how a process that trains keeps the memory that it has.
"""

import ctypes
import platform

import psutil

from gptcore.config import ModelConfig, TrainConfig
from gptcore.errors import ConfigError

_FLOAT_BYTES = 4
_STATES = 4
"""Weights, gradients and AdamW's two moments, each as large as the model."""
_LEAST_VOCABULARY = 257
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of mallopt, in glibc's malloc.h."""


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """How many numbers a GPTModel of this shape is made of, biases of queries, keys and values left out."""
    shape, parts = model.shape(), model.parts()
    width, layers = shape["emb_dim"], shape["n_layers"]
    positions = shape["context_length"] if parts["positions"] == "learned" else 0
    norms = 2 if parts["norm"] == "layer" else 0
    biases = 6 if parts["bias"] else 0
    ends = 1 if parts["tied"] else 2
    return (ends * vocab_size + positions + norms) * width + layers * (12 * width + 2 * norms + biases) * width


def check(model: ModelConfig, train: TrainConfig, vocab_size: int = _LEAST_VOCABULARY) -> None:
    """Raises ConfigError if not even memory and swap together can hold the training. Without a vocabulary: the least.

    Where the device is another than the CPU, or not chosen yet, only the weights are counted: they are made here first.
    """
    shape = model.shape()
    parameters = num_parameters(model, vocab_size)
    states, inputs = _FLOAT_BYTES * parameters, 0
    if train.device == "cpu":
        states *= _STATES * (1 if train.shard or train.processes == "auto" else train.processes)  # copies, or parts
        # Every block keeps its input, at least, for the way back.
        inputs = train.batch_size * shape["context_length"] * shape["emb_dim"] * shape["n_layers"] * _FLOAT_BYTES
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if states + inputs > there:
        raise ConfigError(
            f"model: emb_dim {shape['emb_dim']}, n_layers {shape['n_layers']} and context_length "
            f"{shape['context_length']} with train.batch_size {train.batch_size} need more memory than there is: "
            f"{parameters:,} parameters take at least {states / 2**30:,.1f} GiB and a batch {inputs / 2**30:,.1f} GiB, "
            f"this machine has {there / 2**30:,.1f} GiB. Lower one of them, or choose a named model.size."
        )


def keep_freed() -> None:
    """Lets this process keep the memory that it frees, where its C library is glibc; for a process of training alone.

    glibc gives a large buffer back to the system when it is freed, so the next one has to be made of new pages, each
    zeroed on first use: 7 to 11 percent of an update (bench/RESULTS.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

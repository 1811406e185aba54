"""The least memory that a training needs, so that one that cannot fit is refused instead of killed half-way.

The figures are lower bounds: a training that passes the check may still run out of memory, but one that fails it would
certainly do so. A setting of the C library that makes training faster is here too.
"""

import ctypes
import platform

import psutil

from gptcore.config import ModelConfig, TrainConfig
from gptcore.errors import ConfigError

_FLOAT_BYTES = 4
_STATES = 4
"""Weights, gradients and AdamW's two moments: each has as many numbers as the model."""
_LEAST_VOCABULARY = 257
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a GPTModel of this shape, without the biases of queries, keys and values."""
    shape, components = model.shape(), model.components()
    width, layers = shape["emb_dim"], shape["n_layers"]
    positions = shape["context_length"] if components["positions"] == "learned" else 0
    norms = 2 if components["norm"] == "layer" else 0
    biases = 6 if components["bias"] else 0
    ends = 1 if components["tied"] else 2
    return (ends * vocab_size + positions + norms) * width + layers * (12 * width + 2 * norms + biases) * width


def check(model: ModelConfig, train: TrainConfig, vocab_size: int = _LEAST_VOCABULARY) -> None:
    """Raise ConfigError if memory and swap together cannot hold the training.

    Without a `vocab_size`, assumes the smallest vocabulary. If the device is not the CPU, or not chosen yet, counts
    only the weights, which are created in main memory first.
    """
    shape = model.shape()
    parameters = num_parameters(model, vocab_size)
    states, inputs = _FLOAT_BYTES * parameters, 0
    if train.device == "cpu":
        # Each process has a copy of the states, or with train.shard its shard of one copy.
        states *= _STATES * (1 if train.shard or train.processes == "auto" else train.processes)
        # Every block keeps at least its input for the backward pass.
        inputs = train.batch_size * shape["context_length"] * shape["emb_dim"] * shape["n_layers"] * _FLOAT_BYTES
    available = psutil.virtual_memory().total + psutil.swap_memory().total
    if states + inputs > available:
        raise ConfigError(
            f"model: emb_dim {shape['emb_dim']}, n_layers {shape['n_layers']} and context_length "
            f"{shape['context_length']} with train.batch_size {train.batch_size} need more memory than there is: "
            f"{parameters:,} parameters take at least {states / 2**30:,.1f} GiB and a batch {inputs / 2**30:,.1f} GiB, "
            f"this machine has {available / 2**30:,.1f} GiB. Lower one of them, or choose a named model.size."
        )


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees. Do nothing with another C library.

    By default glibc returns a freed large buffer to the system. The next buffer needs new pages, and zeroing them takes
    7 to 11 percent of an update (bench/RESULTS.md). Only for a process that does nothing but train.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

"""Evaluation in the middle of training that leaves no trace: modes and random states are restored afterwards."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gptcore.model.gpt import eval_mode


@contextlib.contextmanager
def preserve_training_state(model: nn.Module, *loaders: Any) -> Iterator[None]:
    """Switch to eval mode without gradients, and on exit restore everything that influences training.

    Restores train or eval mode of each module on its own, because one may be frozen in eval mode. Restores torch's
    random state on the CPU and on the model's devices, and the generators of the loaders and of their samplers.
    (Iterating a DataLoader draws from them, or from the global state, even if nothing is shuffled.)
    """
    generators = {id(generator): generator for loader in loaders for generator in _generators(loader)}.values()
    restorers: list[Callable[[], object]] = [
        partial(generator.set_state, generator.get_state()) for generator in generators
    ]
    restorers += _make_restorers(model)
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for restore in restorers:
            restore()


def _make_restorers(model: nn.Module) -> list[Callable[[], object]]:
    """Return functions that restore the present random states of the CPU and of the model's devices."""
    restorers: list[Callable[[], object]] = [partial(torch.set_rng_state, torch.get_rng_state())]
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "mps":
            restorers.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
        elif device.type != "cpu":
            module = torch.get_device_module(device)
            restorers.append(partial(module.set_rng_state, module.get_rng_state(device), device))
    return restorers


def _generators(loader: Any) -> Iterator[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            yield generator

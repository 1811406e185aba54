"""The gradient of a matrix that is token embedding and output head at once, for a process that trains alone."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptcore.model import GPTModel


@contextlib.contextmanager
def gradient_in_place(model: GPTModel) -> Iterator[None]:
    """While it lasts, the embedding's gradient is added to a tied head's in place, in the rows of the batch's tokens.

    Autograd would make a second matrix of zeros as large as the vocabulary, and add it. Not on a GPU, which would have
    to wait for the number of rows.
    """
    weight = model.tok_emb.weight
    if not (model.is_tied and weight.requires_grad and weight.device.type == "cpu"):
        yield
        return

    def detached(_: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        ids, which = torch.unique(inputs[0], return_inverse=True)

        def add(gradient: Tensor) -> None:
            rows = gradient.new_zeros(len(ids), gradient.shape[-1]).index_add_(
                0, which.flatten(), gradient.flatten(0, 1)
            )
            assert weight.grad is not None, "the head's gradient comes first"
            weight.grad[ids] += rows  # every id once: with repeated ones, threads would add in a random order

        leaf = embedded.detach().requires_grad_()
        leaf.register_hook(add)
        return leaf

    handle = model.tok_emb.register_forward_hook(detached)
    try:
        yield
    finally:
        handle.remove()

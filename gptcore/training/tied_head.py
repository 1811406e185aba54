"""The gradient of a matrix that is both token embedding and output head, for a process that trains alone."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptcore.model.gpt import GPTModel


@contextlib.contextmanager
def add_gradient_in_place(model: GPTModel) -> Iterator[None]:
    """Inside this context, add the embedding's gradient to a tied head's in place, in the rows of the batch's tokens.

    Autograd would make a second matrix of zeros, as large as the vocabulary, and add it. A GPU would have to wait for
    the number of rows, so this does nothing there.
    """
    weight = model.tok_emb.weight  # (vocabulary, emb_dim)
    if not (model.is_tied and weight.requires_grad and weight.device.type == "cpu"):
        yield
        return

    def detach_embedded(_: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        # ids: (unique,); rows_of_tokens: (batch, tokens), the index in `ids` of each token
        ids, rows_of_tokens = torch.unique(inputs[0], return_inverse=True)

        def add(gradient: Tensor) -> None:  # (batch, tokens, emb_dim)
            rows = gradient.new_zeros(len(ids), gradient.shape[-1]).index_add_(
                0, rows_of_tokens.flatten(), gradient.flatten(0, 1)
            )  # (unique, emb_dim)
            assert weight.grad is not None, "the head's gradient comes first"
            weight.grad[ids] += rows  # each id once: with repeated ids, threads would add in a random order

        leaf = embedded.detach().requires_grad_()  # (batch, tokens, emb_dim)
        leaf.register_hook(add)
        return leaf

    handle = model.tok_emb.register_forward_hook(detach_embedded)
    try:
        yield
    finally:
        handle.remove()

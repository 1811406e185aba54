"""The loss: cross-entropy, in nats, between the model's prediction and the next token.

`fused_cross_entropy` computes head and loss together, some rows at a time. So the logits of a whole batch, a gigabyte
for GPT-2's vocabulary, never exist. It computes the gradients in the same pass, from the same softmax. The book's
`calc_loss_batch` takes any module, and uses the fused loss only if the result is the same as without. Evaluation and
optimizer steps are in gptcore/evaluation and gptcore/training.
"""

from collections.abc import Sized
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcore.errors import ConfigError
from gptcore.model.gpt import GPTModel
from gptcore.model.overrides import is_untouched

IGNORED = -100
"""A target that adds nothing to the loss, as in `torch.nn.functional.cross_entropy`."""

_ROWS = 1024
"""Rows whose logits are in memory at once: 200 MB for GPT-2's vocabulary. With half as many rows, an update at shape S
of bench/shapes.py takes 5 percent longer."""
_FAR = 60.0
"""Loss in nats above which the softmax in fp32 is too inexact (see `_repair_far`)."""


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: torch.device | str) -> Tensor:
    """Return the mean cross-entropy of a batch in nats, a scalar to call `backward` on.

    `input_batch` and `target_batch` are ids (batch, tokens). `model` is any module that maps ids to logits (batch,
    tokens, classes). A GPTModel that nobody changed uses `fused_cross_entropy`, which cannot be differentiated twice
    (nor can the CPU's fused attention). In a step that `torch.compile` traces, the compiler fuses the plain loss.
    """
    inputs, targets = input_batch.to(device), target_batch.to(device)
    can_fuse = not torch.compiler.is_compiling() and _can_fuse(model)
    if can_fuse and targets.dtype == torch.int64 and targets.shape == inputs.shape:
        hidden, weight = _compute_hidden(model, inputs)  # (batch, tokens, emb_dim), (vocab_size, emb_dim)
        return fused_cross_entropy(hidden, weight, targets)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def calc_loss_loader(
    data_loader: Any, model: nn.Module, device: torch.device | str, num_batches: int | None = None
) -> float:
    """Return the mean loss in nats of the first `num_batches` batches (default: all), or nan for an empty loader.

    The caller sets eval mode and disables gradients. Raises ConfigError if `num_batches` is less than 1.
    """
    if num_batches is not None and num_batches < 1:
        raise ConfigError(f"num_batches is {num_batches}; it must be at least 1, or None for the whole loader.")
    available = len(cast(Sized, data_loader))
    if available == 0:
        return float("nan")
    count = available if num_batches is None else min(num_batches, available)
    batches = islice(data_loader, count)
    return sum(calc_loss_batch(inputs, targets, model, device).item() for inputs, targets in batches) / count


@torch.no_grad()
def calc_losses_and_ranks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's cross-entropy in nats and its rank in every row of `hidden @ weight.T`.

    hidden (rows, emb_dim), weight (vocabulary, emb_dim), targets (rows,) -> (rows,) floats, (rows,) int64. The rank is
    the number of other entries that are at least as likely as the target, so 0 means that the prediction was right. If
    a loss is not a number, the rank is the size of the vocabulary.
    """
    losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    ranks = torch.empty_like(targets)
    buffer = _allocate_logits(hidden, weight)
    for start in range(0, len(hidden), _ROWS):
        rows = slice(start, start + _ROWS)
        probabilities = _calc_probabilities(hidden[rows], weight, buffer)  # (chunk, padded vocabulary)
        of_target = probabilities.gather(1, targets[rows, None])  # (chunk, 1)
        losses[rows] = -of_target.log().squeeze(1)
        # On a CPU, counting in place, as floats, takes a sixth of the time that counting booleans takes.
        ranks[rows] = probabilities[:, : len(weight)].ge_(of_target).sum(dim=1).long() - 1
    _repair_far(losses, hidden, weight, targets)
    return losses, torch.where(losses.isnan(), len(weight), ranks)


def fused_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of `hidden @ weight.T` against `targets`, without all logits in memory.

    hidden (..., emb_dim), weight (vocabulary, emb_dim), targets (...) int64; targets of -100 are ignored. The matmuls
    run in the dtype of `hidden`, or of autocast if it is on. The softmax runs in fp32 or a wider dtype, and the
    returned loss has that dtype. The method is from Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM
    Training".
    """
    hidden, weight = _cast_for_autocast(hidden, weight)
    hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (rows, emb_dim), (rows,)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedCrossEntropy.apply(hidden, weight, targets)
    losses, _, _ = _calc_losses_and_gradients(hidden, weight, targets)
    return _average(losses, targets)


class _FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass already computes the gradients. The backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss (). `hidden` is (rows, emb_dim), `weight` (vocabulary, emb_dim), `targets` (rows,)."""
        for_hidden, for_weight, _ = ctx.needs_input_grad
        losses, *gradients = _calc_losses_and_gradients(
            hidden, weight, targets, for_hidden=for_hidden, for_weight=for_weight
        )
        ctx.save_for_backward(*gradients)
        return _average(losses, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of hidden and weight, in their shapes. `grad_output` is ()."""
        hidden_grad, weight_grad = ctx.saved_tensors
        # Reading the value from a GPU would stall it. Multiplying on a CPU would cost a pass over the vocabulary.
        if grad_output.device.type != "cpu" or grad_output.item() != 1:
            hidden_grad = None if hidden_grad is None else hidden_grad * grad_output.to(hidden_grad.dtype)
            weight_grad = None if weight_grad is None else weight_grad * grad_output.to(weight_grad.dtype)
        return hidden_grad, weight_grad, None


def _calc_losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, for_hidden: bool = False, for_weight: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses (rows,) and the gradients of their mean, or None for a gradient that is not wanted.

    The gradients are (rows, emb_dim) if `for_hidden` and (vocabulary, emb_dim) if `for_weight`. The gradient of one
    row's loss by its logits is the softmax minus 1 at the target.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = targets != IGNORED  # (rows,)
    columns = torch.where(valid, targets, 0)
    shares = valid.to(wide) / valid.sum()  # (rows,), each row's share in the mean
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if for_hidden else None
    unwritten = torch.empty_like if len(hidden) else torch.zeros_like  # without rows, nothing is written to it
    weight_grad = unwritten(weight, dtype=wide) if for_weight else None
    buffer = _allocate_logits(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            probabilities = _calc_probabilities(hidden[rows], weight, buffer)  # (chunk, padded vocabulary)
            index = columns[rows, None]  # (chunk, 1)
            of_target = probabilities.gather(1, index)  # (chunk, 1)
            losses[rows] = -of_target.log().squeeze(1)
            if not (for_hidden or for_weight):
                continue
            # The gradient by the logits, (chunk, vocabulary):
            residual = probabilities.scatter_(1, index, of_target - 1).to(hidden.dtype)[:, : len(weight)]
            share = shares[rows, None]  # (chunk, 1)
            if hidden_grad is not None:
                hidden_grad[rows] = (residual @ weight) * share  # (chunk, emb_dim)
            if weight_grad is not None:
                # (vocabulary, chunk) @ (chunk, emb_dim)
                _add_product(weight_grad, residual.t(), (hidden[rows] * share).to(hidden.dtype), is_first=start == 0)
        _repair_far(losses, hidden, weight, columns)
    losses = torch.where(valid, losses, 0)
    return losses, hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)


def _allocate_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Allocate a buffer for the logits of one chunk of rows, (chunk, padded vocabulary).

    The vocabulary is padded to a multiple of 64. On a CPU, this makes the product with GPT-2's 50257 columns 1.5 times
    as fast.
    """
    columns = (len(weight) + 63) // 64 * 64
    return hidden.new_empty(min(_ROWS, len(hidden)), columns)


def _calc_probabilities(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Return the softmax of `hidden @ weight.T`, (chunk, padded vocabulary). The padding gets probability 0.

    The logits are written to `buffer`, and so is the result if it is on a CPU and `buffer` is at least fp32.
    """
    logits = buffer[: len(hidden)]
    torch.mm(hidden, weight.t(), out=logits[:, : len(weight)])
    logits[:, len(weight) :] = -torch.inf
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # On a CPU, working in place avoids the page faults of another buffer. On other devices PyTorch may not support it.
    return torch.softmax(wide, dim=1, out=wide if wide.device.type == "cpu" else None)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add `left @ right` to `total` in place. The first product is only written, so `total` needs no zeros before."""
    if total.dtype != left.dtype:
        product = left @ right
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _repair_far(losses: Tensor, hidden: Tensor, weight: Tensor, columns: Tensor) -> None:
    """Compute the losses above 60 nats again in place, from their logits.

    Such a target's probability is near the smallest float, so its logarithm is inexact. The gradients need no repair,
    because such a small probability adds nothing to them.
    """
    far = (losses > _FAR).nonzero().squeeze(1)
    for rows in far.split(_ROWS):
        logits = (hidden[rows] @ weight.t()).to(losses.dtype)
        losses[rows] = F.cross_entropy(logits, columns[rows], reduction="none")


def _average(losses: Tensor, targets: Tensor) -> Tensor:
    return losses.sum() / (targets != IGNORED).sum()


def _cast_for_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both tensors as autocast casts the inputs of a Linear."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _can_fuse(model: nn.Module) -> bool:
    """Whether calling `model` and then cross-entropy is the same as `fused_cross_entropy` of its hidden states."""
    if not (is_untouched(model, GPTModel) and is_untouched(cast(GPTModel, model).out_head, nn.Linear)):
        return False
    head = cast(GPTModel, model).out_head
    return head.bias is None and type(head.weight) is nn.Parameter


def _compute_hidden(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states (batch, tokens, emb_dim) of a GPTModel, and its head (vocab_size, emb_dim)."""
    gpt = cast(GPTModel, model)
    return gpt.compute_hidden(inputs), gpt.out_head.weight

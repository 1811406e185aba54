"""How wrong the model is: cross-entropy, in nats, of the tokens that came next.

`fused_cross_entropy` computes head and loss together, some rows at a time, so that the logits of a whole batch (a
gigabyte for GPT-2's vocabulary) never exist; it makes the gradients in the same pass, from one softmax. The seed's
`calc_loss_batch` takes any module and uses it only where nobody can tell the difference. Which batches are evaluated,
and what is done with the gradients, is decided elsewhere.
"""

from collections.abc import Sized
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcore.errors import ConfigError
from gptcore.model import GPTModel
from gptcore.untouched import is_untouched

IGNORED = -100
"""A target that counts for nothing, as in `torch.nn.functional.cross_entropy`."""

_ROWS = 1024
"""Rows whose logits are held at once: 200 MB for GPT-2's vocabulary. Half of them would make an update at shape S of
bench/shapes.py 5 percent slower."""
_FAR = 60.0


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: torch.device | str) -> Tensor:
    """Mean cross-entropy in nats of a batch, a scalar to call `backward` on.

    `input_batch` and `target_batch` are ids (batch, tokens); `model` is any module that maps ids to logits (batch,
    tokens, classes). A GPTModel with a plain head goes through `fused_cross_entropy`, which cannot be differentiated
    twice (nor can the CPU's fused attention).
    """
    inputs, targets = input_batch.to(device), target_batch.to(device)
    if _can_fuse(model) and targets.dtype == torch.int64 and targets.shape == inputs.shape:
        return fused_cross_entropy(*_hidden_and_weight(model, inputs), targets)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def calc_loss_loader(
    data_loader: Any, model: nn.Module, device: torch.device | str, num_batches: int | None = None
) -> float:
    """Mean of the losses of the first `num_batches` batches (all by default), in nats; nan for an empty loader.

    Mode and gradients are the caller's business. Raises ConfigError where `num_batches` is less than 1.
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
def token_losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every single target: ids (batch, tokens), twice -> (batch, tokens), without gradient.

    Ignored targets cost 0. Inputs and targets lie on the model's device.
    """
    if _can_fuse(model):
        hidden, weight = _autocast(*_hidden_and_weight(model, inputs))
        return _losses_and_gradients(hidden.flatten(0, 1), weight, targets.flatten())[0].view_as(targets)
    logits = model(inputs).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


@torch.no_grad()
def losses_and_ranks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of `hidden @ weight.T`: the target's cross-entropy in nats, and how many others were as likely.

    hidden (rows, emb_dim), weight (vocabulary, emb_dim), targets (rows,) -> (rows,) floats, (rows,) int64. A rank of 0
    is a hit; ties count against it. Where a loss is not a number, every other entry ranks before the target.
    """
    losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    ranks = torch.empty_like(targets)
    buffer = _buffer(hidden, weight)
    for start in range(0, len(hidden), _ROWS):
        rows = slice(start, start + _ROWS)
        probabilities = _probabilities(hidden[rows], weight, buffer)
        chosen = probabilities.gather(1, targets[rows, None])
        losses[rows] = -chosen.log().squeeze(1)
        # Counting in place, as floats, takes a sixth of the time that counting booleans takes on a CPU.
        ranks[rows] = probabilities[:, : len(weight)].ge_(chosen).sum(dim=1).long() - 1
    _repair_far(losses, hidden, weight, targets)
    return losses, torch.where(losses.isnan(), len(weight), ranks)


def fused_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against `targets`, without ever holding all of these logits.

    hidden (..., emb_dim), weight (vocabulary, emb_dim), targets (...) int64 where -100 is ignored. The matmuls run in
    the dtype of `hidden` (autocast's, where it is on), the softmax at least in fp32, and so is the loss returned. The
    method is that of Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training".
    """
    hidden, weight = _autocast(hidden, weight)
    rows = hidden.flatten(0, -2), weight, targets.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _FusedCrossEntropy.apply(*rows)
    return _mean(_losses_and_gradients(*rows)[0], rows[2])


class _FusedCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        for_hidden, for_weight, _ = ctx.needs_input_grad
        losses, *gradients = _losses_and_gradients(hidden, weight, targets, for_hidden, for_weight)
        ctx.save_for_backward(*gradients)
        return _mean(losses, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # Asking a GPU for the value would make it wait; multiplying on a CPU would cost a pass over the vocabulary.
        if grad_output.device.type != "cpu" or grad_output.item() != 1:
            hidden_grad = None if hidden_grad is None else hidden_grad * grad_output.to(hidden_grad.dtype)
            weight_grad = None if weight_grad is None else weight_grad * grad_output.to(weight_grad.dtype)
        return hidden_grad, weight_grad, None


def _losses_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool = False, for_weight: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (rows,) and, where wanted, the gradients of their mean: (rows, emb_dim) and (vocabulary, emb_dim)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = targets != IGNORED
    columns = torch.where(valid, targets, 0)
    shares = valid.to(wide) / valid.sum()
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if for_hidden else None
    unwritten = torch.empty_like if len(hidden) else torch.zeros_like  # without rows nobody writes it
    weight_grad = unwritten(weight, dtype=wide) if for_weight else None
    buffer = _buffer(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), _ROWS):
            rows = slice(start, start + _ROWS)
            probabilities = _probabilities(hidden[rows], weight, buffer)
            index = columns[rows, None]
            chosen = probabilities.gather(1, index)
            losses[rows] = -chosen.log().squeeze(1)
            if not (for_hidden or for_weight):
                continue
            residual = probabilities.scatter_(1, index, chosen - 1).to(hidden.dtype)[:, : len(weight)]
            share = shares[rows, None]
            if hidden_grad is not None:
                hidden_grad[rows] = (residual @ weight) * share
            if weight_grad is not None:
                _add_product(weight_grad, residual.t(), (hidden[rows] * share).to(hidden.dtype), is_first=start == 0)
        _repair_far(losses, hidden, weight, columns)
    losses = torch.where(valid, losses, 0)
    return losses, hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype)


def _buffer(hidden: Tensor, weight: Tensor) -> Tensor:
    """Room for the logits of some rows. Rows start at multiples of 64 numbers: with GPT-2's 50257 columns in a row
    the product is half as fast again on a CPU."""
    columns = (len(weight) + 63) // 64 * 64
    return hidden.new_empty(min(_ROWS, len(hidden)), columns)


def _probabilities(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """(rows, padded vocabulary), in `buffer` where its precision is enough. The padding gets probability 0."""
    logits = buffer[: len(hidden)]
    torch.mm(hidden, weight.t(), out=logits[:, : len(weight)])
    logits[:, len(weight) :] = -torch.inf
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # In place, a CPU spares itself the page faults of another buffer; elsewhere PyTorch does not promise that it works.
    return torch.softmax(wide, dim=1, out=wide if wide.device.type == "cpu" else None)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """The first one is written where nothing was, which spares a pass of zeros over the whole vocabulary."""
    if total.dtype != left.dtype:
        product = left @ right
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


def _repair_far(losses: Tensor, hidden: Tensor, weight: Tensor, columns: Tensor) -> None:
    """Where the target's probability nears the smallest float, its logarithm is lost: there the logits are made again.

    The gradients need no repair: a probability that small contributes nothing to them.
    """
    far = (losses > _FAR).nonzero().squeeze(1)
    for rows in far.split(_ROWS):
        logits = (hidden[rows] @ weight.t()).to(losses.dtype)
        losses[rows] = F.cross_entropy(logits, columns[rows], reduction="none")


def _mean(losses: Tensor, targets: Tensor) -> Tensor:
    return losses.sum() / (targets != IGNORED).sum()


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast would do to the inputs of a Linear."""
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


def _hidden_and_weight(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    ours = cast(GPTModel, model)
    return ours.hidden(inputs), ours.out_head.weight

"""The training loop: a generator that updates the weights once per iteration.

The caller (trainer.py) decides when to evaluate, log, save or stop. All that is resumed is in `TrainState`. If a
change gives other weights, see resolve.find_training_version.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.config import TrainConfig
from gptcore.errors import TrainingDiverged
from gptcore.model.gpt import GPTModel
from gptcore.model.loss import calc_loss_batch
from gptcore.training.batches import Batches, BatchPairs, feed
from gptcore.training.optim import learning_rate, set_learning_rate
from gptcore.training.parallel import local_shard
from gptcore.training.preserve import preserve_training_state
from gptcore.training.run_directory import Update
from gptcore.training.state import TrainState


def run_updates(state: TrainState, batches: Batches, cfg: TrainConfig) -> Iterator[Update]:
    """Update the weights until the budget is used up, and yield after each update.

    Raises TrainingDiverged before an update whose loss or gradient is not finite.

    Example: `for update in run_updates(state, batches, cfg): print(update.step, update.loss)`.
    """
    total_steps = steps_in_budget(cfg, batches)
    micro_batches = feed(batches, state.step, state.device)
    while not is_budget_reached(state, cfg, total_steps):
        began = time.perf_counter()
        rate = learning_rate(cfg, state.step, _progress(state, cfg, total_steps))
        state.ranks.seed(cfg.seed, state.step)
        loss, grad_norm = update_weights(state, next(micro_batches), rate, cfg)
        num_tokens = batches.tokens_per_step
        state.step += 1
        state.tokens_seen += num_tokens
        seconds = time.perf_counter() - began
        if cfg.max_seconds is not None:  # all ranks must reach this limit at the same update
            (seconds,) = state.ranks.average(seconds)
        state.seconds += seconds
        yield Update(
            step=state.step,
            epoch=state.step / batches.steps_per_epoch,
            tokens_seen=state.tokens_seen,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=num_tokens / seconds,
            seconds=state.seconds,
            progress=_progress(state, cfg, total_steps),
        )


def update_weights(state: TrainState, micro_batches: BatchPairs, rate: float, cfg: TrainConfig) -> tuple[float, float]:
    """Update the weights once by the mean gradient of the micro-batches. Return the mean loss and the gradient's norm.

    Each rank passes its rows of every micro-batch, (rows, tokens), and all ranks return the same numbers. The loss is
    in nats per token. Raises TrainingDiverged, with the weights unchanged, if a number is not finite.
    """
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    losses = _accumulate_gradients(state, micro_batches, cfg.precision)
    gradients = [local_shard(parameter.grad) for parameter in state.model.parameters() if parameter.grad is not None]
    gradient_norm = _compute_norm(gradients)
    # Only here does the CPU wait for a GPU, after all micro-batches are queued.
    loss, norm = sum(micro_loss.item() for micro_loss in losses), gradient_norm.item()
    if state.ranks.size > 1:
        loss, norm = _combine_ranks(state, loss, norm)
    _check_finite(state.step, loss, norm, rate)
    if cfg.grad_clip and norm > cfg.grad_clip:  # as torch's clip_grad_norm_, which would also multiply by 1
        torch._foreach_mul_(gradients, cfg.grad_clip / norm)
    state.optimizer.step()
    return loss, norm


def _accumulate_gradients(state: TrainState, micro_batches: BatchPairs, precision: str) -> list[Tensor]:
    """Add up the gradients of the micro-batches. Return each one's share of the mean loss: scalars."""
    losses = []
    is_alone = state.ranks.size == 1
    with _add_tied_gradient_in_place(state.model) if is_alone else contextlib.nullcontext():
        for number, (inputs, targets) in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            with autocast(state.device, precision):
                loss = state.parallel.compute_loss(inputs, targets, is_last) / len(micro_batches)  # ()
            loss.backward()
            losses.append(loss.detach())
    return losses


@contextlib.contextmanager
def _add_tied_gradient_in_place(model: GPTModel) -> Iterator[None]:
    """Inside this context, add the embedding's gradient in place to that of a tied head, in the rows of the batch.

    Autograd would make a second matrix of zeros, (vocabulary, emb_dim), and add it. On a GPU this context does nothing,
    because the GPU would have to wait for the number of rows.
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


def _compute_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm, a scalar, of all gradients together.

    A dot product takes half the time of torch's norm, and is more exact.
    """
    flat = [gradient.flatten() for gradient in gradients]  # (numbers,) each
    return torch.stack([vector.dot(vector) for vector in flat]).sum().sqrt()  # ()


def _combine_ranks(state: TrainState, loss: float, norm: float) -> tuple[float, float]:
    """Return the loss and gradient norm of the whole batch, from those of each rank's rows or shards."""
    mean_loss, mean_square = state.ranks.average(loss, norm * norm)
    square = mean_square * state.ranks.size if state.parallel.is_sharded else mean_square
    return mean_loss, math.sqrt(square)


def _check_finite(step: int, loss: float, norm: float, rate: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {name} of step {step + 1} is {value}, at learning rate {rate:.3g}; the weights before it "
                "are finite. Lower train.learning_rate, raise train.warmup_steps, or set train.grad_clip to 1.",
                step,
            )


def compute_mean_loss(model: nn.Module, batches: BatchPairs, device: torch.device, precision: str = "fp32") -> float:
    """Return the mean nats per token over `batches` in eval mode. The model's mode and all random states stay."""
    total, count = 0.0, 0
    with preserve_training_state(model), torch.no_grad(), autocast(device, precision):
        for inputs, targets in batches:  # (batch, tokens) each
            total += calc_loss_batch(inputs, targets, model, device).item() * targets.numel()
            count += targets.numel()
    return total / count


def evaluate_loss(state: TrainState, batches: BatchPairs, precision: str) -> float:
    """Return `compute_mean_loss` of the model in training. With several ranks, each computes its own rows."""
    ranks = state.ranks
    if ranks.size == 1:
        return compute_mean_loss(state.model, batches, state.device, precision)
    total, count = 0.0, 0.0
    with preserve_training_state(state.model), torch.no_grad(), autocast(state.device, precision):
        for inputs, targets in batches:  # (batch, tokens) each
            own = torch.arange(len(inputs)).tensor_split(ranks.size)[ranks.rank]  # (own rows,)
            # A rank without rows computes row 0 for nothing, because all ranks have to gather the shards together.
            computed = own if len(own) else [0]
            loss = state.parallel.evaluate_loss(inputs[computed], targets[computed]).item()
            total += loss * targets[own].numel() if len(own) else 0.0
            count += targets[own].numel()
    total, count = ranks.average(total, count)
    return total / count


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Run the forward pass inside this context in `precision` (fp32 or bf16)."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def steps_in_budget(cfg: TrainConfig, batches: Batches) -> int | None:
    """Return the update at which steps, epochs or tokens run out, or None if only seconds are limited."""
    limits = []
    if cfg.max_steps is not None:
        limits.append(cfg.max_steps)
    if cfg.max_epochs is not None:
        limits.append(cfg.max_epochs * batches.steps_per_epoch)
    if cfg.max_tokens is not None:
        limits.append(math.ceil(cfg.max_tokens / batches.tokens_per_step))
    return min(limits) if limits else None


def is_budget_reached(state: TrainState, cfg: TrainConfig, total_steps: int | None) -> bool:
    """Whether no further update is allowed."""
    return _progress(state, cfg, total_steps) >= 1.0


def _progress(state: TrainState, cfg: TrainConfig, total_steps: int | None) -> float:
    """Return the fraction of the budget that is used, from 0 to 1."""
    fractions = [0.0]
    if total_steps is not None:
        fractions.append(state.step / total_steps)
    if cfg.max_seconds is not None:
        fractions.append(state.seconds / cfg.max_seconds)
    return min(1.0, max(fractions))


def is_evaluation_step(step: int, eval_every: int) -> bool:
    """Whether the book's code evaluates after update `step`: after update 1, then every `eval_every` updates."""
    return (step - 1) % eval_every == 0

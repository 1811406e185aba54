"""Training: a generator over one state, and the program that runs it on a run directory.

`training(state, batches, cfg)` performs one update per iteration and yields what happened; the caller decides when to
evaluate, log, save or stop. What is not in `TrainState` is not resumed. `python -m gptcore.train RUN_DIR` is that
caller for a run directory: it resumes from the newest valid checkpoint, saves on a signal, and ends by committing the
best weights. Nothing here knows an orchestrator or a tracker; they read metrics.jsonl.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.config import TrainConfig, uneven
from gptcore.data import Batches, feed
from gptcore.errors import ConfigError, TrainingDiverged
from gptcore.evaluate import undisturbed
from gptcore.learning.parts import local
from gptcore.learning.state import TrainState
from gptcore.loss import calc_loss_batch
from gptcore.optim import learning_rate, set_learning_rate
from gptcore.tied import gradient_in_place

TRAINING_VERSION = 2
"""Raised whenever the arithmetic of training changes, so that run keys of different arithmetic differ."""

MicroBatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """What one update did."""

    step: int
    """Updates completed, this one included."""
    epoch: float
    """Passes over the train split so far."""
    tokens_seen: int
    loss: float
    """Mean nats per token of the update's own batch, dropout included."""
    learning_rate: float
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""
    tokens_per_second: float
    seconds: float
    """Time spent in updates so far, over all attempts."""
    progress: float
    """Share of the budget used up, from 0 to 1."""


def resolve(train: TrainConfig) -> TrainConfig:
    """Replaces every `auto` by what it stands for on this machine. A fixed rule: two runs choose alike.

    On the CPUs measured, bf16 autocast takes 1.6 times as long as fp32; on CUDA devices it is the faster one. Compiling
    took 20 to 50 s on them and made no update faster, as what is slow is fused already; on CUDA devices it saves most
    of the launches of small kernels. Threads are the cores this process may use. Processes are as many as GPUs, of
    which each takes one. Raises ConfigError where so many cannot share a batch.
    """
    device = train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else "fp32"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    processes = gpus if train.processes == "auto" else train.processes
    if (wrong := uneven(train.batch_size, processes, "processes")) is not None:
        raise ConfigError(f"train: {wrong}")
    return train.model_copy(
        update={
            "device": device,
            "precision": precision,
            "compile": device.startswith("cuda") if train.compile == "auto" else train.compile,
            "threads": threads if train.threads == "auto" else train.threads,
            "processes": processes,
        }
    )


def training(state: TrainState, batches: Batches, cfg: TrainConfig) -> Iterator[Update]:
    """Updates the weights until the budget is used up, yielding after each update.

    Raises TrainingDiverged before an update whose loss or gradient is not finite.
    """
    total_steps = steps_in_budget(cfg, batches)
    fed = feed(batches, state.step, state.device)
    while not budget_reached(state, cfg, total_steps):
        began = time.perf_counter()
        rate = learning_rate(cfg, state.step, _progress(state, cfg, total_steps))
        state.ranks.seed(cfg.seed, state.step)
        loss, grad_norm = update(state, next(fed), rate, cfg)
        num_tokens = batches.tokens_per_step
        state.step += 1
        state.tokens_seen += num_tokens
        took = time.perf_counter() - began
        if cfg.max_seconds is not None:  # which all ranks must use up at the same update
            (took,) = state.ranks.means(took)
        state.seconds += took
        yield Update(
            step=state.step,
            epoch=state.step / batches.steps_per_epoch,
            tokens_seen=state.tokens_seen,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=num_tokens / took,
            seconds=state.seconds,
            progress=_progress(state, cfg, total_steps),
        )


def update(state: TrainState, micro_batches: MicroBatches, rate: float, cfg: TrainConfig) -> tuple[float, float]:
    """One update from the mean gradient of the micro-batches: returns the mean loss and the gradient's norm.

    Of several ranks each gives its rows of every micro-batch, and all return the same. Raises TrainingDiverged, with
    the weights as they were, if either is not finite.
    """
    set_learning_rate(state.optimizer, rate)
    state.optimizer.zero_grad(set_to_none=True)
    losses = []
    is_alone = state.ranks.size == 1
    with gradient_in_place(state.model) if is_alone else contextlib.nullcontext():
        for number, (inputs, targets) in enumerate(micro_batches, 1):
            with autocast(state.device, cfg.precision):
                loss = state.spread.loss(inputs, targets, number == len(micro_batches)) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
    gradients = [local(parameter.grad) for parameter in state.model.parameters() if parameter.grad is not None]
    gradient_norm = _norm(gradients)
    # A GPU is waited for here and nowhere else, when all micro-batches are under way.
    total, norm = sum(loss.item() for loss in losses), gradient_norm.item()
    if not is_alone:
        total, norm = _of_all_ranks(state, total, norm)
    for name, value in (("loss", total), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {name} of update {state.step + 1} is {value}, at learning rate {rate:.3g}; the weights before it "
                "are finite. Lower train.learning_rate, raise train.warmup_steps, or set train.grad_clip to 1.",
                state.step,
            )
    if cfg.grad_clip and norm > cfg.grad_clip:  # as torch's clip_grad_norm_, which would multiply by 1 too
        torch._foreach_mul_(gradients, cfg.grad_clip / norm)
    state.optimizer.step()
    return total, norm


def _of_all_ranks(state: TrainState, loss: float, norm: float) -> tuple[float, float]:
    """Loss and gradient norm of the whole batch, of those that this rank found in its part."""
    total, square = state.ranks.means(loss, norm * norm)
    return total, math.sqrt(square * state.ranks.size) if state.spread.is_sharded else math.sqrt(square)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean, of all of them together. A dot product takes half the time of torch's norm, and is more exact."""
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([each.dot(each) for each in flat]).sum().sqrt()


def mean_loss(model: nn.Module, batches: MicroBatches, device: torch.device, precision: str = "fp32") -> float:
    """Mean nats per token over `batches`, in eval mode, leaving the model's mode and every random state alone."""
    total, count = 0.0, 0
    with undisturbed(model), torch.no_grad(), autocast(device, precision):
        for inputs, targets in batches:
            total += calc_loss_batch(inputs, targets, model, device).item() * targets.numel()
            count += targets.numel()
    return total / count


def evaluated_loss(state: TrainState, batches: MicroBatches, precision: str) -> float:
    """`mean_loss` of the model being trained; of several ranks each computes its rows of every batch."""
    ranks = state.ranks
    if ranks.size == 1:
        return mean_loss(state.model, batches, state.device, precision)
    total, count = 0.0, 0.0
    with undisturbed(state.model), torch.no_grad(), autocast(state.device, precision):
        for inputs, targets in batches:
            own = torch.arange(len(inputs)).tensor_split(ranks.size)[ranks.rank]
            computed = own if len(own) else [0]  # for nothing: parts of the weights are gathered by all or by none
            loss = state.spread.evaluated(inputs[computed], targets[computed]).item()
            total += loss * targets[own].numel() if len(own) else 0.0
            count += targets[own].numel()
    total, count = ranks.means(total, count)
    return total / count


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The forward pass in `precision` (fp32 or bf16)."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def steps_in_budget(cfg: TrainConfig, batches: Batches) -> int | None:
    """The number of updates after which steps, epochs or tokens run out, or None if only seconds are limited."""
    limits = []
    if cfg.max_steps is not None:
        limits.append(cfg.max_steps)
    if cfg.max_epochs is not None:
        limits.append(cfg.max_epochs * batches.steps_per_epoch)
    if cfg.max_tokens is not None:
        limits.append(math.ceil(cfg.max_tokens / batches.tokens_per_step))
    return min(limits) if limits else None


def budget_reached(state: TrainState, cfg: TrainConfig, total_steps: int | None) -> bool:
    """Whether no further update is allowed."""
    return _progress(state, cfg, total_steps) >= 1.0


def _progress(state: TrainState, cfg: TrainConfig, total_steps: int | None) -> float:
    shares = [0.0]
    if total_steps is not None:
        shares.append(state.step / total_steps)
    if cfg.max_seconds is not None:
        shares.append(state.seconds / cfg.max_seconds)
    return min(1.0, max(shares))


def is_evaluated(step: int, eval_every: int) -> bool:
    """The seed's grid: after update 1 and every `eval_every` updates from there."""
    return (step - 1) % eval_every == 0


def train_model_simple(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """The seed's training loop, printing losses and, after each epoch, a sample.

    Returns the train losses, the val losses and the tokens seen at each evaluation. Raises TrainingDiverged before an
    update whose loss is not finite.
    """
    from gptcore.evaluate import evaluate_model
    from gptcore.generate import generate_and_print_sample

    train_losses: list[float] = []
    val_losses: list[float] = []
    track_tokens_seen: list[int] = []
    tokens_seen, step = 0, 0
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(f"the loss of update {step + 1} is {loss.item()}: lower the learning rate", step)
            loss.backward()
            optimizer.step()
            tokens_seen += input_batch.numel()
            step += 1
            if is_evaluated(step, eval_freq):
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step - 1:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


if __name__ == "__main__":
    from gptcore.learning.trainer import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: Python would take all of torch apart first, for a third of a second

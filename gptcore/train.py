"""The program `python -m gptcore.train RUN_DIR`, and the book's `train_model_simple`.

The program trains in a run directory. It resumes from the newest valid checkpoint, saves on a signal, and finally
commits the best weights. It knows neither an orchestrator nor a tracker; they read metrics.jsonl. Its code is in
training/trainer.py. `train_model_simple` is a loop of its own, for a reader of the book.
"""

import math
import os
import sys
from typing import Any

import torch
from torch import nn

from gptcore.errors import TrainingDiverged
from gptcore.model.loss import calc_loss_batch
from gptcore.training.loop import is_evaluation_step


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
    """Train `model` with the book's loop (chapter 5): print losses and, after each epoch, a sample.

    The loaders yield input and target ids, each (batch, tokens). `eval_freq` is in updates, `eval_iter` in batches.
    Returns the train losses and the val losses, both in nats per token, and the tokens seen, one of each per
    evaluation. Raises TrainingDiverged before an update whose loss is not finite.
    """
    from gptcore.evaluation.bits_per_byte import evaluate_model
    from gptcore.generation.generate import generate_and_print_sample

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
                raise TrainingDiverged(f"the loss of step {step + 1} is {loss.item()}. Lower the learning rate.", step)
            loss.backward()
            optimizer.step()
            tokens_seen += input_batch.numel()
            step += 1
            if is_evaluation_step(step, eval_freq):
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step - 1:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


if __name__ == "__main__":
    from gptcore.training.trainer import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is written; a normal exit would spend 0.3 s on taking torch apart

"""Loads the model that a finished training left in its run directory. bundle.py loads models from bundles."""

import torch
from safetensors.torch import load_file

from gptcore import manifest
from gptcore.devices import choose_usable_device
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.run_directory import RunDirectory


def load_model(run: RunDirectory, tokens: Tokens, device: torch.device) -> tuple[GPTModel, Tokenizer]:
    """Load the run's best weights, in eval mode on `device`, and its tokenizer.

    Raises CheckpointError if the weights were altered since the training ended.
    """
    manifest.verify(run.final)
    model = GPTModel(run.read_config().cfg())
    model.load_state_dict(load_file(run.weights))
    return model.to(device).eval(), tokens.load_tokenizer()


def choose_scoring_device(run: RunDirectory) -> torch.device:
    """Return the training's device if this machine has it, else the one that `auto` means here."""
    return choose_usable_device(run.read_config().train.device)

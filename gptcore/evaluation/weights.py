"""Loads the model that a finished training left in its run directory. bundle.py loads models from bundles."""

from safetensors.torch import load_file

from gptcore import manifest
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.run_directory import RunDirectory


def load_model(run: RunDirectory, tokens: Tokens) -> tuple[GPTModel, Tokenizer]:
    """Load the run's best weights, in eval mode on the training's device, and its tokenizer.

    Raises CheckpointError if the weights were altered since the training ended.
    """
    manifest.verify(run.final)
    config = run.read_config()
    model = GPTModel(config.cfg())
    model.load_state_dict(load_file(run.weights))
    return model.to(config.train.device).eval(), tokens.load_tokenizer()

"""The model that a finished training has made, as its run directory keeps it."""

from safetensors.torch import load_file

from gptcore import manifest
from gptcore.data import Tokens
from gptcore.learning.rundir import RunDirectory
from gptcore.model import GPTModel
from gptcore.tokenizer import Tokenizer


def load_model(run: RunDirectory, tokens: Tokens) -> tuple[GPTModel, Tokenizer]:
    """The run's best weights in eval mode on the training's device, and the tokenizer.

    Raises CheckpointError if they were altered since the training ended.
    """
    manifest.verify(run.final)
    config = run.config()
    model = GPTModel(config.cfg())
    model.load_state_dict(load_file(run.weights))
    return model.to(config.train.device).eval(), tokens.load_tokenizer()

"""The code of a registered model. MLflow copies it beside the bundle and runs it on `mlflow.pyfunc.load_model`.

It imports only gptcore. MLflow stores a copy of gptcore with the version, so the version always answers as it did when
it was registered. A request is refused with an MlflowException of the code INVALID_PARAMETER_VALUE: MLflow's scoring
server then answers with 400 and the message. Any other exception would show its traceback to the client. MLflow
handles a request first: it drops parameters and columns that the signature does not name, with a warning in its log,
and turns a number in `inputs` into a string of its digits.
"""

from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

MAX_PROMPTS = 1000
MAX_NEW_TOKENS = 4096
DEFAULTS = {
    "max_new_tokens": 50,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "seed": 0,
}
"""The parameters, which the signature in register.py also names. top_k 0 draws among all tokens."""


class GPTTextModel(PythonModel):
    """A model that continues prompts. Each row is a prompt; its continuation ends before the first string of `stop`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle, which is safetensors and JSON, onto the GPU if this machine has one, else into memory."""
        from gptcore.bundle import load

        self.bundle = load(Path(context.artifacts["bundle"]), device="auto")

    # With type hints, MLflow would infer a signature without parameters, and ignore the one that it is given.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Continue each prompt of `model_input`, a list or a DataFrame of one column. Row i is drawn with `seed` + i.

        Raises MlflowException with the code INVALID_PARAMETER_VALUE if a prompt is not a string or a setting is out of
        range.
        """
        from gptcore.errors import ConfigError

        prompts = list(model_input.iloc[:, 0] if hasattr(model_input, "columns") else model_input)
        _check_prompts(prompts)
        settings = DEFAULTS | {name: value for name, value in (params or {}).items() if value is not None}
        try:
            return self._continue(prompts, **settings)
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _continue(
        self, prompts: list[str], max_new_tokens: int, top_k: int, stop: list[str], seed: int, **settings: Any
    ) -> list[str]:
        from gptcore.errors import ConfigError
        from gptcore.generation.generate import generate_batch, stream_text
        from gptcore.generation.sampling import Sampling

        if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be from 1 to {MAX_NEW_TOKENS}.")
        if top_k < 0:
            raise ConfigError(f"top_k is {top_k}; it must be at least 1, or 0 for the whole vocabulary.")
        tokenizer = self.bundle.tokenizer
        texts = generate_batch(
            self.bundle.model,
            [tokenizer.encode_prompt(prompt) for prompt in prompts],
            max_new_tokens,
            Sampling(top_k=top_k or None, **settings),
            seed=seed,
            eos_id=tokenizer.eot,
        )
        return ["".join(stream_text(tokenizer, ids, stop)) for ids in texts]


def _check_prompts(prompts: list[Any]) -> None:
    if not prompts or len(prompts) > MAX_PROMPTS:
        raise MlflowException.invalid_parameter_value(
            f"there are {len(prompts)} prompts; a request must have from 1 to {MAX_PROMPTS}."
        )
    wrong = next((number for number, prompt in enumerate(prompts) if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise MlflowException.invalid_parameter_value(
            f"prompt {wrong} is {prompts[wrong]!r:.80}, of type {type(prompts[wrong]).__name__}; every prompt must be "
            'a string: {"inputs": ["Once upon a time"]}.'
        )


set_model(GPTTextModel())

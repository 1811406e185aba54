"""The code of a registered model, which MLflow copies beside its bundle and runs on `mlflow.pyfunc.load_model`.

It imports only gptcore, a copy of which travels along, so a version answers as it did when it was registered.
"""

from pathlib import Path

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class GPTTextModel(PythonModel):
    """Continues prompts. A row is a prompt; the answer is its continuation."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the bundle: safetensors and JSON."""
        from gptcore.bundle import load

        self.bundle = load(Path(context.artifacts["bundle"]))

    # Hints here would make MLflow infer another signature than the one it is given, one without parameters.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """`model_input` is a list of prompts, or a DataFrame of one column. Row i is drawn with `seed` + i."""
        prompts = model_input.iloc[:, 0] if hasattr(model_input, "columns") else model_input
        return [self._continue(str(prompt), i, **(params or {})) for i, prompt in enumerate(prompts)]

    def _continue(
        self,
        prompt: str,
        row: int,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        from gptcore.generate import generate

        model, tokenizer = self.bundle.model, self.bundle.tokenizer
        ids = tokenizer.encode(prompt) or [tokenizer.eot]
        drawn = generate(
            model,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p,
            seed=seed + row,
            eos_id=tokenizer.eot,
        )
        return tokenizer.decode(list(drawn))


set_model(GPTTextModel())

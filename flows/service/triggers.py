"""What starts a pipeline besides its schedule: the key `triggers` of pipelines.yaml, checked without importing Prefect.

The events themselves, and who sends them, stand in events.py.
"""

from typing import Literal, Self

from pydantic import model_validator

from flows.service.events import CORPUS_CHANGED, MODEL_PROMOTED, model_resource, pipeline_resource
from gptcore.sections import Section


class TriggerConfig(Section):
    """An event that starts a run of the pipeline: its corpus changed, or another model got a new champion."""

    on: Literal["corpus_changed", "promoted"]
    """corpus_changed: the flow `watch` saw that the pipeline's sources look different. promoted: the champion of
    `model` was moved, by the gate or by a person, forward or back."""
    model: str | None = None
    """With promoted: the registered model, as another pipeline of the file has it in model_name."""

    @model_validator(mode="after")
    def _a_model_where_one_is_meant(self) -> Self:
        if self.on == "promoted" and self.model is None:
            raise ValueError("promoted needs a model: which one's? As in {on: promoted, model: gpt-base}")
        if self.on == "corpus_changed" and self.model is not None:
            raise ValueError(
                f"corpus_changed is about the pipeline's own corpus; it has no model (given: {self.model!r:.80})"
            )
        return self

    def awaited(self, pipeline: str) -> tuple[str, str]:
        """The event that starts the pipeline, and the resource that it must concern."""
        if self.model is None:
            return CORPUS_CHANGED, pipeline_resource(pipeline)
        return MODEL_PROMOTED, model_resource(self.model)

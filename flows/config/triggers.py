"""What starts a pipeline besides its schedule: the key `triggers` of pipelines.yaml.

Triggers are checked here without importing Prefect. See flows/notifications/events.py for the events and for what
sends them.
"""

from typing import Literal, Self

from pydantic import model_validator

from flows.notifications.events import CORPUS_CHANGED, MODEL_PROMOTED, model_resource, pipeline_resource
from gptcore.sections import Section


class TriggerConfig(Section):
    """An event that starts a run of the pipeline: its corpus changed, or another model got a new champion.

    The champion is the version that the alias `@champion` of a registered model names.
    """

    on: Literal["corpus_changed", "promoted"]
    """corpus_changed: the flow `watch` saw that the pipeline's sources have changed. promoted: the gate or a person
    made another version the champion of `model`, by a promotion or a rollback."""
    model: str | None = None
    """With promoted: the registered model, which is the model_name of another pipeline in the file."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.on == "promoted" and self.model is None:
            raise ValueError("promoted needs a model, as in {on: promoted, model: gpt-base}")
        if self.on == "corpus_changed" and self.model is not None:
            raise ValueError(
                f"corpus_changed is about the pipeline's own corpus; it has no model (given: {self.model!r:.80})"
            )
        return self

    def awaited_event(self, pipeline: str) -> tuple[str, str]:
        """Return the name of the event that starts the pipeline, and the resource that the event is about."""
        if self.model is None:
            return CORPUS_CHANGED, pipeline_resource(pipeline)
        return MODEL_PROMOTED, model_resource(self.model)

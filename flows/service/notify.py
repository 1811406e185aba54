"""Who is told, and of what: the key `notify` of pipelines.yaml, and the messages.

Nobody watches a machine that retrains every night, so it speaks up when a run failed or was killed, when there is a new
champion, and when a pipeline has had no success for too long (watch.py looks for that). A message that cannot be
delivered is logged, and never changes how a run ended. Prefect is imported only where there is something to send.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gptcore.errors import GPTCoreError
from gptcore.sections import Section

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun

Occasion = Literal["failure", "promotion", "stale"]
Log = logging.Logger | logging.LoggerAdapter[Any]
_CONNECT_SECONDS = 3.05
_READ_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
_TRIES = 2


class NotifyConfig(Section):
    """One place that is told: a webhook, or a notification block that is saved on the Prefect server.

    A webhook's address stands in pipelines.yaml and in the Prefect UI. Where the address itself is the secret, as with
    Slack or Teams, save a block of that kind in the UI and name it here: the block keeps the address to itself.
    """

    webhook: str | None = None
    """An http(s) address that gets a POST with a JSON object: pipeline, event, title, text, flow_run_id, url, time."""
    block: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")] | None = None
    """Type and name of a notification block on the Prefect server, as in slack-webhook/team."""
    on: Annotated[tuple[Occasion, ...], Field(min_length=1)] = ("failure", "promotion", "stale")
    """failure: a run failed or was killed. promotion: there is a new champion. stale: no success for longer than the
    schedule allows, said once until there is one."""

    @field_validator("webhook")
    @classmethod
    def _webhook_is_an_address(cls, given: str | None) -> str | None:
        if given is not None and not _is_address(given):
            raise ValueError("a webhook is an http(s) address, as in https://example.org/hook")
        return given

    @model_validator(mode="after")
    def _one_of_webhook_and_block(self) -> Self:
        if (self.webhook is None) == (self.block is None):
            raise ValueError(f"give one of webhook and block (given: {'neither' if self.block is None else 'both'})")
        return self

    def __str__(self) -> str:
        """What may stand in a log: a webhook's path is often its password."""
        return f"block {self.block}" if self.webhook is None else f"webhook at {urlsplit(self.webhook).hostname}"


@dataclass(frozen=True)
class Message:
    """What happened, for people to read."""

    pipeline: str
    event: Occasion
    title: str
    text: str
    flow_run_id: str | None = None
    url: str | None = None
    """Of the flow run in the Prefect UI."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def send(targets: Sequence[NotifyConfig], message: Message, log: Log) -> int:
    """Tells every target that wants to hear of such an event. Returns how many were reached; failures are logged."""
    reached = 0
    for target in targets:
        if message.event not in target.on:
            continue
        try:
            _post(target.webhook, message) if target.webhook else _say(str(target.block), message)
            reached += 1
        except Exception as error:  # blocks raise whatever they like, and the run's outcome stands
            log.error("%s was not told of the %s: %s", target, message.event, _in_short(error))
    return reached


def tell_failure(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Hook of the flow `retrain`: it failed, or was killed; then this runs in the process that saw it die."""
    tell_end(flow_run, state)


def tell_promotion(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Hook of the flow `retrain`: it completed, perhaps with a new champion."""
    if state.name == "Promoted":
        _tell(flow_run, state, "promotion", f"{flow_run.parameters['model_name']} has a new champion")


def tell_end(flow_run: "FlowRun", state: "State[Any]") -> None:
    """Tells that a run of `retrain` failed or crashed. For whoever finds one that no hook has seen die, too."""
    _tell(flow_run, state, "failure", "failed" if state.is_failed() else "crashed")


def _tell(flow_run: "FlowRun", state: "State[Any]", event: Occasion, what: str) -> None:
    # A hook knows no more of the pipeline than the run's parameters, which hold all that its deployment registered.
    targets = [NotifyConfig.model_validate(given) for given in flow_run.parameters.get("notify") or ()]
    if not targets:
        return
    from prefect.logging.loggers import flow_run_logger
    from prefect.utilities.urls import url_for

    pipeline = str(flow_run.parameters["pipeline"])
    url = url_for("flow-run", obj_id=flow_run.id)
    text = state.message or f"The run ended as {state.name}."
    message = Message(pipeline, event, f"{pipeline}: {what}", text, str(flow_run.id), url)
    send(targets, message, flow_run_logger(flow_run))


def _post(address: str, message: Message) -> None:
    """Raises requests.RequestException if the second attempt fails as well."""
    import requests

    for attempt in range(1, _TRIES + 1):
        try:
            with requests.post(address, json=asdict(message), timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as answer:
                return answer.raise_for_status()
        except requests.RequestException:
            if attempt == _TRIES:
                raise
        time.sleep(_PAUSE_SECONDS)
    return None


def _say(name: str, message: Message) -> None:
    import prefect.blocks.notifications  # noqa: F401  a block is found by its class, which must be known
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    try:
        block = Block.load(name)
    except ValueError:
        raise GPTCoreError("the Prefect server has no such block") from None
    if not isinstance(block, NotificationBlock):
        raise GPTCoreError(f"it is a {type(block).__name__}, not a notification block")
    with block.raise_on_failure():
        text = f"{message.text}\n{message.url or ''}".strip()
        block.notify(body=text, subject=message.title)  # type: ignore[unused-coroutine]  # without an event loop, it acts


def _in_short(error: Exception) -> str:
    """What went wrong, without the text of foreign errors: it holds the whole address."""
    if isinstance(error, GPTCoreError):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ if status is None else f"it answered {status}"


def _is_address(given: str) -> bool:
    try:
        parts = urlsplit(given)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False

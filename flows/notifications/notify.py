"""Notifications for people: the key `notify` of pipelines.yaml, and the messages.

Nobody watches a machine that retrains every night. So it sends a message when a run has failed or was killed, when
there is a new champion, and when a pipeline has had no success for too long (flows/retrain/watch.py checks that). A
message that cannot be delivered is logged, and never changes the outcome of a run. Prefect is imported only when there
is a message to send.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from flows.notifications.verdicts import read_text, read_verdict
from gptcore.credentials import resolve_variable, silence_request_log
from gptcore.errors import ConfigError, GPTCoreError
from gptcore.sections import Section

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun

NotifyEvent = Literal["failure", "promotion", "stale"]
Log = logging.Logger | logging.LoggerAdapter[Any]
_CONNECT_SECONDS = 3.05
_READ_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
_TRIES = 2
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")


class NotifyConfig(Section):
    """One receiver of messages: a webhook, or a notification block that is saved on the Prefect server.

    A webhook's address is visible in pipelines.yaml and in the Prefect UI, and is written nowhere else. If the address
    itself is the secret, as with Slack or Teams, write ${NAME}, an environment variable of the run, or name a
    notification block that was saved in the UI.
    """

    webhook: str | None = None
    """An http(s) address that gets a POST with a JSON object: pipeline, event, title, text, flow_run_id, url, time.
    ${NAME} stands for an environment variable that holds the address or a part of it."""
    block: Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")] | None = None
    """Type and name of a notification block on the Prefect server, as in slack-webhook/team."""
    on: Annotated[tuple[NotifyEvent, ...], Field(min_length=1)] = ("failure", "promotion", "stale")
    """failure: a run failed or was killed. promotion: there is a new champion. stale: no success for longer than the
    schedule allows, sent once until the next success."""

    @field_validator("webhook")
    @classmethod
    def _webhook_is_an_address(cls, given: str | None) -> str | None:
        if given is not None and not (_VARIABLE.fullmatch(given) or _is_address(given)):
            raise ValueError("a webhook is an http(s) address, as in https://example.org/hook")
        return given

    @model_validator(mode="after")
    def _one_of_webhook_and_block(self) -> Self:
        if (self.webhook is None) == (self.block is None):
            raise ValueError(f"give one of webhook and block (given: {'neither' if self.block is None else 'both'})")
        return self

    def __str__(self) -> str:
        """Return the target for logs, without a webhook's path, which is often its password."""
        if self.webhook is None:
            return f"block {self.block}"
        return f"webhook at {urlsplit(self.webhook).hostname or self.webhook}"


@dataclass(frozen=True)
class Message:
    """A message for people."""

    pipeline: str
    event: NotifyEvent
    title: str
    text: str
    flow_run_id: str | None = None
    url: str | None = None
    """The page of the flow run in the Prefect UI."""
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def send(targets: Sequence[NotifyConfig], message: Message, log: Log) -> int:
    """Send the message to every target that wants its event, and return how many took it. Failures are logged."""
    reached = 0
    for target in targets:
        if message.event not in target.on:
            continue
        try:
            _post_to_webhook(target.webhook, message) if target.webhook else _send_to_block(str(target.block), message)
            reached += 1
        except Exception as error:  # a block raises errors of any class, and none may change the run's outcome
            log.error("%s did not receive the message (%s): %s", target, message.event, _describe_error(error))
    return reached


def notify_failure(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Send the message about a failed or killed run. A hook of the flow `retrain`.

    If the run was killed, Prefect calls the hook in the process that noticed it.
    """
    send_failure(flow_run, state)


def notify_promotion(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Send the message about a new champion, if the run made one. A hook of the flow `retrain`."""
    if read_verdict(state) == "promoted":
        _notify(flow_run, state, "promotion", f"{flow_run.parameters['model_name']} has a new champion")


def send_failure(flow_run: "FlowRun", state: "State[Any]") -> None:
    """Send the message that a run of `retrain` failed or crashed. Also for a dead run that no hook has noticed."""
    how = "crashed" if state.is_crashed() else read_verdict(state) or "failed"  # held has its own word
    _notify(flow_run, state, "failure", how)


def _notify(flow_run: "FlowRun", state: "State[Any]", event: NotifyEvent, summary: str) -> None:
    # A hook gets the pipeline only through the run's parameters, which contain everything that its deployment set.
    targets = [NotifyConfig.model_validate(target) for target in flow_run.parameters.get("notify") or ()]
    if not targets:
        return
    from prefect.logging.loggers import flow_run_logger
    from prefect.utilities.urls import url_for

    pipeline = str(flow_run.parameters["pipeline"])
    url = url_for("flow-run", obj_id=flow_run.id)
    message = Message(pipeline, event, f"{pipeline}: {summary}", read_text(state), str(flow_run.id), url)
    send(targets, message, flow_run_logger(flow_run))


def _post_to_webhook(address: str, message: Message) -> None:
    """Send the message as JSON. Raises requests.RequestException if the second attempt fails too.

    Raises ConfigError if an environment variable in the address is not set, or if its value makes no http(s) address.
    """
    import requests

    silence_request_log()
    if not _is_address(target := resolve_variable(address)):
        raise ConfigError(f"{address} does not give an http(s) address. Correct the environment variable")
    for attempt in range(1, _TRIES + 1):
        try:
            with requests.post(target, json=asdict(message), timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as answer:
                return answer.raise_for_status()
        except requests.RequestException:
            if attempt == _TRIES:
                raise
        time.sleep(_PAUSE_SECONDS)
    return None


def _send_to_block(name: str, message: Message) -> None:
    import prefect.blocks.notifications  # noqa: F401  Prefect finds a block by its class, which must be imported
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
        block.notify(body=text, subject=message.title)  # type: ignore[unused-coroutine]  # without an event loop, it runs now


def _describe_error(error: Exception) -> str:
    """Describe the error without the text of other libraries' errors, which contain the whole address."""
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

"""Events for Prefect's server, which start runs: a corpus changed, or a model has another champion.

An event is sent as one plain request, at once. Importing Prefect would take a promotion seconds, and a caller that
records an event as sent must know that the server took it. Only for a server that requires credentials or its own
certificates does Prefect's client send the event. `TriggerConfig` in flows/config/pipelines.py says which events start
a pipeline.
"""

import http.client
import json
import logging
import os
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.notifications.verdicts import FORMER_STATE_NAMES, read_verdict
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun

CORPUS_CHANGED = "gptflow.corpus.changed"
MODEL_PROMOTED = "gptflow.model.promoted"
_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NEEDS_CREDENTIALS = (401, 403)


class EventNotSent(GPTCoreError):
    """The Prefect server did not take an event."""


def pipeline_resource(pipeline: str) -> str:
    """Return the resource id of an event about a pipeline's corpus."""
    return f"gptflow.pipeline.{pipeline}"


def model_resource(model: str) -> str:
    """Return the resource id of an event about a model's champion."""
    return f"gptflow.model.{model}"


def send_corpus_changed(pipeline: str, sources: list[str]) -> None:
    """Send the event that these sources of the pipeline have changed. Raises EventNotSent."""
    _send(CORPUS_CHANGED, pipeline_resource(pipeline), {"pipeline": pipeline, "sources": sources})


def send_model_promoted(model: str, move: dict[str, Any], pipeline: str | None) -> None:
    """Send the event that a promotion or rollback gave `model` another champion. A failure is only logged.

    `move` is the entry of the log of promotions and rollbacks. `pipeline` made the version; None if it is unknown.
    """
    payload = {"model": model, "version": move["to"], "previous": move["from"], "pipeline": pipeline}
    payload |= {key: move[key] for key in ("kind", "by", "reason", "at")}
    try:
        _send(MODEL_PROMOTED, model_resource(model), payload)
    except Exception as error:  # the promotion or rollback is complete already
        logging.getLogger(__name__).warning("%s of %s: %s", MODEL_PROMOTED, model, error)


def send_former_state_name(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Send the event with which an earlier release's run ended, such as prefect.flow-run.Promoted. A hook of the flows.

    Users made automations on these events. The server sends prefect.flow-run.Completed by itself. A failure is only
    logged.
    """
    if (verdict := read_verdict(state)) is None:
        return
    related = [_relate("flow", f"prefect.flow.{flow_run.flow_id}", flow.name)]
    if flow_run.deployment_id is not None:
        related.append(_relate("deployment", f"prefect.deployment.{flow_run.deployment_id}"))
    related += [_relate("tag", f"prefect.tag.{tag}") for tag in flow_run.tags]
    name = f"prefect.flow-run.{FORMER_STATE_NAMES[verdict]}"
    try:
        _send(name, f"prefect.flow-run.{flow_run.id}", {"verdict": verdict, "message": state.message}, related)
    except EventNotSent as error:  # the run has ended already
        logging.getLogger(__name__).warning("%s of %s: %s", name, flow_run.name, error)


def _relate(role: str, resource: str, name: str | None = None) -> dict[str, str]:
    """Return a related resource of an event, in the form of the events that the server sends about flow runs."""
    labels = {"prefect.resource.id": resource, "prefect.resource.role": role}
    return labels if name is None else {**labels, "prefect.resource.name": name}


def _send(event: str, resource: str, payload: dict[str, Any], related: Sequence[dict[str, str]] = ()) -> None:
    """Send an event to the server of PREFECT_API_URL, if the variable is set. Raises EventNotSent."""
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        return
    body = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource},
        "related": list(related),
        "payload": payload,
    }
    try:
        if not _post(f"{api}/events", [body]):
            _post_through_prefect([body])
    except (OSError, http.client.HTTPException) as error:
        raise EventNotSent(f"the Prefect server at {urlsplit(api).hostname} did not take {event}: {error}") from None


def _post(url: str, body: object) -> bool:
    """Send a plain POST. Return False if the server requires credentials or certificates.

    Raises OSError and HTTPException.
    """
    # A proxy of the environment cannot reach this machine's own server.
    is_local = urlsplit(url).hostname in _LOOPBACK
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local else []))
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with opener.open(request, timeout=_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        if error.code not in _NEEDS_CREDENTIALS:
            raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise
    return False


def _post_through_prefect(body: object) -> None:
    from httpx import HTTPError
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=body)
    except HTTPError as error:
        raise OSError(str(error)) from None

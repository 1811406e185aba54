"""What gptflow tells Prefect's server, so that runs can begin because of it: a corpus changed, a champion was moved.

Events go out as one plain request, at once: a command that moves a champion has no seconds to import Prefect, and
whoever notes that an event was sent must know that it was. Only a server that wants credentials or certificates of
its own is asked through Prefect's client. Which events a pipeline waits for stands in triggers.py.
"""

import http.client
import json
import logging
import os
import ssl
import urllib.error
import urllib.request
import uuid
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from gptcore.errors import GPTCoreError

CORPUS_CHANGED = "gptflow.corpus.changed"
MODEL_PROMOTED = "gptflow.model.promoted"
_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NEEDS_CREDENTIALS = (401, 403)


class EventNotSent(GPTCoreError):
    """The Prefect server did not take an event."""


def pipeline_resource(pipeline: str) -> str:
    """What an event about a pipeline's corpus concerns."""
    return f"gptflow.pipeline.{pipeline}"


def model_resource(model: str) -> str:
    """What an event about a model's champion concerns."""
    return f"gptflow.model.{model}"


def corpus_changed(pipeline: str, sources: list[str]) -> None:
    """Says that these sources of the pipeline look different. Raises EventNotSent."""
    _send(CORPUS_CHANGED, pipeline_resource(pipeline), {"pipeline": pipeline, "sources": sources})


def model_promoted(model: str, move: dict[str, Any], pipeline: str | None) -> None:
    """Says that the champion of `model` was moved, by promotion or rollback. The move stands, whether this is heard.

    `move` is the move in the words of the log; `pipeline` made the version, None where that is unknown.
    """
    payload = {"model": model, "version": move["to"], "previous": move["from"], "pipeline": pipeline}
    payload |= {key: move[key] for key in ("kind", "by", "reason", "at")}
    try:
        _send(MODEL_PROMOTED, model_resource(model), payload)
    except Exception as error:  # a moved champion is no failure, whatever Prefect says to it
        logging.getLogger(__name__).warning("%s of %s: %s", MODEL_PROMOTED, model, error)


def _send(event: str, resource: str, payload: dict[str, Any]) -> None:
    """Sends an event to the server that PREFECT_API_URL names. Without one there is nobody to tell."""
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        return
    body = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource},
        "payload": payload,
    }
    try:
        if not _posted(f"{api}/events", [body]):
            _post_by_prefect([body])
    except (OSError, http.client.HTTPException) as error:
        raise EventNotSent(f"the Prefect server at {urlsplit(api).hostname} did not take {event}: {error}") from None


def _posted(url: str, body: object) -> bool:
    """Whether a plain POST did; False where the server wants more than that. Raises OSError, HTTPException."""
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


def _post_by_prefect(body: object) -> None:
    from httpx import HTTPError
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=body)
    except HTTPError as error:
        raise OSError(str(error)) from None

"""Name and tags of a flow run of `retrain`: `notes 2026-11-30`, and at the end `notes 2026-11-30 · v7 promoted`.

Prefect's pages list runs by name. A name that a person typed into the form of a run stays as it is. Prefect's server,
its command line and its form fill in random names such as rousing-zebu and alpha-ceti-nebula, which are replaced.
"""

import re
from datetime import datetime
from typing import Any
from uuid import UUID

from coolname.data import config as _word_lists
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from flows.notifications.verdicts import FORMER_STATE_NAMES
from flows.tracking import errors

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi|"
    "psi|omega"
)
_NAME_OF_FORM = re.compile(rf"({_GREEK})\d*(-[a-z]+)+")
"""The form in Prefect's UI takes names of stars and constellations."""


def name_run() -> str:
    """Return the name of the flow run that starts now, for Prefect."""
    context = FlowRunContext.get()
    assert context is not None and context.parameters, "Prefect names a run inside its context"
    return build_name(str(context.parameters["pipeline"]), flow_run.name or "", flow_run.scheduled_start_time)


def build_name(pipeline: str, given: str, start: datetime) -> str:
    """Return `pipeline date`, with the date of `start` in this machine's time zone, or the name that a person typed."""
    if _is_own(pipeline, given) or is_generated(given):
        return f"{pipeline} {start.astimezone():%Y-%m-%d}"
    return given


def is_generated(name: str) -> bool:
    """Whether Prefect made the name up."""
    first, hyphen, second = name.partition("-")
    lists: dict[str, Any] = _word_lists
    words = {word for one in lists.values() for word in one.get("words", ())}
    return bool(_NAME_OF_FORM.fullmatch(name)) or (bool(hyphen) and {first, second} <= words)


def add_verdict(pipeline: str, verdict: str, version: str = "") -> None:
    """Add the verdict to name and tags of the calling flow run, which ends now. `version` is a number, as in 7.

    An error of Prefect does not change how the run ends.
    """
    name = str(flow_run.name)
    if _is_own(pipeline, name):
        name = f"{name.partition(' · ')[0]} · {f'v{version} ' if version else ''}{verdict}"
    tags = sorted({*flow_run.tags} - FORMER_STATE_NAMES.keys() | {verdict})
    with errors.warn_if_prefect_fails("the run's name"), get_client(sync_client=True) as client:
        client.update_flow_run(UUID(str(flow_run.id)), name=name, tags=tags)


def _is_own(pipeline: str, name: str) -> bool:
    """Whether this module, or an earlier release, made the name. A retried run has one."""
    return bool(re.fullmatch(rf"{re.escape(pipeline)}( \d{{4}}-\d\d-\d\d( · .*)?)?", name))

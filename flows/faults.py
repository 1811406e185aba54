"""What the world around a run does to it: which errors may be gone in a moment, and what others are called here.

MLflow, Prefect and the operating system have error classes of their own. A user meets ours, which say what is wrong,
where, and the cure.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import disk_usage

import httpx
from mlflow.exceptions import MlflowException
from prefect.exceptions import PrefectException
from sqlalchemy.exc import OperationalError

from flows.sharing import store
from flows.state import StateRoot
from gptcore.errors import DiskFull, GPTCoreError, SourceUnavailable
from gptcore.manifest import is_out_of_space

_AWAY = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
_SQLITE_IS_FULL = "database or disk is full"
_log = logging.getLogger(__name__)
_KEPT = "Nothing that was complete is lost: the same command goes on."


class MLflowAway(GPTCoreError):
    """MLflow's server is down, or its database is locked."""


class PrefectAway(GPTCoreError):
    """Prefect's server does not answer."""

    ends_at_once = True  # what Prefect's client has left to send, it would go on trying to send for minutes


def is_transient(error: BaseException) -> bool:
    """Whether the error may be gone in a moment. Wrong input, divergence and a full disk are not."""
    if is_disk_full(error):
        return False
    is_away = isinstance(store.explained(error, ""), store.StoreAway)
    return isinstance(error, OSError | SourceUnavailable) or is_mlflow_away(error) or is_away


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for what was to be written, as the system, SQLite or our own code says it."""
    return isinstance(error, DiskFull) or is_out_of_space(error) or _SQLITE_IS_FULL in str(error)


def is_mlflow_away(error: BaseException) -> bool:
    """Whether MLflow's server or database did not answer, as opposed to answering that it will not."""
    if isinstance(error, OperationalError):  # MLflow's own rollback meets a broken connection too
        return True
    return isinstance(error, MlflowException) and error.error_code in _AWAY


@contextmanager
def in_our_words(root: StateRoot) -> Iterator[None]:
    """Raises as one of our classes what the world does to a run."""
    try:
        yield
    except Exception as error:
        if (ours := explained(error, root)) is None:
            raise
        raise ours from error


@contextmanager
def only_shown(what: str) -> Iterator[None]:
    """Goes on, with a warning, if Prefect does not take what it would only show."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        _log.warning("Prefect does not take %s: %s", what, error)


def explained(error: Exception, root: StateRoot) -> GPTCoreError | None:
    """The error as one of ours; None where it is one already, or where nobody but us is to blame."""
    said = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, GPTCoreError):
        return None
    if is_disk_full(error):
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or root.path
        free = disk_usage(root.path).free
        return DiskFull(f"the disk is full: {where} could not be written, {free:,} bytes are free. Free space. {_KEPT}")
    if is_mlflow_away(error):
        cure = "Start its server, or wait until nothing locks its database"
        return MLflowAway(f"MLflow at {root.tracking_address} does not answer: {said}. {cure}. {_KEPT}")
    if (url := root.backends.artifacts) is not None and (ours := store.explained(error, url)) is not None:
        return ours
    if isinstance(error, httpx.HTTPError):
        return PrefectAway(f"Prefect does not answer: {said}. Start its server. {_KEPT}")
    return None

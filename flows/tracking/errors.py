"""Errors from outside, as errors of gptflow: which may be gone in a moment, and how each is explained.

MLflow, Prefect and the operating system have error classes of their own. A user gets an error of gptflow instead, which
says what is wrong, where, and how to fix it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import disk_usage

import httpx
from mlflow.exceptions import MlflowException
from prefect.exceptions import PrefectException
from sqlalchemy.exc import OperationalError

from flows.state import databases, object_store
from flows.state.root import StateRoot
from gptcore.credentials import conceal
from gptcore.errors import DiskFull, GPTCoreError, SourceUnavailable
from gptcore.manifest import is_out_of_space

_UNREACHABLE = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
_SQLITE_IS_FULL = "database or disk is full"
_log = logging.getLogger(__name__)
_RESUME = "Nothing that was complete is lost: run the same command again to resume."


class MLflowUnreachable(GPTCoreError):
    """MLflow's server is down, or its database is locked."""


class PrefectUnreachable(GPTCoreError):
    """Prefect's server does not answer."""

    exits_at_once = True  # Prefect's client would retry its unsent requests for minutes


def is_transient(error: BaseException) -> bool:
    """Whether the error may be gone in a moment, so that a retry helps. Not for wrong input or a full disk."""
    if is_disk_full(error) or databases.is_damage(error):
        return False
    is_store_unreachable = isinstance(object_store.translate_error(error, ""), object_store.StoreUnreachable)
    return isinstance(error, OSError | SourceUnavailable) or is_mlflow_unreachable(error) or is_store_unreachable


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk had no room, as the operating system, SQLite or gptcore reports it."""
    return isinstance(error, DiskFull) or is_out_of_space(error) or _SQLITE_IS_FULL in str(error)


def is_mlflow_unreachable(error: BaseException) -> bool:
    """Whether MLflow's server or database did not answer. A refusal is an answer."""
    if isinstance(error, OperationalError):  # raised by MLflow's own rollback over a broken connection
        return True
    return isinstance(error, MlflowException) and error.error_code in _UNREACHABLE


@contextmanager
def translate_errors(root: StateRoot) -> Iterator[None]:
    """Replace errors of MLflow, Prefect and the operating system, raised inside this context, by errors of gptflow."""
    try:
        yield
    except Exception as error:
        if (translated := translate_error(error, root)) is None:
            raise
        raise translated from error


@contextmanager
def warn_if_prefect_fails(subject: str) -> Iterator[None]:
    """Turn an error of Prefect into a warning, for a subject that Prefect would only display."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        _log.warning("Prefect does not take %s: %s", subject, error)


def translate_error(error: Exception, root: StateRoot) -> GPTCoreError | None:
    """Return the error as an error of gptflow; None if it is one already, or if its cause is a mistake in gptflow."""
    message = conceal(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, GPTCoreError):
        return None
    if is_disk_full(error):
        path = getattr(error, "filename2", None) or getattr(error, "filename", None) or root.path
        free = disk_usage(root.path).free
        return DiskFull(
            f"the disk is full: {path} could not be written, {free:,} bytes are free. Free space. {_RESUME}"
        )
    if databases.is_damage(error) and (database := root.mlflow_database) is not None:
        return database.describe_damage(message)
    if is_mlflow_unreachable(error):
        fix = "Start its server, or wait until its database is not locked"
        return MLflowUnreachable(f"MLflow at {root.tracking_address} does not answer: {message}. {fix}. {_RESUME}")
    url = root.backends.artifacts
    if url is not None and (translated := object_store.translate_error(error, url)) is not None:
        return translated
    if isinstance(error, httpx.HTTPError):
        return PrefectUnreachable(f"Prefect does not answer: {message}. Start its server. {_RESUME}")
    return None

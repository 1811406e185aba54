"""The errors that a user can cause or meet.

The command line prints the message of such an error without a traceback and exits with its `exit_code`. A message says
what is wrong, where, which two values disagree, and how to fix it. Bugs of this package raise `AssertionError` or
another exception and keep their tracebacks. `error_to_json` and `error_from_json` carry an error from one process to
another. Only the flows raise the errors in flows/tracking/errors.py.
"""

from typing import Any


def make_printable(text: str) -> str:
    """Return text that can be sent as UTF-8: the name of a file may hold bytes that are not."""
    return text.encode("utf-8", "backslashreplace").decode()


class GPTCoreError(Exception):
    """The root of all errors here. `exit_code` is 2 if the user's input is wrong and 1 otherwise."""

    exit_code = 1
    exits_at_once = False
    """Whether a command exits without waiting for work that libraries do at exit."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(make_printable(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(GPTCoreError):
    """A configuration value is unknown, of the wrong type, out of range or contradicts another one."""

    exit_code = 2


class CorpusError(GPTCoreError):
    """The text cannot be used: missing, unreadable, not UTF-8, altered, or too small for the model's context."""

    exit_code = 2


class DeviceMissing(GPTCoreError):
    """A named GPU is not on this machine."""


class SourceUnavailable(GPTCoreError):
    """A remote source did not answer. The input may be right, so a retry can help."""


class TokenizerError(GPTCoreError):
    """A vocabulary is missing or damaged."""


class CheckpointError(GPTCoreError):
    """A checkpoint or another committed directory is damaged, or belongs to another configuration."""


class ExchangeError(GPTCoreError):
    """A model cannot be written in the other library's format, or its files contradict what they declare."""

    exit_code = 2


class NewerFormat(CheckpointError):
    """A newer release wrote the directory in a format that this release does not know. The directory is not damaged."""


class DiskFull(GPTCoreError):
    """The disk had no space for a file. Every directory that was committed before is intact."""


class TrainingDiverged(GPTCoreError):
    """The loss or a gradient is infinite or not a number. Raised before the update, so the weights are still finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        """Number of updates completed before the one that would have diverged."""


class RankLost(GPTCoreError):
    """Another process of the same training died or cannot be reached. Restarting all processes helps."""


def error_to_json(error: GPTCoreError) -> dict[str, Any]:
    """Return the error as an object for JSON: class name, message and, for TrainingDiverged, the step."""
    return {"error": type(error).__name__, "message": str(error), "step": getattr(error, "step", None)}


def error_from_json(body: dict[str, Any]) -> GPTCoreError:
    """Return the error that `error_to_json` wrote. A class that this module does not define becomes GPTCoreError."""
    if body["error"] == TrainingDiverged.__name__:
        return TrainingDiverged(body["message"], body["step"])
    kind = globals().get(body["error"])
    if isinstance(kind, type) and issubclass(kind, GPTCoreError):
        return kind(body["message"])
    return GPTCoreError(body["message"])

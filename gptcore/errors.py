"""What can go wrong, by whose fault it is.

Every error that a user can cause or meet is one of these classes; the command line prints its message without a
traceback and ends with its `exit_code`. A message says what is wrong, where, which two values disagree, and the cure.
Mistakes of our own are `assert`s and other exceptions, and keep their tracebacks. `as_plain` and `from_plain` carry an
error from one process to another.
"""

from typing import Any


class GPTCoreError(Exception):
    """The root. `exit_code` is 2 where the user's input is wrong and 1 otherwise."""

    exit_code = 1
    ends_at_once = False
    """Whether a command ends without what libraries still want to do then."""


class ConfigError(GPTCoreError):
    """A configuration value is unknown, of the wrong type, out of range or contradicts another one."""

    exit_code = 2


class CorpusError(GPTCoreError):
    """The text cannot be used: missing, unreadable, not UTF-8, altered, or too small for the model's context."""

    exit_code = 2


class SourceUnavailable(GPTCoreError):
    """A remote source did not answer. The input may be right, so trying again later can help."""


class TokenizerError(GPTCoreError):
    """A vocabulary is missing or damaged."""


class CheckpointError(GPTCoreError):
    """A checkpoint or another committed directory is damaged, or belongs to another configuration."""


class ExchangeError(GPTCoreError):
    """A model cannot be expressed in the other library's format, or its files are not what they say."""

    exit_code = 2


class NewerFormat(CheckpointError):
    """A newer release made it, in a format that this one does not know. It is not damaged."""


class DiskFull(GPTCoreError):
    """A file could not be written for want of space. What was committed before is intact."""


class TrainingDiverged(GPTCoreError):
    """The loss or a gradient is infinite or not a number. Raised before the update: the weights are still finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        """Updates completed before the one that would have diverged."""


class RankLost(GPTCoreError):
    """Another process of the same training died or cannot be reached. Starting all of them again helps."""


def as_plain(error: GPTCoreError) -> dict[str, Any]:
    """The error as JSON."""
    return {"error": type(error).__name__, "message": str(error), "step": getattr(error, "step", None)}


def from_plain(body: dict[str, Any]) -> GPTCoreError:
    """The inverse of `as_plain`; an error of a class that is not one of these is a plain GPTCoreError."""
    if body["error"] == TrainingDiverged.__name__:
        return TrainingDiverged(body["message"], body["step"])
    kind = globals().get(body["error"])
    if isinstance(kind, type) and issubclass(kind, GPTCoreError):
        return kind(body["message"])
    return GPTCoreError(body["message"])

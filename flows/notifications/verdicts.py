"""How the state of a finished flow run says the run's verdict: promoted, rejected, skipped and others.

A state has one of Prefect's own names, because the default filters of Prefect's pages know no others. The verdict is
the first word of its message. Earlier releases named the state after the verdict, and servers still hold their runs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect import State

FORMER_STATE_NAMES = {
    "promoted": "Promoted",
    "rejected": "Kept champion",
    "skipped": "Skipped",
    "paused": "Paused",
    "held": "Held",
    "rolled back": "Rolled back",
    "changed": "Changed",
    "unchanged": "Unchanged",
}
"""The names that earlier releases gave to the states of runs with these verdicts."""
_VERDICTS = {name: verdict for verdict, name in FORMER_STATE_NAMES.items()}


def write_message(verdict: str, text: str) -> str:
    """Return a state's message, such as `skipped: nothing changed since version 7`."""
    return f"{verdict}: {text}"


def read_verdict(state: "State[Any]") -> str | None:
    """Return the verdict of a run that ended in the state, also of an earlier release's run. None if it has none."""
    first = (state.message or "").partition(": ")[0]
    return _VERDICTS.get(state.name or "") or (first if first in FORMER_STATE_NAMES else None)


def read_text(state: "State[Any]") -> str:
    """Return the state's message without the verdict."""
    text = state.message or f"The run ended as {state.name}."
    return text.removeprefix(f"{read_verdict(state)}: ")

"""The log of a champion's moves: its format, and what follows from it.

A move is one change of the champion: a promotion, a rollback, or a change of the alias that somebody made in MLflow
itself. Each move is one tag of the registered model, such as `move-000012`, that holds a JSON object. The tag is
written before the alias moves, with the state "intent", and again afterwards, with the state "done". Moves are ordered
by their numbers, never by a clock. This module does not talk to MLflow: champion.py reads and writes the tags.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flows.registry.versions import RegistryError

Kind = Literal["promoted", "promoted by a person", "rolled back", "moved outside"]
_TAG = re.compile(r"move-([0-9]{6,})")


@dataclass(frozen=True)
class Move:
    """One change of the champion. A version of None means that there is no champion."""

    number: int
    """Position in the log, from 1, without gaps."""
    source: str | None
    """The champion before the move."""
    target: str | None
    """The champion after the move."""
    kind: Kind
    """Promoted by the gate, promoted by a person, rolled back, or moved in MLflow itself."""
    reason: str
    at: str
    """Date and time (UTC), for people to read."""
    by: str
    """The gate, or the person who asked for the move."""
    weights: str | None
    """sha256 of the weights that were promoted or, in a rollback, withdrawn. It is kept when the version is deleted."""
    is_done: bool = False

    @property
    def tag(self) -> str:
        """Name of the tag that holds the move."""
        return f"move-{self.number:06d}"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the tag."""
        return {
            "from": self.source,
            "to": self.target,
            "kind": self.kind,
            "reason": self.reason,
            "at": self.at,
            "by": self.by,
            "weights_sha256": self.weights,
            "state": "done" if self.is_done else "intent",
        }


def parse_moves(model: str, tags: Mapping[str, str]) -> list[Move]:
    """Return the moves among a registered model's tags, oldest first. Raises RegistryError for a damaged tag."""
    numbered = [(int(match[1]), name) for name in tags if (match := _TAG.fullmatch(name))]
    return [_parse_move(model, number, name, tags[name]) for number, name in sorted(numbered)]


def trace_champions(moves: Sequence[Move]) -> list[str | None]:
    """Return the champions that led to the current one, which is last.

    A rollback removes the champions after its target. For example, promotions of 1, 2 and 3 and one rollback give
    ["1", "2"].
    """
    champions: list[str | None] = []
    for move in moves:
        if move.kind == "rolled back":
            while champions and champions[-1] != move.target:
                champions.pop()
        else:
            champions.append(move.target)
    return champions


def find_withdrawn(moves: Sequence[Move]) -> dict[str, Move]:
    """Return the withdrawn versions, each with its last rollback. A person's promotion takes the withdrawal back."""
    result: dict[str, Move] = {}
    for move in moves:
        if move.kind == "rolled back" and move.source is not None:
            result[move.source] = move
        elif move.kind != "promoted":
            result = {
                version: rolled
                for version, rolled in result.items()
                if version != move.target and (rolled.weights is None or rolled.weights != move.weights)
            }
    return result


def find_previous(moves: Sequence[Move]) -> str | None:
    """Return the version that a rollback goes back to: the latest earlier champion that was not withdrawn since."""
    champions, withdrawn = trace_champions(moves), find_withdrawn(moves)
    for version in reversed(champions[:-1]):
        if version is not None and version != champions[-1] and version not in withdrawn:
            return version
    return None


def _parse_move(model: str, number: int, name: str, text: str) -> Move:
    try:
        body = json.loads(text)
        if body["kind"] not in get_args(Kind):
            raise ValueError(f"unknown kind {body['kind']!r}")
        return Move(
            number=number,
            source=body["from"],
            target=body["to"],
            kind=body["kind"],
            reason=body["reason"],
            at=body["at"],
            by=body["by"],
            weights=body["weights_sha256"],
            is_done=body["state"] == "done",
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RegistryError(
            f"the tag {name} of the registered model {model} is damaged ({error}): {text:.200}. It is an entry of the "
            "log of the champion's moves; restore it from a backup of the registry."
        ) from None

"""The log of a champion's moves: what it says, and what follows from it.

Every move of the champion alias leaves one tag on the registered model, `move-000012`, a JSON object. It is written
before the alias moves, as an intent, and once more afterwards, as done. Moves are ordered by their numbers, never by a
clock. Nothing here talks to MLflow: champion.py writes the log.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flows.releases.registry import RegistryError

Kind = Literal["promoted", "promoted by a person", "rolled back", "moved outside"]
_TAG = re.compile(r"move-([0-9]{6,})")


@dataclass(frozen=True)
class Move:
    """One move of the alias. None stands for no champion."""

    number: int
    """From 1, without gaps: the order of the moves."""
    source: str | None
    """The version that was champion before."""
    target: str | None
    """The version that is champion afterwards."""
    kind: Kind
    """Promoted by the gate, promoted by a person, rolled back, or moved in MLflow without us."""
    reason: str
    at: str
    """When, for people to read."""
    by: str
    """The gate, or who asked for it."""
    weights: str | None
    """sha256 of the weights that were promoted or, in a rollback, withdrawn. It outlives the version."""
    is_done: bool = False

    @property
    def tag(self) -> str:
        """The name of the tag that holds it."""
        return f"move-{self.number:06d}"

    def as_dict(self) -> dict[str, Any]:
        """The move in the words of the tag."""
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


def read(model: str, tags: Mapping[str, str]) -> list[Move]:
    """The moves among a registered model's tags, oldest first. Raises RegistryError for a tag that is damaged."""
    found = [(int(match[1]), name) for name in tags if (match := _TAG.fullmatch(name))]
    return [_parsed(model, number, name, tags[name]) for number, name in sorted(found)]


def chain(moves: Sequence[Move]) -> list[str | None]:
    """The champions that led to the current one, which is last. A rollback takes off what it goes back over."""
    champions: list[str | None] = []
    for move in moves:
        if move.kind == "rolled back":
            while champions and champions[-1] != move.target:
                champions.pop()
        else:
            champions.append(move.target)
    return champions


def withdrawn(moves: Sequence[Move]) -> dict[str, Move]:
    """The versions that were rolled back, with the last such move. A person's promotion vouches for weights again."""
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


def previous(moves: Sequence[Move]) -> str | None:
    """Where a rollback goes: the champion before the current one's promotion that was not itself withdrawn since."""
    champions, rejected = chain(moves), withdrawn(moves)
    for version in reversed(champions[:-1]):
        if version is not None and version != champions[-1] and version not in rejected:
            return version
    return None


def _parsed(model: str, number: int, name: str, text: str) -> Move:
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
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"the tag {name} of the registered model {model} is damaged ({error}): {text:.200}. It is an entry of the "
            "log of the champion's moves; restore it from a backup of the registry."
        ) from None

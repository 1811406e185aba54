"""What a section of the configuration is, and how plain data becomes one, or is refused with the key that is wrong.

The sections themselves stand in config.py and, where only the flows read them, beside what they configure.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from gptcore.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


_UNION_MEMBER = re.compile(r"constrained-.*|literal\[.*|int|float")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_BITS = 4096

S = TypeVar("S", bound=Section)
KeyPath = tuple[str | int, ...]


def parse(section: type[S], given: Mapping[str, Any], where: str) -> S:
    """Builds a section from plain data. Raises ConfigError with `where`, the key, the value, the range and the cure."""
    built, problems = check(section, given)
    if built is None:
        lines = [[where, ".".join(map(str, path)), message] for path, message in problems]
        raise ConfigError("\n".join(": ".join(filter(None, line)) for line in lines))
    return built


def check(section: type[S], given: Mapping[str, Any]) -> tuple[S | None, list[tuple[KeyPath, str]]]:
    """The section, or None with every problem: the path of the key and what is wrong with it.

    Validation is strict, as JSON: a list becomes a tuple and an integer a float, but no string becomes a number.
    """
    if unwritable := list(_unwritable(given, ())):
        return None, unwritable
    try:
        return section.model_validate_json(json.dumps(given, default=str), strict=True), []
    except ValidationError as error:
        return None, [_problem(detail, section) for detail in error.errors(include_url=False)]


def _unwritable(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """What no JSON can hold: it would be refused as a whole, without the key that is meant."""
    if isinstance(value, str) and (found := _LONE_SURROGATE.search(value)):
        yield path, f"must be Unicode text, but holds the lone surrogate {found[0]!r}"
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        yield path, f"is a whole number of {value.bit_length():,} bits; at most {_MAX_BITS:,} are read"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unwritable(key, (*path, key))
            yield from _unwritable(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unwritable(inner, (*path, index))


def _problem(detail: Any, section: type[BaseModel]) -> tuple[KeyPath, str]:
    # In a union, pydantic appends the member that failed to the location: it is no key of ours.
    path = tuple(part for part in detail["loc"] if not _UNION_MEMBER.fullmatch(str(part)))
    if detail["type"] == "extra_forbidden":
        known = _fields_at(section, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        return path, f"there is no such key; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] in ("value_error", "missing") else f" (given: {detail['input']!r:.80})"
    return path, f"{message[0].lower()}{message[1:]}{given}"


def _fields_at(section: type[BaseModel], path: KeyPath) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an entry of a list of sections
            continue
        given = section.model_fields[str(part)].annotation
        inner = [kind for kind in (given, *get_args(given)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        assert inner, "only sections forbid keys"
        section = inner[0]
    return list(section.model_fields)

"""Sections of the configuration: how plain data becomes one, and how a wrong key or value is reported.

The sections that gptcore reads are in config.py. Sections that only the flows read are in the module that they
configure.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from gptcore.credentials import shorten_addresses
from gptcore.errors import ConfigError


@dataclass(frozen=True)
class Added:
    """Marks a key that a later release added. `before` is the value that stands for the behaviour without the key.

    Example: `z_loss: Annotated[float, Added(before=0.0)] = 0.0`. Old pipelines, run directories and versions do not
    know the key. They keep their hashes, and count as trained with `before`.
    """

    before: Any


class Section(BaseModel):
    """A section of the configuration. It is immutable and refuses unknown keys."""

    # pydantic's own errors would repeat the input, which may be a secret.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


_UNION_MEMBER = re.compile(r"constrained-.*|literal\[.*|int|float")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_BITS = 4096

S = TypeVar("S", bound=Section)
KeyPath = tuple[str | int, ...]


def parse(section: type[S], given: Mapping[str, Any], where: str) -> S:
    """Build a section from plain data. `where` says where the data comes from, as the name of a file.

    Raises ConfigError, one line per problem: `where`, the key, what is wrong or allowed, and the given value. Example
    of a line: `pipelines.yaml: train.batch_size: input should be greater than or equal to 1 (given: 0)`.
    """
    built, problems = check(section, given)
    if built is None:
        lines = [[where, ".".join(map(str, path)), message] for path, message in problems]
        raise ConfigError("\n".join(": ".join(filter(None, line)) for line in lines))
    return built


def check(section: type[S], given: Mapping[str, Any]) -> tuple[S | None, list[tuple[KeyPath, str]]]:
    """Return the section and no problems, or None and every problem (the path of a key, what is wrong with its value).

    Validation is as strict as for JSON. A list becomes a tuple and an integer a float, but a string never becomes a
    number.
    """
    if unwritable := list(_find_unwritable(given, ())):
        return None, unwritable
    try:
        return section.model_validate_json(json.dumps(given, default=str), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A list whose items are wrong counts as too short, because pydantic counts the valid ones only.
        wrong = {detail["loc"][:-1] for detail in details if detail["loc"]}
        shown = [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in wrong]
        return None, [_describe_problem(detail, section) for detail in shown]


def hashed_keys(section: Section, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return the section as plain data for a hash: a key that was `Added` only if its value differs from `before`."""
    added = _added_keys(type(section))
    same = {name for name, key in added.items() if getattr(section, name) == key.before}
    return section.model_dump(mode="json", exclude={*exclude, *same})


def parse_recorded(section: type[S], recorded: Any, where: str) -> S:
    """Build a section that an earlier release may have recorded: a key `Added` since then gets its `before`.

    Raises ConfigError, as `parse` does.
    """
    return parse(section, _fill_added(section, recorded), where)


def _fill_added(kind: type[Section], recorded: Any) -> Any:
    if not isinstance(recorded, Mapping):
        return recorded
    filled = {name: key.before for name, key in _added_keys(kind).items()} | dict(recorded)
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if name in filled and isinstance(inner, type) and issubclass(inner, Section):
            filled[name] = _fill_added(inner, filled[name])
    return filled


def _added_keys(kind: type[Section]) -> dict[str, Added]:
    return {
        name: mark for name, field in kind.model_fields.items() for mark in field.metadata if isinstance(mark, Added)
    }


def _find_unwritable(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Yield the values that JSON cannot hold. Pydantic would refuse the whole JSON text without naming their keys."""
    if isinstance(value, str) and (surrogate := _LONE_SURROGATE.search(value)):
        yield path, f"must be Unicode text, but holds the lone surrogate {surrogate[0]!r}"
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        yield path, f"is a whole number of {value.bit_length():,} bits; at most {_MAX_BITS:,} bits are allowed"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _find_unwritable(key, (*path, key))
            yield from _find_unwritable(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _find_unwritable(inner, (*path, index))


def _describe_problem(detail: Any, section: type[BaseModel]) -> tuple[KeyPath, str]:
    # In a union, pydantic appends the member that failed to the location. That name is not one of the keys.
    path = tuple(key for key in detail["loc"] if not _UNION_MEMBER.fullmatch(str(key)))
    if detail["type"] == "extra_forbidden":
        known = _fields_at(section, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        return path, f"there is no such key; {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    is_shown = detail["type"] not in ("value_error", "missing")
    given = f" (given: {shorten_addresses(repr(detail['input'])):.80})" if is_shown else ""
    return path, f"{message[0].lower()}{message[1:]}{given}"


def _fields_at(section: type[BaseModel], path: KeyPath) -> list[str]:
    for key in path:
        if isinstance(key, int):  # an entry of a list of sections
            continue
        annotation = section.model_fields[str(key)].annotation
        inner = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        assert inner, "only sections forbid keys"
        section = inner[0]
    return list(section.model_fields)

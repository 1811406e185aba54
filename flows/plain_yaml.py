"""YAML as pipelines.yaml and --set speak it: words, numbers, lists and mappings, and nothing that grows or is built.

Refused are aliases (a few can stand for gigabytes), tags (each names a type to be made), keys that are no text or stand
twice, nesting deeper than any setting is, and files longer than anyone writes. So reading takes time and memory in
proportion to a bounded text, and what comes out is plain data, with the line on which each key stands.
"""

import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000
"""Of one file: more than two thousand pipelines."""
MAX_DEPTH = 20
"""Of lists and mappings inside one another. The deepest setting has seven: pipelines.NAME.notify.0.on.0."""

Marks = dict[tuple[str | int, ...], int]
"""The line of each key and list item, by its path."""

_TEXT = "tag:yaml.org,2002:str"
_OTHER_THAN_IN_1_2 = ("bool", "timestamp", "merge", "value")


class NotPlain(Exception):
    """Why a text is not taken, and on which line, where that is known."""

    def __init__(self, why: str, line: int | None = None) -> None:
        super().__init__(why)
        self.line = line


def read(text: str) -> tuple[Any, Marks]:
    """The value of a YAML text and the lines of its keys. Raises NotPlain."""
    marks: Marks = {}
    if len(text) > MAX_BYTES:
        raise NotPlain(f"is longer than the {MAX_BYTES:,} characters that are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _mark(node, (), marks)
        return (None if node is None else loader.construct_document(node)), marks
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise NotPlain(f"not YAML: {why}", mark.line + 1 if mark else None) from None
    except ValueError as error:  # a number of thousands of digits
        raise NotPlain(f"not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML with numbers such as 1e-3, which YAML 1.1 takes for strings, and the word `on`, which it takes for true.

    As in YAML 1.2, only true and false are truth values, and dates are words.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _OTHER_THAN_IN_1_2]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise NotPlain("aliases are not supported; put what is shared into defaults:", line)
        if getattr(event, "tag", None) is not None:
            raise NotPlain(f"tags such as {event.tag!r:.60} are not supported; write the plain value", line)
        if self.depth >= MAX_DEPTH:
            raise NotPlain(f"lists and mappings stand more than {MAX_DEPTH} deep in one another", line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mark(node: yaml.Node | None, at: tuple[str | int, ...], marks: Marks) -> None:
    """Notes the line of every key; a key that stands twice or is no text is an error."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != _TEXT:
                shown = f"{key.value!r:.60}" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise NotPlain(f"the key {shown} is not text; write it in quotes", line)
            path = (*at, key.value)
            if path in marks:
                raise NotPlain(f"{key.value} stands twice, first on line {marks[path]}", line)
            marks[path] = line
            _mark(value, path, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            marks[*at, index] = value.start_mark.line + 1
            _mark(value, (*at, index), marks)

"""The YAML of pipelines.yaml and `--set`: words, numbers, lists and mappings.

The parser refuses everything that could grow or run code: aliases (a few of them can expand to gigabytes) and tags
(each one names a type to construct). It also refuses keys that are not text or are given twice, nesting deeper than any
setting, and overlong files. So reading takes time and memory in proportion to a bounded text. The result is plain data,
with the line of each key.
"""

import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000
"""Maximum size of a file: more than two thousand pipelines."""
MAX_DEPTH = 20
"""Maximum nesting of lists and mappings. The deepest setting has seven: pipelines.NAME.notify.0.on.0."""

Marks = dict[tuple[str | int, ...], int]
"""The line of each key and list item, by its path."""

_TEXT = "tag:yaml.org,2002:str"
_OTHER_THAN_IN_1_2 = ("bool", "timestamp", "merge", "value")


class UnsupportedYAML(Exception):
    """A text that the parser refuses: the reason, and the line if it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def read(text: str) -> tuple[Any, Marks]:
    """Parse a YAML text. Return its value and the lines of its keys. Raise UnsupportedYAML.

    For example `train: {seed: 1}` gives `{"train": {"seed": 1}}` and `{("train",): 1, ("train", "seed"): 1}`.
    """
    marks: Marks = {}
    if len(text) > MAX_BYTES:
        raise UnsupportedYAML(f"has {len(text):,} characters (expected at most {MAX_BYTES:,})")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _mark(node, (), marks)
        return (None if node is None else loader.construct_document(node)), marks
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UnsupportedYAML(f"not YAML: {problem}", mark.line + 1 if mark else None) from None
    except ValueError as error:  # a number of thousands of digits
        raise UnsupportedYAML(f"not YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """A loader with two differences to YAML 1.1: 1e-3 is a number instead of a string, and `on` is a word.

    As in YAML 1.2, only true and false are truth values, and dates are words.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _OTHER_THAN_IN_1_2]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read the next node. Raises UnsupportedYAML for aliases, tags and deep nesting."""
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise UnsupportedYAML("aliases are not supported; put shared settings into defaults:", line)
        if getattr(event, "tag", None) is not None:
            raise UnsupportedYAML(f"tags such as {event.tag!r:.60} are not supported; write the plain value", line)
        if self.depth >= MAX_DEPTH:
            raise UnsupportedYAML(f"lists and mappings are nested more than {MAX_DEPTH} deep", line)
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


def _mark(node: yaml.Node | None, path: tuple[str | int, ...], marks: Marks) -> None:
    """Store the line of every key in `marks`. Raise UnsupportedYAML if a key is given twice or is not text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != _TEXT:
                shown = f"{key.value!r:.60}" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise UnsupportedYAML(f"the key {shown} is not text; write it in quotes", line)
            key_path = (*path, key.value)
            if key_path in marks:
                raise UnsupportedYAML(f"{key.value} is given twice, first on line {marks[key_path]}", line)
            marks[key_path] = line
            _mark(value, key_path, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            marks[*path, index] = value.start_mark.line + 1
            _mark(value, (*path, index), marks)

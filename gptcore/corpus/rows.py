"""Take the text of a table's row: from a column, from a path to a nested value, or by a template over several columns.

text                   the column `text`
message.body           the key `body` of the object in the column `message`; `parts.0` is the first entry of a list
"{title}\\n\\n{body}"    columns or paths in braces; {{ and }} stand for braces
"""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from gptcore.errors import CorpusError

_MAX_NAMED = 20  # columns that an error lists


@dataclass(frozen=True)
class TextRule:
    """The value of corpus.text."""

    text: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the rule reads. A dotted path may also be the whole name of a column."""
        return tuple(dict.fromkeys(path for _, path in self._parts if path))

    @property
    def _parts(self) -> list[tuple[str, str]]:
        """Pairs of literal text and the path that follows the text; the path is empty if none follows."""
        if "{" not in self.text and "}" not in self.text:
            return [("", self.text)]
        return [(literal, path or "") for literal, path, _, _ in Formatter().parse(self.text)]

    def extract(self, row: Mapping[str, Any], place: str) -> str:
        """Return the text of a row; an absent value (null) is empty. `place` names the row in messages.

        Raises CorpusError, with the columns found, if a path leads nowhere or to something that is not text. In a
        template, numbers are text.
        """
        parts = self._parts
        is_template = parts != [("", self.text)]
        return "".join(literal + self._look_up(row, path, place, is_template) for literal, path in parts)

    def _look_up(self, row: Mapping[str, Any], path: str, place: str, is_template: bool) -> str:
        if not path:
            return ""
        value: Any = row
        for name in [path] if path in row else path.split("."):
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            elif value is None:
                return ""
            else:
                raise missing_column_error(place, path, list(row))
        if value is None:
            return ""
        if is_template and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise CorpusError(
                f"{place}: {path!r} must be a string, found {type(value).__name__} {value!r:.80}. Set corpus.text to a "
                "column of text."
            )
        return value


class MissingColumn(CorpusError):
    """A table does not have a column that corpus.text names."""


def missing_column_error(place: str, path: str, columns: list[str]) -> MissingColumn:
    """Return the error for a column that a table does not have."""
    listed = ", ".join(map(str, columns[:_MAX_NAMED])) + (", ..." if len(columns) > _MAX_NAMED else "") or "none"
    return MissingColumn(
        f"{place} has no column {path!r}; columns found: {listed}. Set corpus.text to the column that holds the "
        "text, or to a template such as '{title} {body}'; or name the file in corpus.exclude if it holds other data."
    )

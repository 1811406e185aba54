"""Count what became of every file and document of a corpus, so that nothing is left out in silence.

A `Reading` belongs to one reading of the sources. Its parts are counted where files are found (sources.py), where they
are read (documents.py, shards.py: perhaps in another process or on another machine), and where copies are dropped. The
parts are merged, stored with the snapshot, and shown by every run.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptcore.corpus.compression import COMPRESSED
from gptcore.corpus.file_types import classify
from gptcore.errors import CorpusError, make_printable

MAX_NAMED = 20
"""Number of files that a report names. More files are counted."""
NO_SUFFIX = "no suffix"
_MAX_PLACES = 10
_MAX_SUFFIXES = 50
_MAX_SUFFIX_CHARS = 16
_REPORTED = ("empty", "duplicate", "skipped", "bad", "foreign", "replaced")
_OTHER = "other suffixes"


def count_documents(number: int) -> str:
    """Return `1 document` or `2,404 documents`."""
    return f"{number:,} document{'s' * (number != 1)}"


@dataclass(frozen=True)
class Reading:
    """What became of the files and documents of a corpus."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By suffix, such as `.jsonl.gz`. The keys, of which absent ones are 0:
    read, skipped, bad, foreign     files: read; not text by their suffix; damaged; tables without the wanted column
    documents, empty, duplicate     documents: all that were read, and those of them that were left out
    replaced                        characters that were put in the place of invalid bytes
    """
    excluded: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of `files` and `directories` that each rule left out. The files in these directories are not counted."""
    problems: list[str] = field(default_factory=list)
    """The problems of the first bad files."""
    foreign: list[str] = field(default_factory=list)
    """The problems of the first tables that are not text."""
    secrets: Counter[str] = field(default_factory=Counter)
    """Number of lines that look like a key or a password, by kind."""
    secret_places: list[str] = field(default_factory=list)
    """Document and line of the first of them."""

    @property
    def num_bad(self) -> int:
        """Number of files that cannot be used."""
        return self.total("bad")

    def total(self, key: str) -> int:
        """Return one of the counts over all suffixes."""
        return sum(counts[key] for counts in self.counts.values())

    def count(self, suffix: str, **numbers: int) -> None:
        """Add to the counts of a suffix. Of very many suffixes, the last ones are counted together."""
        if suffix not in self.counts and (len(self.counts) >= _MAX_SUFFIXES or len(suffix) > _MAX_SUFFIX_CHARS):
            suffix = _OTHER
        counts = self.counts.setdefault(suffix, Counter())
        for key, number in numbers.items():
            counts[key] += number

    def exclude(self, rule: str, is_directory: bool = False) -> None:
        """Count a file or a directory that a rule has left out."""
        self.excluded.setdefault(rule, Counter()).update(["directories" if is_directory else "files"])

    def add_problem(self, suffix: str, problem: str, is_foreign: bool = False) -> None:
        """Count a file that cannot be used; with `is_foreign`, a table that is not meant as text."""
        named = self.foreign if is_foreign else self.problems
        self.count(suffix, **{"foreign" if is_foreign else "bad": 1})
        if len(named) < MAX_NAMED:
            named.append(make_printable(problem))

    def add_secret(self, kind: str, place: str) -> None:
        """Count a line that looks like a key or a password."""
        self.secrets[kind] += 1
        if len(self.secret_places) < _MAX_PLACES:
            self.secret_places.append(make_printable(place))

    def merge(self, other: "Reading") -> None:
        """Add the counts of another part of the corpus, which comes after this one."""
        for suffix, numbers in other.counts.items():
            self.count(suffix, **numbers)
        for rule, counts in other.excluded.items():
            self.excluded.setdefault(rule, Counter()).update(counts)
        for mine, others in ((self.problems, other.problems), (self.foreign, other.foreign)):
            mine.extend(others[: MAX_NAMED - len(mine)])
        self.secrets.update(other.secrets)
        self.secret_places.extend(other.secret_places[: _MAX_PLACES - len(self.secret_places)])

    def check(self) -> None:
        """Raise CorpusError with the problems of all bad files, if there are any."""
        if not self.num_bad:
            return
        fix = "Or set corpus.errors: skip to leave such files out"
        if self.num_bad == 1:
            raise CorpusError(f"{self.problems[0]} {fix}.")
        raise CorpusError("\n".join([f"{self.num_bad:,} files cannot be used:", *self.list_problems(), f"{fix}."]))

    def list_problems(self) -> list[str]:
        """List the problems of the bad files, one line each, and the number of those that are not named."""
        return _list_named(self.problems, self.num_bad)

    def describe(self) -> list[str]:
        """Return lines about what was left out; none if every file was read and every document was used."""
        lines = [line for suffix in sorted(self.counts) if (line := _describe_counts(suffix, self.counts[suffix]))]
        if self.excluded:
            lines.append(f"excluded: {self.describe_excluded()}")
        if self.foreign:
            lines += ["left out, because their columns are others:", *_list_named(self.foreign, self.total("foreign"))]
        if self.problems:
            lines += ["left out by corpus.errors: skip:", *self.list_problems()]
        return lines

    def describe_excluded(self) -> str:
        """Return what rules left out, as in "3 files, 1 directory (.gitignore 1, hidden 3)"."""
        total = sum(self.excluded.values(), Counter[str]())
        nouns = {"files": ("file", "files"), "directories": ("directory", "directories")}
        parts = [_count(total[key], *noun) for key, noun in nouns.items() if total[key]]
        rules = ", ".join(f"{rule} {counts.total():,}" for rule, counts in sorted(self.excluded.items()))
        return f"{', '.join(parts)} ({rules})"

    def describe_kinds(self) -> str:
        """Return how many lines look like a secret of each kind, as in "GitHub token 1, password 2"."""
        return ", ".join(f"{kind} {number:,}" for kind, number in sorted(self.secrets.items()))

    def describe_secrets(self) -> str:
        """Return a line that warns of keys and passwords in the text; empty if there are none."""
        if not self.secrets:
            return ""
        rest = self.secrets.total() - len(self.secret_places)
        places = ", ".join(self.secret_places) + (f" and {rest:,} more" if rest else "")
        return (
            f"{_count(self.secrets.total(), 'line')} of text may hold keys or passwords ({self.describe_kinds()}): "
            f"{places}. A model may learn and repeat them. Remove them, or name the files in corpus.exclude"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the reading as plain data."""
        return {
            "counts": {suffix: _sort(numbers) for suffix, numbers in sorted(self.counts.items())},
            "excluded": {rule: _sort(numbers) for rule, numbers in sorted(self.excluded.items())},
            "problems": self.problems,
            "foreign": self.foreign,
            "secrets": _sort(self.secrets),
            "secret_places": self.secret_places,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Reading":
        """Return the reading that `to_json` wrote."""
        return cls(
            counts={suffix: Counter(numbers) for suffix, numbers in data["counts"].items()},
            excluded={rule: Counter(numbers) for rule, numbers in data["excluded"].items()},
            problems=list(data["problems"]),
            foreign=list(data["foreign"]),
            secrets=Counter(data["secrets"]),
            secret_places=list(data["secret_places"]),
        )


def suffix_of(filename: str) -> str:
    """Return the suffix of a file's name, in lower case and with that of its compression, such as `.txt.gz`."""
    compression = next((suffix for suffix in COMPRESSED if filename.lower().endswith(suffix)), "")
    return classify(filename).suffix + compression or NO_SUFFIX


def _describe_counts(suffix: str, counts: Counter[str]) -> str:
    """Return a line about the files of one suffix; empty if all of their text was used."""
    left_out = _enumerate(counts, ("empty", "duplicate"))
    parts = []
    if counts["read"] and any(counts[key] for key in _REPORTED):
        files, documents = _count(counts["read"], "file"), _count(counts["documents"], "document")
        parts.append(f"{files} read" + ("" if counts["read"] == counts["documents"] else f" with {documents}"))
    if left_out:
        noun = "document" if counts["empty"] + counts["duplicate"] == 1 else "documents"
        parts.append(f"left out: {left_out} {noun}")
    if counts["replaced"]:
        parts.append(f"{_count(counts['replaced'], 'character')} replaced, because bytes were not valid")
    if counts["skipped"]:
        reason = "they look like binary files." if suffix == NO_SUFFIX else classify(f"a{suffix}").reason
        parts.append(f"{_count(counts['skipped'], 'file')} not read: {reason}")
    if refused := counts["bad"] + counts["foreign"]:
        parts.append(f"{_count(refused, 'file')} left out, see below")
    return f"{suffix}: {'; '.join(parts)}" if parts else ""


def _list_named(named: list[str], total: int) -> list[str]:
    rest = total - len(named)
    return [*(f"  {problem}" for problem in named), *([f"  and {rest:,} more"] if rest else [])]


def _enumerate(counts: Counter[str], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{counts[key]:,} {key}" for key in keys if counts[key])


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _sort(counts: Counter[str]) -> dict[str, int]:
    return {key: counts[key] for key in sorted(counts) if counts[key]}


def raise_problems(problems: Iterator[str]) -> None:
    """Raise CorpusError with all of these problems, one line each; the first ones if they are very many."""
    found = list(problems)
    if found:
        rest = [f"and {len(found) - MAX_NAMED:,} more problems"] if len(found) > MAX_NAMED else []
        raise CorpusError("\n".join([*found[:MAX_NAMED], *rest]))

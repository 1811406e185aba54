"""The gate's verdict on a challenger, as plain values that the cards and the registry share.

flows/registry/gate.py decides the verdict, and decision.py explains it to people.
"""

from dataclasses import dataclass, field

from gptcore.evaluation.compare import Comparison
from gptcore.evaluation.sources import SourceComparison

SOURCES_OVERRIDDEN = "sources overridden"
"""Kind of an experiment's verdict: the version learned from other sources than its pipeline's."""
WITHDRAWN = "withdrawn"
"""Kind of the verdict on a version whose weights a person has rolled back."""


def describe_share(scored: int, available: int | None) -> str:
    """Describe how much of the text was scored, for example "1.0 MB of 50.3 MB, 2 percent". Empty if all of it was.

    Both are in bytes. `available` is None if an earlier release scored the text, which scored all of it.
    """
    if available is None or scored >= available:
        return ""
    share = 100 * scored / available
    return f"{_format_size(scored)} of {_format_size(available)}, {share:.{0 if share >= 1 else 2}f} percent"


def _format_size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:,.1f} kB"


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about a challenger, and why."""

    promoted: bool
    kind: str
    """One of better, worse, tie within noise, worse on old text, not finite, insufficient evidence, sources overridden,
    withdrawn. For a first version: beats unigram, does not beat unigram, not finite."""
    reason: str
    """A sentence with the numbers."""
    bits_per_byte: float
    """The challenger's score. NaN if no block was clean for both models."""
    champion_bits_per_byte: float | None = None
    """The champion's score on the same text; None if it was not scored."""
    champion_version: str | None = None
    low: float | None = None
    """Lower bound of the improvement in bits per byte, one-sided at the configured confidence."""
    high: float | None = None
    """Upper bound of the improvement, one-sided at the same confidence."""
    blocks: int = 0
    bytes: int = 0
    """Bytes of text that were scored."""
    available_bytes: int | None = None
    """Bytes of the held-out text that the scored blocks are a sample of; None if an earlier release judged, which
    scored everything."""
    excluded_bytes: int = 0
    """Bytes of held-out text that one of the two models may have learned from."""
    unknown: str = ""
    """The training text that could not be checked, and why; empty if all of it was checked."""
    old: Comparison | None = None
    """The comparison on old blocks: those that were in the champion's corpus. None if it is unknown which are old."""
    new: Comparison | None = None
    """The comparison on the other blocks."""
    comparison: Comparison | None = field(default=None, repr=False, compare=False)
    """The comparison, if this process has scored champion and challenger."""
    gains: tuple[float, ...] = field(default=(), repr=False, compare=False)
    """Bits per byte that the challenger saves on each block. The version's tags do not keep them."""
    sources: tuple[SourceComparison, ...] = field(default=(), repr=False, compare=False)
    """The comparison on the text of each source. The version's tags do not keep it either."""

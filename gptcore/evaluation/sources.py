"""A model's scores on the text of each source of the corpus: which source it predicts well, and which badly.

The scores are sums over the blocks that bits_per_byte.py has scored. A snapshot lists which source each document, and
so each block, came from.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptcore.corpus.snapshot import ListedDocument
from gptcore.credentials import strip_secrets


@dataclass(frozen=True)
class SourceScore:
    """A model's score on the blocks of one source."""

    source: str
    """The entry of corpus.sources, without passwords."""
    blocks: int
    bytes: int
    bits_per_byte: float
    """NaN if no block is from the source."""


@dataclass(frozen=True)
class SourceComparison:
    """A challenger beside a champion, in bits per byte on the same blocks of one source."""

    source: str
    blocks: int
    bytes: int
    challenger: float
    """NaN if no block is from the source."""
    champion: float


def score_sources(
    per_block: Sequence[Mapping[str, Any]], documents: Iterable[ListedDocument]
) -> tuple[SourceScore, ...]:
    """Sum up an `Evaluation.per_block` by source, in the order in which the sources appear.

    `documents` are those of the blocks' snapshot. A source without a block is in the result too.
    """
    sources = [document.source for document in documents]  # (documents,)
    totals = {source: [0, 0, 0.0] for source in sources}  # blocks, bytes and nats
    for block in per_block:
        total = totals[sources[block["document"]]]
        for index, value in enumerate((1, block["bytes"], block["nats"])):
            total[index] += value
    return tuple(
        SourceScore(strip_secrets(source), int(blocks), int(size), nats / math.log(2) / size if size else math.nan)
        for source, (blocks, size, nats) in totals.items()
    )


def compare_sources(
    challenger: Sequence[Mapping[str, Any]],
    champion: Sequence[Mapping[str, Any]],
    documents: Iterable[ListedDocument],
) -> tuple[SourceComparison, ...]:
    """Compare two models source by source. Both are `Evaluation.per_block` of the same blocks in the same order.

    `documents` are those of the blocks' snapshot. A source without a block is in the result too.
    """
    listed = list(documents)
    pairs = zip(score_sources(challenger, listed), score_sources(champion, listed))
    return tuple(
        SourceComparison(new.source, new.blocks, new.bytes, new.bits_per_byte, old.bits_per_byte) for new, old in pairs
    )


def write_source_scores(path: Path, scores: Sequence[SourceScore]) -> None:
    """Write a CSV table with a line per source. MLflow's UI shows it as a table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(SourceScore)])
        table.writeheader()
        table.writerows(map(asdict, scores))


def parse_source_scores(text: str) -> tuple[SourceScore, ...]:
    """Read the table that `write_source_scores` wrote.

    Raises ValueError, KeyError, TypeError or csv.Error if it is damaged.
    """
    return tuple(
        SourceScore(line["source"], int(line["blocks"]), int(line["bytes"]), float(line["bits_per_byte"]))
        for line in csv.DictReader(io.StringIO(text, newline=""))
    )

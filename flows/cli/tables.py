"""Tables of the registry for people: all versions at a glance, and the lineage of one version."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from flows.state.console import print_rows, print_table


def print_models(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per version.

    Scores on different holdouts do not compare, so each row shows the two scores that the gate compared.
    """
    if not summaries:
        print("no models are registered yet: gptflow run quickstart")
        return
    rows = [
        (
            f"{summary['model']}/{summary['version']}",
            f"{summary['verdict'] or 'undecided'}{', withdrawn' if summary['withdrawn'] else ''}",
            _format_score(summary["gate_bits_per_byte"]),
            _format_score(summary["gate_champion_bits_per_byte"]),
            datetime.fromtimestamp(summary["created_ms"] / 1000).strftime("%m-%d %H:%M"),
            ", ".join(summary["aliases"]),
        )
        for summary in summaries
    ]
    print_rows(("version", "verdict", "bits/byte", "champion's", "trained", "aliases"), rows)


def print_lineage(lineage: Mapping[str, Any]) -> None:
    """Print every key of a version's lineage. Nested keys have dots, as in `train.seed`."""
    table = Table(show_header=False, title=lineage["uri"], title_style="bold")
    shown = {key: value for key, value in lineage.items() if key != "moves"}
    if lineage["bundle_sha256"] is None:
        shown["bundle_sha256"] = "none: an earlier release registered this version, so only its weights are compared"
    for key, value in _flatten(shown).items():
        table.add_row(key, "" if value is None else str(value))
    for move in lineage["moves"]:
        table.add_row("move", _describe_move(move))
    print_table(table)


def _describe_move(move: Mapping[str, Any]) -> str:
    versions = f"version {move['from'] or '(none)'} -> {move['to'] or '(none)'}"
    return f"{move['at']}  {move['kind']}, {versions}, by {move['by']}: {move['reason']}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            rows |= _flatten(inner, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
    return rows


def _format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

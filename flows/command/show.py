"""Tables of the registry for people: versions at a glance, and one version's lineage."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table


def models_table(listed: Sequence[Mapping[str, Any]]) -> None:
    """One row per version. Scores of different holdouts do not compare, so each row shows the gate's own pair."""
    if not listed:
        print("no models are registered yet: gptflow run quickstart")
        return
    table = Table("version", "verdict", "bits/byte", "rival's", "trained", "aliases")
    for version in listed:
        table.add_row(
            f"{version['model']}/{version['version']}",
            f"{version['verdict'] or 'undecided'}{', withdrawn' if version['withdrawn'] else ''}",
            _score(version["gate_bits_per_byte"]),
            _score(version["gate_champion_bits_per_byte"]),
            datetime.fromtimestamp(version["created_ms"] / 1000).strftime("%m-%d %H:%M"),
            ", ".join(version["aliases"]),
        )
    _print(table)


def lineage_table(described: Mapping[str, Any]) -> None:
    """Every key of a version's lineage, nested ones with dots."""
    table = Table(show_header=False, title=described["uri"], title_style="bold")
    for key, value in _flat({key: value for key, value in described.items() if key != "moves"}).items():
        table.add_row(key, "" if value is None else str(value))
    for move in described["moves"]:
        table.add_row("move", _sentence(move))
    _print(table)


def differences_table(differences: Sequence[Mapping[str, Any]]) -> None:
    """What is not as it was when a version was trained. What cannot change the weights is only mentioned."""
    table = Table("different", "then", "now", title="Not as it was when this version was trained", title_style="bold")
    for found in differences:
        note = "" if found["is_decisive"] else " (changes no weights)"
        table.add_row(f"{found['what']}{note}", found["then"], found["now"])
    _print(table)


def reproduction_table(done: Mapping[str, Any]) -> None:
    """A version then and now."""
    table = Table("", "then", "now", title=f"{done['uri']} trained again", title_style="bold")
    table.add_row("weights sha256", done["weights_sha256"], done["reproduced_weights_sha256"])
    now = done["reproduced_bits_per_byte"]
    table.add_row(
        "bits per byte", f"{done['holdout_bits_per_byte']:.6f}", "not scored" if now is None else f"{now:.6f}"
    )
    _print(table)
    accepted = " There were differences, see above." if not done["equal"] and done["differences"] else ""
    print(f"The weights are {'equal, bit for bit.' if done['equal'] else 'not equal.'}{accepted}")


def _sentence(move: Mapping[str, Any]) -> str:
    way = f"version {move['from'] or '(none)'} -> {move['to'] or '(none)'}"
    return f"{move['at']}  {move['kind']}, {way}, by {move['by']}: {move['reason']}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            rows |= _flat(inner, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
    return rows


def _print(table: Table) -> None:
    """At a terminal as wide as that is; into a pipe or a file with every line whole."""
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=400).print(table)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

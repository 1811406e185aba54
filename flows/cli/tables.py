"""Tables of the registry for people: all versions at a glance, and the lineage of one version."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

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


_SECTIONS: dict[str, tuple[str, ...]] = {
    "outcome": ("verdict", "reason", "withdrawn", "aliases", "trained", "mlflow_run_id", "prefect_flow_run_id"),
    "scores": (
        *("holdout_bits_per_byte", "gate_bits_per_byte", "gate_champion_version", "gate_champion_bits_per_byte"),
        *("gate_low", "gate_high", "gate_blocks", "gate_bytes", "memorized_once", "memorized_repeated"),
    ),
    "text": (
        *("pipeline", "config.corpus.sources", "corpus.documents", "corpus.bytes.train", "corpus.bytes.val"),
        *("corpus.bytes.holdout", "split.split", "split.block_bytes", "corpus_sha256", "tokens_sha256"),
    ),
    "model": (
        *("parameters", "tokenizer", "config.model.recipe", "config.model.size", "config.model.context_length"),
        *("config.model.emb_dim", "config.model.n_heads", "config.model.n_layers", "started_from", "weights_sha256"),
        "bundle_sha256",
    ),
    "training": (
        *("steps", "best_step", "tokens_seen", "stopped_by", "seed", "config.train.optimizer"),
        *("config.train.learning_rate", "config.train.batch_size", "config.train.accumulation", "run_key"),
    ),
    "code and machine": (
        *("code_commit", "code_dirty", "gptcore_sha256", "python", "packages.gptflow", "packages.torch"),
        *("hardware.device", "hardware.processor"),
    ),
}
"""What `gptflow show` shows of a lineage. The other keys come with --full."""
_COPIES = ("config.", "run_config.")
"""Beginnings of keys whose values other keys have too: the settings as they were asked for and as they were used."""


def print_lineage(lineage: Mapping[str, Any], full: bool = False) -> None:
    """Print a version's lineage in sections, or with `full` every key. Nested keys have dots, as in `train.seed`."""
    shown = {key: value for key, value in lineage.items() if key not in ("moves", "uri", "model", "version")}
    if shown["bundle_sha256"] is None:
        shown["bundle_sha256"] = "none: an earlier release registered this version, so only its weights are compared"
    shown["trained"] = datetime.fromtimestamp(shown.pop("created_ms") / 1000).isoformat(" ", "minutes")
    rows = _drop_copies(_flatten(shown))
    table = Table(show_header=False, title=lineage["uri"], title_style="bold")
    table.add_column()
    table.add_column(overflow="fold")  # hashes must stay whole, so that they can be copied
    for section, keys in _SECTIONS.items():
        _add_section(table, section, {key: rows.pop(key, None) for key in keys})
    if full:
        _add_section(table, "everything else", rows)
    _add_section(table, "promotions and rollbacks", {move["at"]: _describe_move(move) for move in lineage["moves"]})
    print_table(table)
    if not full:
        more = sum(value not in (None, "") for value in rows.values())
        print(f"--full shows {more} more keys, --json all of them as JSON")


def _add_section(table: Table, title: str, rows: Mapping[str, Any]) -> None:
    """Add a section with the keys that have a value."""
    given = {key: str(value) for key, value in rows.items() if value not in (None, "")}
    if given:
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for key, value in given.items():
            table.add_row(Text(key), Text(value))


def _drop_copies(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows without settings that another row shows with the same value."""
    kept: dict[str, Any] = {}
    leaves: set[tuple[str, str]] = set()
    for key, value in rows.items():
        leaf = (key.rpartition(".")[2], str(value))
        if key.startswith(_COPIES) and leaf in leaves:
            continue
        leaves.add(leaf)
        kept[key] = value
    return kept


def _describe_move(move: Mapping[str, Any]) -> str:
    versions = f"version {move['from'] or '(none)'} -> {move['to'] or '(none)'}"
    return f"{move['kind']}, {versions}, by {move['by']}: {move['reason']}"


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

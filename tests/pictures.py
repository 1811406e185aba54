"""Placeholders for the plots of a retraining: drawing six takes longer than the rest of the tiny pipeline.

The real plots are drawn by tests/evaluation/test_plots.py and test_run_report.py, and by every run started cold.
"""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
FIGURES = ("plot_training_losses", "plot_schedule", "plot_throughput", "plot_loss_by_position", "plot_gains")


def _no_figure(*_: Any, **__: Any) -> None:
    return None


def _save_png(_: None, path: Path) -> None:
    path.write_bytes(ONE_PIXEL)


def _plot_losses(*_: Any, path: Path) -> None:
    path.write_bytes(b"%PDF-1.4\n")


UNDRAWN = {
    "plots": SimpleNamespace(**dict.fromkeys(FIGURES, _no_figure), save_png=_save_png, plot_losses=_plot_losses),
    "plot_surprise": _no_figure,
}
"""Replacements for these names in gptcore.evaluation.run_report."""

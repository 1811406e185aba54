"""Retrainings whose plots are empty files: to draw six takes longer than all else that the tiny pipeline does.

The real ones are drawn by tests/gptcore/test_plots.py and test_dossier.py, and by every run that is started cold.
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
"""What takes the place of these names in gptcore.judging.dossier."""

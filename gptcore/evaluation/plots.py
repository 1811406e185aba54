"""Pictures of a training and of the model it produced, for people who did not watch.

Each function returns a matplotlib Figure with its own canvas. Nothing touches pyplot and its global state, so a picture
can be drawn without a display, in any thread, any number of times. The colours are Okabe and Ito's (2008), which
colour-blind readers can tell apart. Nothing here runs a model: the functions draw what was measured before.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gptcore.evaluation.baselines import Baselines
    from gptcore.evaluation.bits_per_byte import Evaluation
    from gptcore.evaluation.compare import Comparison

BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#5F6368"
Metrics = Sequence[Mapping[str, Any]]
"""The lines of metrics.jsonl."""
_MAX_POINTS = 1000


def create_figure(width: float = 8, height: float = 5) -> "Figure":
    """Create an empty figure of `width` x `height` inches at 150 dots per inch. It needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure of `create_figure`, drawn once. `savefig` would draw it twice, first for the layout alone."""
    figure.canvas.print_png(path)  # type: ignore[attr-defined]


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    *,
    path: Path | str = "loss-plot.pdf",
) -> "Figure":
    """Plot training and validation loss against epochs, with the tokens seen on the upper axis, and save the plot.

    The suffix of `path` chooses the format: PDF, PNG or SVG. The four sequences have one entry per evaluation. Losses
    are in nats per token.
    """
    figure = create_figure()
    axes = _add_axes(figure, "Training and validation loss", "Epochs", "Loss (nats per token)", pad=6)
    _draw_line(axes, epochs_seen, train_losses, "Training loss", BLUE)
    _draw_line(axes, epochs_seen, val_losses, "Validation loss", VERMILION, linestyle="--")
    above = axes.twiny()
    # An invisible line gives the second axis its range, so that both axes agree about every point.
    above.plot(*thin(tokens_seen, train_losses, len(train_losses)), alpha=0)
    above.set_xlabel("Tokens seen")
    above.xaxis.set_major_formatter(_make_count_formatter())
    for side in ("right", "left", "bottom"):
        above.spines[side].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="upper right")
    figure.savefig(path)
    return figure


def plot_training_losses(
    metrics: Metrics, baselines: "Baselines | None" = None, best_step: int | None = None
) -> "Figure":
    """Plot the losses of the updates and of the evaluations against tokens; mark the best step and the baselines."""
    figure = create_figure()
    axes = _add_axes(figure, "Loss while training, lower is better", "Tokens seen", "Loss (nats per token)")
    axes.xaxis.set_major_formatter(_make_count_formatter())
    evaluated = [line for line in metrics if "val_loss" in line]
    _draw_line(axes, *_select_points(metrics, "loss"), "Each update", SKY, linewidth=1, alpha=0.7)
    _draw_line(axes, *_select_points(evaluated, "train_loss"), "Training text", BLUE)
    _draw_line(axes, *_select_points(evaluated, "val_loss"), "Validation text", VERMILION, linestyle="--")
    _mark_best(axes, [line for line in evaluated if line["step"] == best_step])
    _mark_baselines(axes, baselines)
    names = {"loss": "each update", "train_loss": "training text", "val_loss": "validation text"}
    series = {name: _select_points(metrics, key)[1] for key, name in names.items()}
    _limit_range(axes, series.values(), baselines)
    _add_legend_and_notes(axes, series)
    return figure


def plot_schedule(metrics: Metrics) -> "Figure":
    """Plot each update's learning rate, and its gradient norm before clipping, against tokens."""
    return _plot_two_panels(
        metrics,
        "Learning rate and gradient norm of each update",
        _Panel("learning_rate", "Learning rate", BLUE, _scale_scientific),
        _Panel("grad_norm", "Gradient norm\n(before clipping)", VERMILION, _scale_logarithmic_if_wide),
    )


def plot_throughput(metrics: Metrics) -> "Figure":
    """Plot training speed in tokens per second, and memory in megabytes, against tokens."""
    return _plot_two_panels(
        metrics,
        "Training speed and memory",
        _Panel("tokens_per_second", "Tokens per second", BLUE, _scale_from_zero),
        _Panel("memory_mb", "Memory (MB)", GREEN, _scale_from_zero),
    )


def plot_loss_by_position(evaluation: "Evaluation") -> "Figure":
    """Plot the mean loss at each position of the context window, which shows what more context is worth."""
    figure = create_figure()
    title = f"More context, better predictions? {evaluation.tokens:,} tokens of the {evaluation.side} text"
    axes = _add_axes(figure, title, "Tokens of context", "Loss (nats per token)")
    values = np.asarray(evaluation.loss_by_position, dtype=float)
    positions = np.arange(1, len(values) + 1)
    smooth = len(values) >= 32
    _draw_line(
        axes, positions, values, "At each position", SKY if smooth else BLUE, linewidth=1, alpha=0.8, points=len(values)
    )
    if smooth:
        width = max(3, len(values) // 16)
        centres, means = thin(positions, values, len(values) // width)
        _draw_line(axes, centres, means, f"Mean of {width} positions", BLUE)
    if math.isfinite(evaluation.loss):
        _mark_level(axes, evaluation.loss, "Mean of all tokens")
    _add_legend_and_notes(axes, {"positions": [value for value in values if not math.isnan(value)]})
    return figure


def plot_gains(gains: Sequence[float], comparison: "Comparison", margin: float) -> "Figure":
    """Plot how champion and challenger compare: the sorted blocks above, their mean with interval and margin below.

    `gains` (blocks,) are the champion's bits per byte minus the challenger's. Above zero the challenger is better.
    """
    figure = create_figure()
    above, below = figure.subplots(2, height_ratios=(3, 1))
    finite = np.sort([gain for gain in gains if math.isfinite(gain)])[::-1]  # (finite blocks,), largest first
    above.set_title("Which model predicted each block better?", loc="left", fontsize=12, fontweight="bold", pad=24)
    _style_axes(
        above, f"{len(gains):,} blocks, from the largest gain to the largest loss", "Bits per byte saved\non the block"
    )
    x, y = thin(np.arange(1, len(finite) + 1), finite, _MAX_POINTS)
    width = len(finite) / max(len(y), 1)
    better, worse = int((finite > 0).sum()), int((finite < 0).sum())
    above.bar(x[y > 0], y[y > 0], width=width, color=BLUE, label=f"Challenger better: {better:,}")
    above.bar(x[y < 0], y[y < 0], width=width, color=VERMILION, label=f"Champion better: {worse:,}")
    above.axhline(0, color="black", linewidth=0.8)
    above.margins(x=0.01)
    _add_legend_and_notes(above, {"blocks": list(gains)})
    _draw_interval(below, comparison, margin)
    figure.align_ylabels()
    return figure


def _draw_interval(axes: "Axes", comparison: "Comparison", margin: float) -> None:
    """Draw one line with zero, the required margin, and the mean gain with its bounds."""
    _style_axes(axes, "Mean of all blocks, in bits per byte saved by the challenger", "")
    axes.set(yticks=[], ylim=(0, 1))
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(margin, color=GREY, linewidth=1.2, linestyle=":", label=f"Margin {margin:g}")
    if math.isfinite(mean := comparison.improvement):
        axes.plot(mean, 0.5, "o", color=BLUE, markersize=7, label=f"Mean {mean:.4f}")
    if comparison.low is not None and comparison.high is not None:
        sure = f"each bound {comparison.confidence:.4g} sure"
        label = f"{comparison.low:.4f} to {comparison.high:.4f} ({sure})"
        axes.plot([comparison.low, comparison.high], [0.5, 0.5], color=BLUE, linewidth=3, alpha=0.5, label=label)
    axes.margins(x=0.1)
    _add_legend_and_notes(axes, {})


def thin(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `points` means of neighbours in place of (x, y). Values that are not finite become gaps (NaN)."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    if len(ys) <= points:
        return xs, ys
    bins = np.arange(len(ys)) * points // len(ys)  # (len(ys),) from 0 to points - 1
    known = ~np.isnan(ys)
    counts = np.bincount(bins[known], minlength=points)
    sums = np.bincount(bins[known], ys[known], minlength=points)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.bincount(bins, xs) / np.bincount(bins), sums / counts


def _select_points(lines: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Return the tokens seen, and the values of `key`, of the lines that have the key. None becomes NaN."""
    kept = [line for line in lines if key in line]
    values = [math.nan if line[key] is None else float(line[key]) for line in kept]
    return [line["tokens_seen"] for line in kept], values


def _add_axes(figure: "Figure", title: str, x_label: str, y_label: str, pad: float = 24) -> "Axes":
    """Add a plot whose title leaves `pad` points for the legend."""
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=pad)
    _style_axes(axes, x_label, y_label)
    return axes


def _style_axes(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=10)
    axes.set_ylabel(y_label, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#DADCE0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_line(axes: "Axes", x: Any, y: Any, label: str, colour: str, points: int = _MAX_POINTS, **style: Any) -> None:
    """Draw a line. If it has few points, each gets a marker, so that even a single point can be seen."""
    xs, ys = thin(x, y, points)
    if not np.isfinite(ys).any():
        return
    marker = "o" if np.isfinite(ys).sum() <= 30 else None
    axes.plot(xs, ys, **{"linewidth": 1.8, "markersize": 4, **style}, color=colour, label=label, marker=marker)


def _add_legend_and_notes(axes: "Axes", series: Mapping[str, Sequence[float]]) -> None:
    """Add the legend above the plot, where it hides nothing, and a note below on what could not be drawn."""
    if axes.get_legend_handles_labels()[0]:
        row: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0, 1),
            "ncols": 4,
            "borderaxespad": 0.2,
            "columnspacing": 1.5,
        }
        axes.legend(**row, fontsize=9, frameon=False, borderpad=0.2)
    top = axes.get_ylim()[1]
    _add_note(axes, "not finite", {name: sum(not math.isfinite(y) for y in values) for name, values in series.items()})
    _add_note(axes, "off the scale", {name: sum(top < y < math.inf for y in values) for name, values in series.items()})


def _add_note(axes: "Axes", why: str, hidden: Mapping[str, int]) -> None:
    """Add how many values of each series are hidden, and why, below the horizontal axis."""
    if counted := ", ".join(f"{name} ({count:,})" for name, count in hidden.items() if count):
        axes.set_xlabel(f"{axes.get_xlabel()}\nNot drawn, {why}: {counted}".strip(), fontsize=10)


def _make_count_formatter() -> Any:
    """Make a formatter that labels an axis of counts with 250k or 1.5M."""
    from matplotlib.ticker import EngFormatter

    formatter = EngFormatter(sep="")
    formatter.ENG_PREFIXES = {**EngFormatter.ENG_PREFIXES, 9: "B"}
    return formatter


def _mark_best(axes: "Axes", best: Metrics) -> None:
    if best and math.isfinite(loss := best[0]["val_loss"]):
        label = f"Best: {loss:.3f} at step {best[0]['step']:,}"
        place = best[0]["tokens_seen"], loss
        axes.plot(*place, "*", color=ORANGE, markeredgecolor="black", markersize=14, label=label, zorder=5)


def _mark_baselines(axes: "Axes", baselines: "Baselines | None") -> None:
    if baselines:
        _mark_level(axes, baselines.uniform_loss, "Uniform model")
        _mark_level(axes, baselines.unigram_loss, "Unigram model")


def _mark_level(axes: "Axes", height: float, name: str) -> None:
    """Draw a dotted line across the plot, with its name and value at the right end, readable on top of a curve."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.axhline(height, color=GREY, linewidth=1.2, linestyle=":")
    axes.text(0.995, height, f"{name} {height:.2f}", **place, fontsize=9, color=GREY, path_effects=halo, zorder=6)


def _limit_range(axes: "Axes", series: Iterable[Sequence[float]], baselines: "Baselines | None") -> None:
    """Limit the range so that spikes do not flatten the curves.

    The limit is 1.5 times the uniform model's loss, or 1.5 times the first loss if there are no baselines.
    """
    finite = [value for values in series for value in values if math.isfinite(value)]
    reference = baselines.uniform_loss if baselines else next(iter(finite), math.inf)
    if finite and max(finite) > 1.5 * reference:
        shown = [value for value in finite if value <= 1.5 * reference]
        axes.set_ylim(0.95 * min(shown, default=reference), 1.5 * reference)


class _Panel(NamedTuple):
    key: str
    """Of a line of metrics.jsonl."""
    label: str
    colour: str
    scale: Callable[["Axes", list[float]], None]
    """Sets the vertical axis for these finite values."""


def _plot_two_panels(metrics: Metrics, title: str, *panels: _Panel) -> "Figure":
    """Plot two quantities of the updates against tokens, one below the other."""
    figure = create_figure()
    rows = figure.subplots(2, sharex=True)
    rows[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    for axes, panel in zip(rows, panels):
        _style_axes(axes, "", panel.label)
        x, y = _select_points(metrics, panel.key)
        _draw_line(axes, x, y, "", panel.colour, linewidth=1.4)
        panel.scale(axes, [value for value in y if math.isfinite(value)])
        _add_note(axes, "not finite", {"updates": len(y) - int(np.isfinite(y).sum())})
    rows[1].set_xlabel(f"Tokens seen\n{rows[1].get_xlabel()}".strip(), fontsize=10)
    rows[1].xaxis.set_major_formatter(_make_count_formatter())
    figure.align_ylabels()
    return figure


def _scale_scientific(axes: "Axes", values: list[float]) -> None:
    axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)


def _scale_from_zero(axes: "Axes", values: list[float]) -> None:
    axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.yaxis.set_major_formatter(_make_count_formatter())


def _scale_logarithmic_if_wide(axes: "Axes", values: list[float]) -> None:
    if values and max(values) > 50 * np.median(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)

"""Pictures of a training and of the model that came out of it, for people who did not watch.

Each function returns a matplotlib Figure with its own canvas. pyplot and its global state are never touched, so a
picture can be made without a display, in any thread, any number of times, and nothing pops up. Colours are Okabe and
Ito's (2008), which colour-blind readers can tell apart. Nothing here runs a model: what is drawn was measured before.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gptcore.evaluate import Evaluation
    from gptcore.judging.baselines import Baselines
    from gptcore.judging.compare import Comparison

BLUE, ORANGE, GREEN, VERMILION, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#5F6368"
Metrics = Sequence[Mapping[str, Any]]
"""The lines of metrics.jsonl."""
_MAX_POINTS = 1000


def new_figure(width: float = 8, height: float = 5) -> "Figure":
    """An empty figure of so many inches, at 150 dots per inch, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Writes a `new_figure`, drawing it once. `savefig` would draw it twice, the first time for the layout alone."""
    figure.canvas.print_png(path)  # type: ignore[attr-defined]


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    *,
    path: Path | str = "loss-plot.pdf",
) -> "Figure":
    """Train and validation loss against epochs, with the tokens seen above; saved to `path` (by suffix: PDF, PNG, SVG).

    The four sequences have one entry per evaluation; losses are in nats per token.
    """
    figure = new_figure()
    axes = _axes(figure, "Training and validation loss", "Epochs", "Loss (nats per token)", pad=6)
    _line(axes, epochs_seen, train_losses, "Training loss", BLUE)
    _line(axes, epochs_seen, val_losses, "Validation loss", VERMILION, linestyle="--")
    above = axes.twiny()
    # An invisible line gives the second axis its range, so that both axes say the same about every point.
    above.plot(*thin(tokens_seen, train_losses, len(train_losses)), alpha=0)
    above.set_xlabel("Tokens seen")
    above.xaxis.set_major_formatter(_thousands())
    for side in ("right", "left", "bottom"):
        above.spines[side].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="upper right")
    figure.savefig(path)
    return figure


def plot_training_losses(
    metrics: Metrics, baselines: "Baselines | None" = None, best_step: int | None = None
) -> "Figure":
    """Losses against tokens: of each update, and of the evaluations; the best step and the baselines are marked."""
    figure = new_figure()
    axes = _axes(figure, "Loss while training, lower is better", "Tokens seen", "Loss (nats per token)")
    axes.xaxis.set_major_formatter(_thousands())
    evaluated = [line for line in metrics if "val_loss" in line]
    _line(axes, *_columns(metrics, "loss"), "Each update", SKY, linewidth=1, alpha=0.7)
    _line(axes, *_columns(evaluated, "train_loss"), "Training text", BLUE)
    _line(axes, *_columns(evaluated, "val_loss"), "Validation text", VERMILION, linestyle="--")
    _mark_best(axes, [line for line in evaluated if line["step"] == best_step])
    _mark_baselines(axes, baselines)
    names = {"loss": "each update", "train_loss": "training text", "val_loss": "validation text"}
    series = {name: _columns(metrics, key)[1] for key, name in names.items()}
    _limit(axes, series.values(), baselines)
    _finish(axes, series)
    return figure


def plot_schedule(metrics: Metrics) -> "Figure":
    """The learning rate, and the norm of the gradient before clipping, of each update against tokens."""
    return _two_panels(
        metrics,
        "Learning rate and gradient norm of each update",
        ("learning_rate", "Learning rate", BLUE, _scientific),
        ("grad_norm", "Gradient norm\n(before clipping)", VERMILION, _logarithmic_if_wide),
    )


def plot_throughput(metrics: Metrics) -> "Figure":
    """Training speed in tokens per second, and memory in megabytes, against tokens."""
    return _two_panels(
        metrics,
        "Training speed and memory",
        ("tokens_per_second", "Tokens per second", BLUE, _from_zero),
        ("memory_mb", "Memory (MB)", GREEN, _from_zero),
    )


def plot_loss_by_position(evaluation: "Evaluation") -> "Figure":
    """Mean loss of the tokens predicted from each position of the context window: what more context is worth."""
    figure = new_figure()
    title = f"More context, better predictions? {evaluation.tokens:,} tokens of the {evaluation.side} text"
    axes = _axes(figure, title, "Tokens of context", "Loss (nats per token)")
    values = np.asarray(evaluation.loss_by_position, dtype=float)
    positions = np.arange(1, len(values) + 1)
    smooth = len(values) >= 32
    _line(
        axes, positions, values, "At each position", SKY if smooth else BLUE, linewidth=1, alpha=0.8, points=len(values)
    )
    if smooth:
        width = max(3, len(values) // 16)
        centres, means = thin(positions, values, len(values) // width)
        _line(axes, centres, means, f"Mean of {width} positions", BLUE)
    if math.isfinite(evaluation.loss):
        _mark_level(axes, evaluation.loss, "Mean of all tokens")
    _finish(axes, {"positions": [value for value in values if not math.isnan(value)]})
    return figure


def plot_gains(gains: Sequence[float], comparison: "Comparison", margin: float) -> "Figure":
    """How champion and challenger compare: block by block, sorted, and below it the mean with its interval and margin.

    `gains` are the champion's less the challenger's bits per byte of each block: above zero the challenger is better.
    """
    figure = new_figure()
    above, below = figure.subplots(2, height_ratios=(3, 1))
    finite = np.sort([gain for gain in gains if math.isfinite(gain)])[::-1]
    above.set_title("Which model predicted each block better?", loc="left", fontsize=12, fontweight="bold", pad=24)
    _dress(
        above, f"{len(gains):,} blocks, from the largest gain to the largest loss", "Bits per byte saved\non the block"
    )
    x, y = thin(np.arange(1, len(finite) + 1), finite, _MAX_POINTS)
    width = len(finite) / max(len(y), 1)
    for name, colour, chosen in (("Challenger", BLUE, y > 0), ("Champion", VERMILION, y < 0)):
        count = int((finite > 0).sum() if name == "Challenger" else (finite < 0).sum())
        above.bar(x[chosen], y[chosen], width=width, color=colour, label=f"{name} better: {count:,}")
    above.axhline(0, color="black", linewidth=0.8)
    above.margins(x=0.01)
    _finish(above, {"blocks": list(gains)})
    _draw_interval(below, comparison, margin)
    figure.align_ylabels()
    return figure


def _draw_interval(axes: "Axes", comparison: "Comparison", margin: float) -> None:
    """One line: zero, the margin asked for, and the mean gain with its bounds."""
    _dress(axes, "Mean of all blocks, in bits per byte saved by the challenger", "")
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
    _finish(axes, {})


def thin(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, points: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` means of neighbours in place of (x, y); values that are not finite become gaps (NaN)."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ys = np.where(np.isfinite(ys), ys, np.nan)
    if len(ys) <= points:
        return xs, ys
    bins = np.arange(len(ys)) * points // len(ys)
    known = ~np.isnan(ys)
    counts = np.bincount(bins[known], minlength=points)
    sums = np.bincount(bins[known], ys[known], minlength=points)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.bincount(bins, xs) / np.bincount(bins), sums / counts


def _columns(lines: Metrics, key: str) -> tuple[list[int], list[float]]:
    kept = [line for line in lines if key in line]
    values = [math.nan if line[key] is None else float(line[key]) for line in kept]
    return [line["tokens_seen"] for line in kept], values


def _axes(figure: "Figure", title: str, x_label: str, y_label: str, pad: float = 24) -> "Axes":
    """A plot whose title leaves `pad` points for the legend."""
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=pad)
    _dress(axes, x_label, y_label)
    return axes


def _dress(axes: "Axes", x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=10)
    axes.set_ylabel(y_label, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#DADCE0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _line(axes: "Axes", x: Any, y: Any, label: str, colour: str, points: int = _MAX_POINTS, **style: Any) -> None:
    """A line; where there are few points they are marked, so that a single one can be seen."""
    xs, ys = thin(x, y, points)
    if not np.isfinite(ys).any():
        return
    marker = "o" if np.isfinite(ys).sum() <= 30 else None
    axes.plot(xs, ys, **{"linewidth": 1.8, "markersize": 4, **style}, color=colour, label=label, marker=marker)


def _finish(axes: "Axes", series: Mapping[str, Sequence[float]]) -> None:
    """The legend, above the plot where it hides nothing, and a note under the plot on what could not be drawn."""
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
    _note(axes, "not finite", {name: sum(not math.isfinite(y) for y in values) for name, values in series.items()})
    _note(axes, "off the scale", {name: sum(top < y < math.inf for y in values) for name, values in series.items()})


def _note(axes: "Axes", why: str, hidden: Mapping[str, int]) -> None:
    if counted := ", ".join(f"{name} ({count:,})" for name, count in hidden.items() if count):
        axes.set_xlabel(f"{axes.get_xlabel()}\nNot drawn, {why}: {counted}".strip(), fontsize=10)


def _thousands() -> Any:
    """Labels such as 250k and 1.5M on an axis that counts."""
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
    """A dotted line across the plot with its name and value at the right end, readable on top of a curve."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.axhline(height, color=GREY, linewidth=1.2, linestyle=":")
    axes.text(0.995, height, f"{name} {height:.2f}", **place, fontsize=9, color=GREY, path_effects=halo, zorder=6)


def _limit(axes: "Axes", series: Iterable[Sequence[float]], baselines: "Baselines | None") -> None:
    """A range that no spike can blow up: to half above the uniform model's loss, or else above the first loss."""
    finite = [value for values in series for value in values if math.isfinite(value)]
    reference = baselines.uniform_loss if baselines else next(iter(finite), math.inf)
    if finite and max(finite) > 1.5 * reference:
        shown = [value for value in finite if value <= 1.5 * reference]
        axes.set_ylim(0.95 * min(shown, default=reference), 1.5 * reference)


Panel = tuple[str, str, str, Callable[["Axes", list[float]], None]]


def _two_panels(metrics: Metrics, title: str, *panels: Panel) -> "Figure":
    figure = new_figure()
    rows = figure.subplots(2, sharex=True)
    rows[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    for axes, (key, label, colour, scale) in zip(rows, panels):
        _dress(axes, "", label)
        x, y = _columns(metrics, key)
        _line(axes, x, y, "", colour, linewidth=1.4)
        scale(axes, [value for value in y if math.isfinite(value)])
        _note(axes, "not finite", {"updates": len(y) - int(np.isfinite(y).sum())})
    rows[1].set_xlabel(f"Tokens seen\n{rows[1].get_xlabel()}".strip(), fontsize=10)
    rows[1].xaxis.set_major_formatter(_thousands())
    figure.align_ylabels()
    return figure


def _scientific(axes: "Axes", values: list[float]) -> None:
    axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)


def _from_zero(axes: "Axes", values: list[float]) -> None:
    axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.yaxis.set_major_formatter(_thousands())


def _logarithmic_if_wide(axes: "Axes", values: list[float]) -> None:
    if values and max(values) > 50 * np.median(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)

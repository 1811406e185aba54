"""The results of `python -m bench`: tables that are readable as text and as Markdown, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.generation import Generation
from bench.steps import LOSS_TOLERANCE, Loader, Steps
from bench.tokenizing import Tokenizing

OURS_COLOUR, PEER_COLOUR = "#d1495b", "#8d99ae"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned Markdown table: the first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(widths[0]) if not n else cell.rjust(widths[n]) for n, cell in enumerate(cells))
        return f"| {' | '.join((first, *rest))} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def title_of(steps: Steps) -> str:
    """Describe the shape in words."""
    return f"{steps.shape.name}, dropout {steps.drop_rate:g}" if steps.drop_rate else steps.shape.name


def steps_summary(measured: Sequence[Steps]) -> str:
    """Return a table with a line for each shape."""
    head = ("shape", "ours", "best peer", "", "ratio", "by round", "memory", "GFLOP/s", "of matmul", "losses")
    rows = [
        (
            title_of(steps),
            _ms(steps.ours.median),
            _ms(steps.best.median),
            steps.best.name,
            f"{steps.ratio:.2f}x",
            f"{steps.ratio_by_round:.2f}x",
            f"{steps.memory_share:.0%}",
            f"{steps.gflops(steps.ours):.0f}",
            f"{steps.gflops(steps.ours) / steps.ceiling:.0%}",
            _agreement(steps),
        )
        for steps in measured
    ]
    return table(head, rows)


def steps_table(steps: Steps) -> str:
    """Return a table with a line for each contender at one shape."""
    head = (title_of(steps), "a step", "of ours", "peak memory", "GFLOP/s", "of matmul", "loss differs by")
    rows = [
        (
            one.name,
            _ms(one.median),
            f"{one.median / steps.ours.median:.2f}x",
            f"{one.peak_mb:.0f} MB",
            f"{steps.gflops(one):.0f}",
            f"{steps.gflops(one) / steps.ceiling:.0%}",
            "-" if (difference := steps.loss_difference(one)) is None else f"{difference:.0e}",
        )
        for one in steps.contenders
    ]
    return table(head, rows)


def losses_differ(measured: Sequence[Steps]) -> list[str]:
    """Return a sentence for each contender whose losses should equal ours and do not."""
    return [
        f"{title_of(steps)}: the losses of {one.name} differ from ours by {difference:.1e} of them, "
        f"more than {LOSS_TOLERANCE:.0e}"
        for steps in measured
        for one in steps.contenders
        if (difference := steps.loss_difference(one)) is not None and not difference <= LOSS_TOLERANCE
    ]


def generation_table(measured: Sequence[Generation]) -> str:
    """Return a table of tokens per second with a line for each shape and number of texts."""
    names = [one.name for one in measured[0].contenders]
    head = (
        "tokens per second",
        *names,
        "best peer",
        "ratio",
        "by round",
        "memory limit",
        "of limit",
        "same as hf",
        "int8",
        "of ours",
    )
    rows = []
    for made in measured:
        same = next((one.same_tokens for one in made.contenders[1:] if one.same_tokens is not None), None)
        rows.append(
            (
                f"{made.shape.name}, {made.batch} text{'s' * (made.batch > 1)}",
                *(f"{one.median:.1f}" for one in made.contenders),
                made.best.name,
                f"{made.ratio:.2f}x",
                f"{made.ratio_by_round:.2f}x",
                "-" if made.limit is None else f"{made.limit:.0f}",
                "-" if made.limit is None else f"{made.ours.median / made.limit:.0%}",
                "-" if same is None else f"{same} tokens",
                f"{made.int8.median:.1f}",
                f"{made.int8_ratio:.2f}x",
            )
        )
    return table(head, rows)


def tokenizing_table(made: Tokenizing) -> str:
    """Return a table with a line for each contender."""
    rows = [
        (one.name, f"{one.mb_per_second:.1f}", f"{one.peak_mb:.0f} MB", "yes" if one.same_ids else "NO")
        for one in made.contenders
    ]
    return table((f"{made.num_bytes / 1e6:.0f} MB of text", "MB/s", "peak memory", "the same ids"), rows)


def loader_line(loader: Loader) -> str:
    """Return a sentence about the cost of a batch."""
    return (
        f"At {loader.shape.name} the batch of a step takes {loader.batch_seconds * 1e6:.0f} us beside "
        f"{_ms(loader.step_seconds)} for the step: {loader.share:.3%} of both."
    )


def plot(measured: Sequence[Steps], path: Path) -> None:
    """Draw time and memory of a step of every contender, relative to the fastest peer's, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(measured), figsize=(1 + 2.6 * len(measured), 6), sharey="row", squeeze=False, layout="constrained"
    )
    for column, steps in enumerate(measured):
        names = [one.name for one in steps.contenders]
        times = [one.median / steps.best.median for one in steps.contenders]
        memory = [one.peak_mb / steps.best.peak_mb for one in steps.contenders]
        _bars(axes[0][column], names, times, [_ms(one.median) for one in steps.contenders])
        _bars(axes[1][column], names, memory, [f"{one.peak_mb / 1e3:.1f} GB" for one in steps.contenders])
        axes[0][column].set_title(title_of(steps))
    axes[0][0].set_ylabel("time of a step,\nfastest peer = 1")
    axes[1][0].set_ylabel("peak memory,\nfastest peer = 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, names: Sequence[str], heights: Sequence[float], labels: Sequence[str]) -> None:
    colours = [OURS_COLOUR, *[PEER_COLOUR] * (len(names) - 1)]
    bars = axis.bar(range(len(names)), heights, color=colours)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.bar_label(bars, labels=labels, fontsize=7, padding=2, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _agreement(steps: Steps) -> str:
    differences = [d for one in steps.contenders[1:] if (d := steps.loss_difference(one)) is not None]
    if not differences:
        return "-"
    count = len(steps.ours.losses)
    return f"{'agree' if max(differences) <= LOSS_TOLERANCE else 'DIFFER'} ({max(differences):.0e}, {count} steps)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"

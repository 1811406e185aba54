"""Plots: they show what is in the data, can be drawn in any thread, and handle missing and extreme values."""

import io
import math
import threading
import warnings

import numpy as np
import pytest

from gptcore.evaluation.baselines import Baselines
from gptcore.evaluation.bits_per_byte import Evaluation
from gptcore.evaluation.compare import Comparison
from gptcore.evaluation.plots import (
    plot_gains,
    plot_loss_by_position,
    plot_losses,
    plot_schedule,
    plot_throughput,
    plot_training_losses,
    thin,
)
from gptcore.evaluation.surprisal import plot_surprise

BASELINES = Baselines(3.9, 10.8, 2.6, 7.4, 2.0, 1.4, 1000)


def metrics(steps, every=10):
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / 10, "tokens_seen": 2048 * step, "loss": 2 + 9 / step, "seconds": 0.5}
        line |= {"learning_rate": 1e-3 / step, "grad_norm": 1.0, "tokens_per_second": 4e3, "memory_mb": 900.0}
        lines.append(line | ({"train_loss": 2 + 8 / step, "val_loss": 3 + 8 / step} if step % every in (0, 1) else {}))
    return lines


def evaluation(losses):
    return Evaluation("holdout", False, 2, 50, 40, float(np.nanmean(losses)), 9.0, 1.5, 0.3, 0.6, tuple(losses), ())


def png(figure):
    """Return the plot as PNG. A warning, for example of a missing glyph, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        figure.savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")
    return file.getvalue()


def texts(figure):
    axes = figure.axes
    found = [text for each in axes for text in each.texts]
    found += [each.xaxis.label for each in axes] + [each.title for each in axes]
    found += [text for each in axes if each.get_legend() for text in each.get_legend().get_texts()]
    return "\n".join(text.get_text() for text in [*figure.texts, *found])


def test_plot_losses_saves_the_books_pdf_with_epochs_below_and_tokens_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = plot_losses([0, 1, 2], [0, 1000, 2000], [9.8, 5.0, 1.0], [9.9, 6.5, 6.2])
    assert (tmp_path / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    assert texts(figure).split("\n")[:2] == ["Epochs", "Tokens seen"]
    assert {"Training loss", "Validation loss"} <= set(texts(figure).split("\n"))
    below, above = figure.axes
    assert below.get_xlim()[1] * 1000 == pytest.approx(above.get_xlim()[1])
    png(figure)


def test_losses_that_are_none_or_not_finite_leave_gaps(tmp_path):
    figure = plot_losses([0, 1, 2], [0, 9, 18], [2.0, None, 1.0], [3.0, math.inf, 2.0], path=tmp_path / "losses.png")
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [pytest.approx([2, math.nan, 1], nan_ok=True), pytest.approx([3, math.nan, 2], nan_ok=True)]


def test_the_curves_show_the_metrics_and_mark_the_best_step():
    figure = plot_training_losses(metrics(40), BASELINES, best_step=40)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    expected = [line["val_loss"] for line in metrics(40) if "val_loss" in line]
    assert lines["Validation text"].get_ydata().tolist() == expected
    best = lines["Best: 3.200 at step 40"]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (40 * 2048, 3.2)
    assert "Uniform model 10.80" in texts(figure) and "Unigram model 7.40" in texts(figure)
    png(figure)


def test_a_spike_and_losses_that_are_not_finite_are_reported_and_do_not_flatten_the_plot():
    lines = metrics(100)
    lines[50]["loss"], lines[60]["loss"], lines[99]["val_loss"], lines[70]["loss"] = math.nan, 1e9, math.inf, None
    figure = plot_training_losses(lines, BASELINES, best_step=100)
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.5 * 10.8)
    assert "not finite: each update (2), validation text (1)" in texts(figure)
    assert "off the scale: each update (1)" in texts(figure)
    png(figure)
    png(plot_training_losses(lines))
    lines[3]["grad_norm"] = None
    assert "not finite: updates (1)" in texts(plot_schedule(lines))


@pytest.mark.parametrize("steps", [0, 1, 2, 5000])
def test_every_plot_of_a_training_can_be_drawn_for_any_number_of_updates(steps):
    for plot in (plot_training_losses, plot_schedule, plot_throughput):
        png(plot(metrics(steps)))


def test_a_single_point_is_drawn_with_a_marker():
    assert all(line.get_marker() == "o" for line in plot_training_losses(metrics(1)).axes[0].lines)


def test_a_million_updates_become_a_thousand_means_and_keep_their_gaps():
    y = np.arange(1_000_000.0)
    y[:1500] = math.nan
    x, means = thin(np.arange(1_000_000), y, 1000)
    assert len(x) == len(means) == 1000
    assert np.isnan(means[0]) and means[1] == pytest.approx(1749.5) and means[-1] == pytest.approx(999_499.5)
    assert thin([1, 2], [math.inf, 3.0], 10)[1].tolist() == pytest.approx([math.nan, 3.0], nan_ok=True)


def test_the_loss_at_a_position_is_drawn_at_the_number_of_tokens_seen():
    figure = plot_loss_by_position(evaluation([5.0, 4.0, 3.0, math.nan]))
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata().tolist() == pytest.approx([5.0, 4.0, 3.0, math.nan], nan_ok=True)
    png(figure)
    png(plot_loss_by_position(evaluation([5 / (1 + p) for p in range(1024)])))


def page(tokens, nats=None):
    figure = plot_surprise(tokens, nats or [1.0] * len(tokens), "A page of $text$")
    png(figure)
    return figure, [text.get_text() for text in figure.axes[0].texts]


def test_the_page_shows_line_breaks_and_does_not_read_dollars_as_mathematics():
    figure, found = page(["It costs $5", " or $x^2$", "\n", "\t", "\x00", "end"])
    assert found == ["It costs $5 or $x^2$", "↵", "→", "·", "end"]
    assert not any(text.get_parse_math() for text in [*figure.axes[0].texts, *figure.texts])


def test_text_beyond_the_page_is_left_out_and_the_title_says_so():
    figure, found = page(["line\n"] * 100)
    assert found.count("line") == 44
    assert "A page of $text$ (first 44 of 100 tokens)" in texts(figure)


def test_a_long_title_is_wrapped_to_stay_on_the_page():
    figure = plot_surprise(["a"], [1.0], "Where the model was surprised, " * 4)
    png(figure)
    title = figure.texts[0].get_window_extent()
    assert title.x1 < figure.bbox.x1 and title.y0 > figure.axes[0].get_window_extent().y1


def test_a_token_that_does_not_fit_starts_the_next_line_and_a_huge_token_is_split():
    figure, _ = page(["x" * 80, " twelve words", "y" * 200])
    rows = [(round(text.get_position()[1] - 0.5), text.get_text()) for text in figure.axes[0].texts]
    assert rows == [(0, "x" * 80), (1, " twelve words" + "y" * 77), (2, "y" * 90), (3, "y" * 33)]


def test_any_script_and_any_surprise_can_be_drawn():
    tokens = ["Привет", "\ufffd", "日本", " हिन्दी", "e\u0301", "😀", "\u202e", "\r\n", "", "עברית", "\U000f0000"]
    nats = [0.0, 1.0, math.nan, math.inf, -0.0, 50.0, 2.0, 3.0, 1.0, 1.0, 1.0]
    figure, _ = page(tokens, nats)
    assert "grey not finite" in texts(figure)
    page([])
    page(["a"], [math.nan])


def test_a_more_surprising_token_is_darker():
    figure, _ = page(["a", "b", "c"], [0.1, 2.0, 6.0])
    lightness = figure.axes[0].collections[0].get_facecolors()[:, :3].sum(axis=1)
    assert lightness[0] > lightness[1] > lightness[2]


def test_plots_can_be_drawn_in_several_threads_at_once():
    drawn = []
    work = [threading.Thread(target=lambda: drawn.append(png(plot_schedule(metrics(50))))) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(drawn) == 4 and len(set(drawn)) == 1


def test_gains_are_drawn_as_sorted_bars_above_the_mean_its_interval_and_the_margin():
    figure = plot_gains([0.1, -0.2, 0.3], Comparison(1.8, 1.9, 3, 99, "block", 0.95, 0.02, 0.18), margin=0.005)
    above, below = figure.axes
    assert [round(bar.get_height(), 6) for bar in above.patches] == [0.3, 0.1, -0.2]
    written = texts(figure)
    for words in ("Challenger better: 2", "Champion better: 1", "Margin 0.005", "Mean 0.1000", "0.0200 to 0.1800"):
        assert words in written
    assert [line.get_xdata()[0] for line in below.lines] == pytest.approx([0, 0.005, 0.1, 0.02])
    png(figure)


@pytest.mark.parametrize("gains", [[0.0] * 5, [math.nan, 1.0], [math.nan], list(np.linspace(-1, 1, 5000))])
def test_gains_without_evidence_or_in_thousands_can_be_drawn(gains):
    figure = plot_gains(gains, Comparison(math.nan, 1.9, len(gains), 99, "block", 0.95, None, None), margin=0.0)
    assert len(figure.axes[0].patches) <= 1000
    assert ("not finite: blocks (1)" in texts(figure)) == any(map(math.isnan, gains))
    png(figure)

"""Draws a page of text in which each token's colour shows how much it surprised the model.

The page shows what a score cannot: which words the model knows to expect, and where it is lost. plots.py draws scores
and curves.
"""

import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gptcore.evaluation.plots import create_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_COLUMNS, _ROWS = 90, 44
_CELL_INCHES = (0.08, 0.2)
_POINTS = _CELL_INCHES[0] * 72 / (1233 / 2048)
"""Font size at which DejaVu Sans Mono's advance (1233 of 2048 units) fills a cell. A cell is 12 whole pixels wide, so
hinting, which rounds advances to pixels, shifts nothing."""


def plot_surprise(tokens: Sequence[str], nats: Sequence[float], title: str) -> "Figure":
    """Draw one page of text; each token's colour shows how much it surprised the model.

    `nats` (tokens,) is minus the logarithm of each token's probability; the colours are in bits. Line breaks show as ↵,
    tabs as →, other control characters as a dot, and characters that no installed font has as an empty box. Text
    beyond the page is left out, and the title says so.
    """
    cells = _lay_out(tokens)
    drawn = cells[-1].token + 1 if cells else 0
    rows = cells[-1].row + 1 if cells else 1
    if drawn < len(tokens):
        title += f" (first {drawn:,} of {len(tokens):,} tokens)"
    width, height = _COLUMNS * _CELL_INCHES[0], rows * _CELL_INCHES[1]
    figure = create_figure(width + 0.8, height + 1.6)
    figure.set_layout_engine("none")
    inches = figure.get_size_inches()
    page = figure.add_axes((0.4 / inches[0], 0.9 / inches[1], width / inches[0], height / inches[1]))
    page.set(xlim=(0, _COLUMNS), ylim=(rows, 0))
    page.set_axis_off()
    bits = np.asarray(nats, dtype=float)[:drawn] / math.log(2)  # (drawn,)
    heading = textwrap.fill("".join(map(_make_visible, title)), 76, max_lines=2)
    families, missing = _choose_fonts("".join(cell.text for cell in cells) + heading.replace("\n", ""))
    heading, cells = heading.translate(missing), [cell._replace(text=cell.text.translate(missing)) for cell in cells]
    place = {"x": page.get_position().x0, "ha": "left", "va": "top", "y": 1 - 0.15 / inches[1]}
    figure.suptitle(heading, **place, fontsize=12, fontweight="bold", fontfamily=families[1:], parse_math=False)
    colours = _paint(page, cells, bits, families)
    note = "bits of surprise: 0 certain, each bit half as likely"
    _draw_colour_bar(figure, colours, note if np.isfinite(bits).all() else f"{note}; grey not finite")
    return figure


class _Cell(NamedTuple):
    token: int
    row: int
    column: int
    text: str
    """A character with its combining characters; a run of characters after `_join_runs`."""


def _lay_out(tokens: Sequence[str]) -> list[_Cell]:
    """Place each character on the page. A token that does not fit on its line begins the next line."""
    cells: list[_Cell] = []
    row = column = 0
    for index, token in enumerate(tokens):
        if column and column + len(token) > _COLUMNS >= len(token) and "\n" not in token:
            row, column = row + 1, 0
        for character in token:
            if cells and unicodedata.combining(character):
                cells[-1] = cells[-1]._replace(text=cells[-1].text + character)
                continue
            width = _count_columns(character)
            if column + width > _COLUMNS:
                row, column = row + 1, 0
            if row == _ROWS:
                return cells
            cells.append(_Cell(index, row, column, _make_visible(character)))
            row, column = (row + 1, 0) if character == "\n" else (row, column + width)
    return cells


def _count_columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _make_visible(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵", "\t": "→"}[character]
    return "·" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else character


def _paint(page: "Axes", cells: Sequence[_Cell], bits: np.ndarray, families: list[str]) -> "ScalarMappable":
    """Draw backgrounds and text. Returns the colour scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize

    finite = bits[np.isfinite(bits)]
    top = math.ceil(max(4.0, float(np.quantile(finite, 0.99)))) if len(finite) else 4
    colours = ScalarMappable(Normalize(0, top), colormaps["YlOrBr"].with_extremes(bad="#BDC1C6"))
    faces = colours.to_rgba(np.ma.masked_invalid(bits))  # (tokens, 4) red, green, blue, opacity
    corners = [_compute_corners(cell) for cell in cells]
    page.add_collection(PolyCollection(corners, facecolors=[faces[cell.token] for cell in cells], linewidths=0))
    is_dark = faces[:, :3] @ (0.299, 0.587, 0.114) < 0.5  # (tokens,)
    for run in _join_runs(cells, is_dark):
        page.text(
            run.column,
            run.row + 0.5,
            run.text,
            color="white" if is_dark[run.token] else "black",
            fontsize=_POINTS,
            fontfamily=families,
            va="center_baseline",
            parse_math=False,
        )
    return colours


def _compute_corners(cell: _Cell) -> list[tuple[float, float]]:
    left, top = cell.column, cell.row + 0.06
    right, bottom = left + _count_columns(cell.text[0]), cell.row + 0.94
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _join_runs(cells: Sequence[_Cell], is_dark: np.ndarray) -> list[_Cell]:
    """Join neighbouring ASCII characters of one colour, since drawing text is slow. Other characters stay alone.

    Each run keeps the token of its first cell. `is_dark` (tokens,) says whether a token's background is dark.
    """
    runs: list[_Cell] = []
    for cell in cells:
        last = runs[-1] if runs else None
        if last and _can_join(last, cell) and is_dark[last.token] == is_dark[cell.token]:
            runs[-1] = last._replace(text=last.text + cell.text)
        else:
            runs.append(cell)
    return runs


def _can_join(run: _Cell, cell: _Cell) -> bool:
    """Whether the cell follows the run on its line and both are ASCII."""
    is_next = run.row == cell.row and run.column + len(run.text) == cell.column
    return is_next and run.text.isascii() and cell.text.isascii()


def _choose_fonts(characters: str) -> tuple[list[str], dict[int, str]]:
    """Choose font families that can together draw the characters, and a box for each character that no font has.

    Matplotlib's own fonts come first. The machine's other fonts are opened only if those lack a character.
    """
    from matplotlib.font_manager import findfont, fontManager, get_font

    families = ["DejaVu Sans Mono", "DejaVu Sans"]
    missing = set(characters)
    for family in families:
        font = get_font(findfont(family))
        missing = {character for character in missing if not font.get_char_index(ord(character))}
    others = [entry for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")]
    for entry in others if missing else ():
        font = get_font(entry.fname)
        covered = {character for character in missing if font.get_char_index(ord(character))}
        families += [entry.name] if covered else []
        missing -= covered
    return families, {ord(character): "▯" for character in missing}


def _draw_colour_bar(figure: "Figure", colours: "ScalarMappable", note: str) -> None:
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.4 / width, 0.5 / height, 3 / width, 0.15 / height))
    bar = figure.colorbar(colours, cax=axes, orientation="horizontal", extend="max", ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    axes.text(1.08, 0.5, note, transform=axes.transAxes, fontsize=9, va="center")

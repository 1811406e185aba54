"""The output for a person at a terminal: one line per step, and a progress bar while the model trains.

Tasks log through Prefect's run logger, so that the UI has the same lines; `Console` prints those lines. A log cannot
contain the progress bar, so the training gets the bar from `active_console()`, which is None if no console is attached.
The texts of the lines are in flows/retrain/tasks.py.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_ACTIVE: ContextVar["Console | None"] = ContextVar("console", default=None)


class Console(logging.Handler):
    """Print the lines of the flow's and its tasks' loggers, and own the progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.terminal = Terminal(highlight=False, soft_wrap=True)

    @contextmanager
    def attach(self) -> Iterator["Console"]:
        """Print the lines of the run loggers inside this context, and be the active console."""
        token = _ACTIVE.set(self)
        loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]
        for logger in loggers:
            logger.addHandler(self)
        try:
            yield self
        finally:
            for logger in loggers:
                logger.removeHandler(self)
            _ACTIVE.reset(token)

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record if it names a step. Prefect's engine logs states, without a step, on the same loggers."""
        if step := getattr(record, "step", None):
            self.terminal.print(f"[bold]{step:<9}[/bold]", end="")
            self.terminal.print(record.getMessage().removeprefix(f"{step}: "), markup=False)

    @contextmanager
    def progress_bar(self) -> Iterator["Bar"]:
        """Show a progress bar for one training."""
        columns: list[ProgressColumn] = [
            TextColumn("[bold]train    [/bold]"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]}[/cyan]"),
        ]
        is_hidden = not self.terminal.is_terminal
        with Progress(
            *columns, console=self.terminal, transient=True, refresh_per_second=4, disable=is_hidden
        ) as progress:
            yield Bar(progress)


class Bar:
    """The progress bar of one training, which shows lines of metrics.jsonl."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("starting", total=1.0, left="")
        self.val_loss: float | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Move the bar to the newest update."""
        self.val_loss = line.get("val_loss", self.val_loss)
        val = "" if self.val_loss is None else f"  val loss {self.val_loss:.3f}"
        text = (
            f"step {line['step']:,}/{count_steps(line):,}  loss {line['loss']:.3f}{val}  "
            f"{line['tokens_per_second']:,.0f} tokens/s"
        )
        left = format_time_left(line)
        self.progress.update(self.task, completed=line["progress"], description=text, left=left)


def count_steps(line: dict[str, Any]) -> int:
    """Return the number of updates of the whole training, estimated from a line of metrics.jsonl."""
    return round(line["step"] / line["progress"]) if line["progress"] else 0


def format_time_left(line: dict[str, Any]) -> str:
    """Return the time left, such as `4:05 left`, estimated from the share of the budget that the training has used."""
    if not line["progress"]:
        return ""
    seconds = int(line["seconds"] * (1 - line["progress"]) / line["progress"])
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{f'{hours}:{minutes:02d}' if hours else minutes}:{seconds % 60:02d} left"


def describe_progress(line: dict[str, Any], val_loss: float | None) -> str:
    """Return a line for logs and pages, such as `step 20 of 80, loss 3.912, 2,900 tokens/s, 4:05 left`."""
    parts = [f"step {line['step']:,} of {count_steps(line):,}", f"loss {line['loss']:.3f}"]
    if val_loss is not None:
        parts.append(f"val loss {val_loss:.3f}")
    return ", ".join([*parts, f"{line['tokens_per_second']:,.0f} tokens/s", format_time_left(line)])


def active_console() -> Console | None:
    """Return the console that is attached to this run, if there is one."""
    return _ACTIVE.get()


def print_table(table: Table) -> None:
    """Print the table as wide as the terminal, or with every line whole into a pipe or a file."""
    _terminal().print(table)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells of one line as `print_table` does.

    Rich takes a millisecond per row. If no cell has to be wrapped, a column of many lines looks the same, four times
    faster.
    """
    terminal, table = _terminal(), Table(*header)
    table.add_row(*map("\n".join, zip(*rows)))
    if terminal.measure(table, options=terminal.options.update(max_width=10_000)).maximum > terminal.width:
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
    terminal.print(table)


def _terminal() -> Terminal:
    terminal = Terminal(highlight=False)
    return terminal if terminal.is_terminal else Terminal(highlight=False, width=400)

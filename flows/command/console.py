"""What a person at a terminal sees: one line per step, and a bar that moves while the model trains.

Tasks speak through Prefect's run logger, so that the same lines stand in the UI; `Console` shows those lines. The bar
has no counterpart in a log, so the training asks for it through `active()`, which is None where nobody watches.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_ACTIVE: ContextVar["Console | None"] = ContextVar("console", default=None)


class Console(logging.Handler):
    """Prints the lines of the flow's and its tasks' loggers, and owns the progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.terminal = Terminal(highlight=False, soft_wrap=True)

    @contextmanager
    def watching(self) -> Iterator["Console"]:
        """While this holds, run loggers are shown here."""
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
        """Prints a step's line. Prefect's engine reports states on the same loggers; ours name a step."""
        if step := getattr(record, "step", None):
            self.terminal.print(f"[bold]{step:<9}[/bold]", end="")
            self.terminal.print(record.getMessage().removeprefix(f"{step}: "), markup=False)

    @contextmanager
    def bar(self) -> Iterator["Bar"]:
        """A progress bar for one training."""
        columns: list[ProgressColumn] = [
            TextColumn("[bold]train    [/bold]"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            _TimeLeft(),
        ]
        hidden = not self.terminal.is_terminal
        bar = Progress(*columns, console=self.terminal, transient=True, refresh_per_second=4, disable=hidden)
        with bar as progress:
            yield Bar(progress)


class Bar:
    """The bar of one training, fed with lines of metrics.jsonl."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("starting", total=1.0)

    def show(self, line: dict[str, Any]) -> None:
        """Moves the bar to the newest update."""
        total = round(line["step"] / line["progress"]) if line["progress"] else 0
        text = f"step {line['step']:,}/{total:,}  loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
        self.progress.update(self.task, completed=line["progress"], description=text, seconds=line["seconds"])


class _TimeLeft(ProgressColumn):
    """Time left, from the share of the budget that the training itself has used up."""

    def render(self, task: Any) -> Text:
        """Minutes and seconds that are left, by the time that the share so far took; empty before there is one."""
        if not task.completed:
            return Text("")
        left = task.fields["seconds"] * (1 - task.completed) / task.completed
        return Text(f"{int(left) // 60}:{int(left) % 60:02d} left", style="cyan")


def active() -> Console | None:
    """The console of whoever watches this run, if anyone does."""
    return _ACTIVE.get()

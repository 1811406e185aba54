"""One retraining, here and now: start Prefect, run the flow, show how it went.

Importing Prefect, MLflow and torch and starting Prefect's server take seconds each, so they happen here, after the
input was found to be right, and side by side.
"""

import gc
import json as json_module
import logging
import os
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

from rich.table import Table

from flows.command.console import Console
from flows.pipelines import SECTIONS, Pipeline
from flows.service.temporary import no_heartbeats, start_temporary_server, wait_until_ready
from flows.state import StateRoot
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from flows.retrain import Outcome


class Interrupted(GPTCoreError):
    """Somebody pressed Ctrl-C."""

    exit_code = 130  # as a shell reports SIGINT


def launch(pipeline: Pipeline, root: StateRoot, force: bool, json: bool, sources_overridden: bool = False) -> None:
    """Runs the retraining flow in this process and prints its outcome. Raises what the flow raised."""
    began = time.perf_counter()
    root.enter()
    quieten(root)
    console = Console()
    if json:
        console.terminal.quiet = True
    gc.disable()  # imports make no garbage, and looking for it takes a fifth of their time
    with console.terminal.status("starting Prefect and MLflow"):
        has_own_server = _start(root)
    gc.freeze()
    gc.enable()
    seconds = {"start": round(time.perf_counter() - began, 2)}
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with console.watching(), no_heartbeats() if has_own_server else nullcontext():
            outcome = _run(pipeline, root, force, sources_overridden)
    except KeyboardInterrupt:
        raise Interrupted("interrupted. What was saved stays: the same command goes on from there.") from None
    seconds |= {**outcome.seconds, "total": round(time.perf_counter() - began, 2)}
    outcome = replace(outcome, seconds=seconds)
    if json:
        print(json_module.dumps(asdict(outcome), indent=1))
    else:
        _show(console, outcome)


def _interrupt(_number: int, _frame: object) -> None:
    """The first Ctrl-C stops in order: the trainer saves. A second one ends at once, as harmless as a kill."""
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(_number: int, _frame: object) -> None:
    os.write(2, b"ended. What was saved stays: the same command goes on from there.\n")
    os._exit(Interrupted.exit_code)


def quieten(root: StateRoot) -> None:
    """Sends what libraries log and warn to a file, so that the screen is ours. Call it before importing them."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    logging.raiseExceptions = False  # a log that cannot be sent is no reason for a traceback
    handler = logging.FileHandler(root.logs / "libraries.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)


def _start(root: StateRoot) -> bool:
    """Imports the flow while Prefect's server starts, and says whether it is a temporary one.

    Raises GPTCoreError if the server does not answer.
    """
    server = None if "PREFECT_API_URL" in os.environ else start_temporary_server(root)
    beside = Thread(target=_import_and_open, args=(root,))
    beside.start()
    try:
        if server is not None:
            wait_until_ready(server)
    finally:
        beside.join()
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except Exception as failure:  # whatever it is, the user has to know that Prefect is not there
        error = failure
    if error is not None:
        where = os.environ["PREFECT_API_URL"]
        raise GPTCoreError(f"Prefect at {where} does not answer: {error}. Start it, or unset PREFECT_API_URL.")
    return server is not None


def _import_and_open(root: StateRoot) -> None:
    import_module("flows.retrain")
    with suppress(Exception):  # the flow will meet it again, and say what it is
        import_module("flows.tracking").open_database(root)


def _run(pipeline: Pipeline, root: StateRoot, force: bool, sources_overridden: bool) -> "Outcome":
    from flows import faults
    from flows.retrain import Outcome, retrain

    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    with faults.in_our_words(root):
        state = retrain(
            pipeline=pipeline.name,
            model_name=pipeline.model_name,
            **sections,
            force=force,
            sources_overridden=sources_overridden,
            overlap=pipeline.overlap,
            task_runner=pipeline.task_runner,
            notify=pipeline.notify,
            return_state=True,
        )
        outcome = state.result()
    assert isinstance(outcome, Outcome), "the flow returns a state that carries its outcome"
    return outcome


def _show(console: Console, outcome: "Outcome") -> None:
    print_ = console.terminal.print
    if outcome.verdict == "skipped":
        print_(f"[bold]skipped[/bold]  {outcome.reason}  ({outcome.seconds['total']:.1f} s)")
        return
    table = Table(show_header=False, title=f"{outcome.pipeline}: {outcome.verdict}", title_style="bold", min_width=60)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short cannot be copied
    table.add_row("verdict", f"{outcome.verdict}: {outcome.reason}")
    for name, value in (*outcome.changes, *outcome.rows):
        table.add_row(name, value)
    table.add_row("model", outcome.uri)
    if outcome.plots:
        table.add_row("plots", os.path.relpath(outcome.plots))
    if outcome.run_directory:
        table.add_row("run directory", os.path.relpath(outcome.run_directory))
    table.add_row("seconds", ", ".join(f"{name} {took:.1f}" for name, took in outcome.seconds.items()))
    print_(table)
    champion = f"models:/{outcome.uri.removeprefix('models:/').partition('@')[0].partition('/')[0]}@champion"
    prompt = "The assert statement" if outcome.pipeline == "quickstart" else "Once upon a time"
    print_("Next:")
    for command in (f'gptflow generate {champion} --prompt "{prompt}"', f"gptflow show {champion}", "gptflow models"):
        print_(f"  [green]{command}[/green]")

"""One retraining on this machine: start Prefect, run the flow and print its outcome.

Importing Prefect, MLflow and torch and starting Prefect's server take seconds each. So they start only after the input
was found to be right, and run side by side.
"""

import gc
import json as json_module
import os
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

from rich.table import Table

from flows.cli.options import redirect_library_logs
from flows.config.pipelines import SECTIONS, Pipeline
from flows.deployments.ephemeral_server import disable_heartbeats, start_temporary_server, wait_until_ready
from flows.state.console import Console
from flows.state.root import StateRoot
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from flows.retrain.flow import Outcome


class Interrupted(GPTCoreError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # as a shell reports SIGINT


def launch(pipeline: Pipeline, root: StateRoot, force: bool, json: bool, sources_overridden: bool = False) -> None:
    """Run the retraining flow in this process and print its outcome. Raise what the flow raised."""
    began = time.perf_counter()
    root.set_environment()
    redirect_library_logs(root)
    console = Console()
    if json:
        console.terminal.quiet = True
    gc.disable()  # imports make no garbage, and a fifth of their time would go into looking for it
    with console.terminal.status("starting Prefect and MLflow"):
        has_own_server = _start_prefect(root)
    gc.freeze()
    gc.enable()
    seconds = {"start": round(time.perf_counter() - began, 2)}
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with console.attach(), disable_heartbeats() if has_own_server else nullcontext():
            outcome = _run_flow(pipeline, root, force, sources_overridden)
    except KeyboardInterrupt:
        raise Interrupted("interrupted. The saved state stays. Run the same command again to resume.") from None
    seconds |= {**outcome.seconds, "total": round(time.perf_counter() - began, 2)}
    outcome = replace(outcome, seconds=seconds)
    if json:
        print(json_module.dumps(asdict(outcome), indent=1))
    else:
        _print_outcome(console, outcome)


def _interrupt(_number: int, _frame: object) -> None:
    """Stop in order at the first Ctrl-C: the trainer saves. A second one ends the process at once, like a kill."""
    signal.signal(signal.SIGINT, _exit_at_once)
    raise KeyboardInterrupt


def _exit_at_once(_number: int, _frame: object) -> None:
    os.write(2, b"stopped at once. The saved state stays. Run the same command again to resume.\n")
    os._exit(Interrupted.exit_code)


def _start_prefect(root: StateRoot) -> bool:
    """Import the flow while Prefect's server starts. Return whether the server is a temporary one.

    Raises GPTCoreError if the server does not answer.
    """
    server = None if "PREFECT_API_URL" in os.environ else start_temporary_server(root)
    imports = Thread(target=_import_and_open, args=(root,))
    imports.start()
    try:
        if server is not None:
            wait_until_ready(server)
    finally:
        imports.join()
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except Exception as failure:  # every failure means that Prefect cannot be used
        error = failure
    if error is not None:
        url = os.environ["PREFECT_API_URL"]
        raise GPTCoreError(f"Prefect at {url} does not answer: {error}. Start it, or unset PREFECT_API_URL.")
    return server is not None


def _import_and_open(root: StateRoot) -> None:
    import_module("flows.retrain.flow")
    with suppress(Exception):  # the flow opens the database again and reports the error
        import_module("flows.tracking.runs").open_database(root)


def _run_flow(pipeline: Pipeline, root: StateRoot, force: bool, sources_overridden: bool) -> "Outcome":
    from flows.retrain.flow import Outcome, retrain
    from flows.tracking import errors

    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    with errors.translate_errors(root):
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


def _print_outcome(console: Console, outcome: "Outcome") -> None:
    """Print why the run was skipped, or a table of its results and the commands to try next."""
    print_ = console.terminal.print
    if outcome.verdict == "skipped":
        print_(f"[bold]skipped[/bold]  {outcome.reason}  ({outcome.seconds['total']:.1f} s)")
        return
    table = Table(show_header=False, title=f"{outcome.pipeline}: {outcome.verdict}", title_style="bold", min_width=60)
    table.add_column()
    table.add_column(overflow="fold")  # paths must stay whole, so that they can be copied
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

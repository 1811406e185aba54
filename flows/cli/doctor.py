"""`gptflow doctor`: run all checks, and print a fix for each failure.

See doctor_checks.py for the checks themselves. They run side by side, each in a thread. None may take longer than two
minutes, because the failure may be that something hangs.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import click

from flows.cli.options import FILE, JSON, print_json
from gptcore.errors import GPTCoreError

if TYPE_CHECKING:
    from flows.cli.doctor_checks import Check, CheckFunction, CheckTarget
    from flows.state.root import StateRoot

MAX_SECONDS = 120.0
"""A check that takes longer counts as failed."""
_SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@click.command("doctor", short_help="Check the installation, the servers and the champions.")
@FILE
@JSON
def check_project(file: str | None, json: bool) -> None:
    """Check packages, servers, disk, registry and schedules, and print a fix for each failure.

    The command changes nothing. The exit code is 1 if a check fails.
    """
    import logging
    from dataclasses import asdict

    from flows.state.backends import export_passwords
    from flows.state.root import OPT_OUTS, state_root

    path = Path(file or "pipelines.yaml").expanduser().resolve()
    for name, value in {**OPT_OUTS, **_SHORT_TIMEOUTS, "MLFLOW_CONFIGURE_LOGGING": "false"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.captureWarnings(True)
    with suppress(GPTCoreError):  # the checks report it
        export_passwords()
    checks = []
    for check in run_checks(path, state_root(path)):
        checks.append(check)
        if not json:
            _print_check(check)
    if json:
        print_json([asdict(check) for check in checks])
    sys.exit(not all(check.ok for check in checks))


COMMANDS = (check_project,)


def run_checks(file: Path, root: "StateRoot") -> "Iterator[Check]":
    """Run every check on this pipelines.yaml and this state root. Yield the results as the checks end.

    A check that takes too long, or that is broken, has failed.
    """
    from flows.cli.doctor_checks import CHECKS, Check, CheckTarget, check_pipelines

    pipelines, results = check_pipelines(file)
    yield from results
    target, ended = CheckTarget(file, root, tuple(pipelines)), SimpleQueue[tuple[str, list[Check]]]()
    for name, check in CHECKS.items():
        arguments = (name, check, target, ended)
        Thread(target=_run_check, args=arguments, daemon=True).start()  # the process does not wait for it at its exit
    running, deadline = set(CHECKS), time.monotonic() + MAX_SECONDS
    with suppress(Empty):
        while running:
            name, results = ended.get(timeout=max(deadline - time.monotonic(), 0.0))
            running.remove(name)
            yield from results
    for name in sorted(running):
        yield Check(name, False, f"no answer within {MAX_SECONDS:.0f} s", "find out what hangs")


def _run_check(
    name: str, check: "CheckFunction", target: "CheckTarget", ended: "SimpleQueue[tuple[str, list[Check]]]"
) -> None:
    from flows.cli.doctor_checks import Check

    try:
        results = list(check(target))
    except GPTCoreError as error:
        results = [Check(name, False, str(error), "see the message")]
    except Exception as error:  # a broken check must not hide the results of the others
        failure = f"the check itself failed: {type(error).__name__}: {error}"
        results = [Check(name, False, failure, "report this message as a bug")]
    ended.put((name, results))


def _print_check(check: "Check") -> None:
    click.secho("ok  " if check.ok else "FAIL", fg="green" if check.ok else "red", nl=False)
    click.echo(f"  {check.check:<14}  {check.message}")
    if check.cure:
        click.echo(f"{'':<22}{'' if check.ok else 'fix: '}{check.cure}")

"""`gptflow doctor`: run all checks, and print a fix for each failure.

See doctor_checks.py for the checks themselves. They run side by side, each in a thread. None may take longer than two
minutes, because the failure may be that something hangs.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
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
    checks = run_checks(path, state_root(path))
    if json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            _print_check(check)
    sys.exit(not all(check.ok for check in checks))


COMMANDS = (check_project,)


def run_checks(file: Path, root: "StateRoot") -> "list[Check]":
    """Run every check on this pipelines.yaml and this state root. Return the results in a fixed order."""
    from flows.cli.doctor_checks import CHECKS, CheckTarget, check_pipelines

    pipelines, results = check_pipelines(file)
    target = CheckTarget(file, root, tuple(pipelines))
    threads = [_CheckThread(name, check, target) for name, check in CHECKS.items()]
    deadline = time.monotonic() + MAX_SECONDS
    return [*results, *(result for thread in threads for result in thread.result(deadline))]


class _CheckThread:
    """A check in a thread of its own. The process does not wait for the thread when it exits."""

    def __init__(self, name: str, check: "CheckFunction", target: "CheckTarget") -> None:
        self.name = name
        self.checks: list[Check] = []
        self.failure = ""
        self.fix = ""
        self.thread = Thread(target=self._run, args=(check, target), daemon=True)
        self.thread.start()

    def _run(self, check: "CheckFunction", target: "CheckTarget") -> None:
        try:
            self.checks = list(check(target))
        except GPTCoreError as error:
            self.failure, self.fix = str(error), "see the message"
        except Exception as error:  # a broken check must not hide the results of the others
            self.failure = f"the check itself failed: {type(error).__name__}: {error}"
            self.fix = "report this message as a bug"

    def result(self, deadline: float) -> "list[Check]":
        """Wait for the results until `deadline`, in monotonic seconds. A check that is late or broken has failed."""
        from flows.cli.doctor_checks import Check

        self.thread.join(max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            return [Check(self.name, False, f"no answer within {MAX_SECONDS:.0f} s", "find out what hangs")]
        return [Check(self.name, False, self.failure, self.fix)] if self.failure else self.checks


def _print_check(check: "Check") -> None:
    click.secho("ok  " if check.ok else "FAIL", fg="green" if check.ok else "red", nl=False)
    click.echo(f"  {check.check:<14}  {check.message}")
    if check.cure:
        click.echo(f"{'':<22}{'' if check.ok else 'fix: '}{check.cure}")

"""`gptflow doctor`: run all checks, and print a fix for each failure.

See checks.py for the checks themselves. They run side by side, each in a thread. None may take longer than two minutes:
the failure may be that something hangs.
"""

import json as json_module
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import click

from flows.cli.checks import CHECKS, Check, CheckFunction, CheckTarget, join_names
from flows.config.pipelines import Pipeline, PipelinesFile
from flows.state.root import OPT_OUTS, StateRoot, state_root
from gptcore.corpus import sources
from gptcore.errors import GPTCoreError
from gptcore.tokens import tokenizer

MAX_SECONDS = 120.0
"""A check that takes longer counts as failed."""
_SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def print_checks(file: str | None, json: bool) -> int:
    """Print every check. Return the exit code: 1 if a check failed, else 0."""
    path = Path(file or "pipelines.yaml").expanduser().resolve()
    for name, value in {**OPT_OUTS, **_SHORT_TIMEOUTS, "MLFLOW_CONFIGURE_LOGGING": "false"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.captureWarnings(True)
    checks = run_checks(path, state_root(path))
    if json:
        click.echo(json_module.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            _print_check(check)
    return int(not all(check.ok for check in checks))


def run_checks(file: Path, root: StateRoot) -> list[Check]:
    """Run every check on this pipelines.yaml and this state root. Return the results in a fixed order."""
    pipelines, results = check_pipelines(file)
    target = CheckTarget(file, root, tuple(pipelines))
    threads = [_CheckThread(name, check, target) for name, check in CHECKS.items()]
    deadline = time.monotonic() + MAX_SECONDS
    return [*results, *(result for thread in threads for result in thread.result(deadline))]


def check_pipelines(file: Path) -> tuple[list[Pipeline], list[Check]]:
    """Return the pipelines of the file that can be read, and a failed check for each mistake."""
    pipelines, failures = [], []
    try:
        parsed = PipelinesFile(file)
    except GPTCoreError as error:
        return [], [Check("pipelines", False, str(error), "correct the file, or name another with --file")]
    for name in parsed.names():
        try:
            pipeline = parsed.pipeline(name)
            pipelines.append(pipeline)
            sources.check(pipeline.corpus.sources, file.parent)
            tokenizer.check(pipeline.corpus.tokenizer)
        except GPTCoreError as error:
            failures.append(Check("pipelines", False, f"{name}: {error}", f"correct {file}"))
    return pipelines, failures or [Check("pipelines", True, f"{file} is valid: {join_names(parsed.names())}")]


class _CheckThread:
    """A check in a thread of its own. The process does not wait for the thread when it exits."""

    def __init__(self, name: str, check: CheckFunction, target: CheckTarget) -> None:
        self.name, self.checks, self.error = name, list[Check](), ""
        self.thread = Thread(target=self._run, args=(check, target), daemon=True)
        self.thread.start()

    def _run(self, check: CheckFunction, target: CheckTarget) -> None:
        try:
            self.checks = list(check(target))
        except GPTCoreError as error:
            self.checks = [Check(self.name, False, str(error), "see the message")]
        except Exception as error:  # a broken check must not hide the results of the others
            self.error = f"{type(error).__name__}: {error}"

    def result(self, deadline: float) -> list[Check]:
        """Wait for the results until `deadline`, in monotonic seconds. A check that is late or broken has failed."""
        self.thread.join(max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            return [Check(self.name, False, f"no answer within {MAX_SECONDS:.0f} s", "find out what hangs")]
        if self.error:
            return [Check(self.name, False, f"the check itself failed: {self.error}", "report this message as a bug")]
        return self.checks


def _print_check(check: Check) -> None:
    click.secho("ok  " if check.ok else "FAIL", fg="green" if check.ok else "red", nl=False)
    click.echo(f"  {check.check:<14}  {check.message}")
    if check.cure:
        click.echo(f"{'':<22}{'' if check.ok else 'fix: '}{check.cure}")

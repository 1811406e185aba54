"""`gptflow doctor`: whether everything is well, and for what is not, the cure.

What is looked at stands in checks.py. All checks run side by side, and none is waited for longer than two minutes: the
answer may be that something hangs.
"""

import json as json_module
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import click

from flows.command.checks import EXAMINATIONS, Check, Examination, Patient, few
from flows.pipelines import Pipeline, PipelinesFile
from flows.state import OPT_OUTS, StateRoot, state_root
from gptcore import tokenizer
from gptcore.errors import GPTCoreError
from gptcore.text import sources

MOST_SECONDS = 120.0
"""How long a check may take before it counts as hanging."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def doctor(file: str | None, json: bool) -> int:
    """Prints every check, and returns the exit code: 1 if one failed, else 0."""
    path = Path(file or "pipelines.yaml").expanduser().resolve()
    for name, value in {**OPT_OUTS, **_PATIENCE, "MLFLOW_CONFIGURE_LOGGING": "false"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.captureWarnings(True)
    checks = examine(path, state_root(path))
    if json:
        click.echo(json_module.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            _show(check)
    return int(not all(check.ok for check in checks))


def examine(file: Path, root: StateRoot) -> list[Check]:
    """Every check of this pipelines.yaml and this state root, in a fixed order."""
    read, checks = pipelines_of(file)
    patient = Patient(file, root, tuple(read))
    running = [_Running(name, examination, patient) for name, examination in EXAMINATIONS.items()]
    deadline = time.monotonic() + MOST_SECONDS
    return [*checks, *(check for one in running for check in one.result(deadline))]


def pipelines_of(file: Path) -> tuple[list[Pipeline], list[Check]]:
    """The pipelines of the file that a run would accept, and a check of each that it would not."""
    read, checks = [], []
    try:
        parsed = PipelinesFile(file)
    except GPTCoreError as error:
        return [], [Check("pipelines", False, str(error), "mend the file, or name another with --file")]
    for name in parsed.names():
        try:
            pipeline = parsed.pipeline(name)
            read.append(pipeline)
            sources.check(pipeline.corpus.sources, file.parent)
            tokenizer.check(pipeline.corpus.tokenizer)
        except GPTCoreError as error:
            checks.append(Check("pipelines", False, f"{name}: {error}", f"mend it in {file}"))
    return read, checks or [Check("pipelines", True, f"{file} is right: {few(parsed.names())}")]


class _Running:
    """An examination in a thread of its own, which the process does not wait for."""

    def __init__(self, name: str, examination: Examination, patient: Patient) -> None:
        self.name, self.checks, self.error = name, list[Check](), ""
        self.thread = Thread(target=self._run, args=(examination, patient), daemon=True)
        self.thread.start()

    def _run(self, examination: Examination, patient: Patient) -> None:
        try:
            self.checks = list(examination(patient))
        except GPTCoreError as error:
            self.checks = [Check(self.name, False, str(error), "as it says")]
        except Exception as error:  # a doctor that falls ill himself must still report on the rest
            self.error = f"{type(error).__name__}: {error}"

    def result(self, deadline: float) -> list[Check]:
        """What was found until `deadline`, in seconds of the monotonic clock; a check that is late or broke failed."""
        self.thread.join(max(deadline - time.monotonic(), 0.0))
        if self.thread.is_alive():
            return [Check(self.name, False, f"no answer within {MOST_SECONDS:.0f} s", "see what it waits for")]
        if self.error:
            return [Check(self.name, False, f"the check itself failed: {self.error}", "report this, with the message")]
        return self.checks


def _show(check: Check) -> None:
    click.secho("ok  " if check.ok else "FAIL", fg="green" if check.ok else "red", nl=False)
    click.echo(f"  {check.check:<14}  {check.message}")
    if check.cure:
        click.echo(f"{'':<22}{'' if check.ok else 'cure: '}{check.cure}")

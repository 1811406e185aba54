"""How a command ends: with one error message, without a traceback for a user's mistakes, and without delay.

Exit codes are 0 (done), 2 (the input is wrong, or its text was held), 130 (interrupted) and 1 (any other failure).
"""

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import click

from gptcore.errors import GPTCoreError


def run_and_exit(command: Callable[[], Any]) -> NoReturn:
    """Run a click command, print its error if it fails, and exit."""
    ending = {"code": 1}  # for an unexpected error
    atexit.register(_exit_process, ending)
    ending["code"] = _run(command)
    sys.exit(ending["code"])


def _exit_process(ending: dict[str, int]) -> None:
    """End the process at once. Python would take a second or two to take apart all imported modules.

    Because it was registered first, this runs last: Prefect has sent its messages and all threads have ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ending["code"])


def _run(command: Callable[[], Any]) -> int:
    """Run the command, print its error if it fails, and return the exit code."""
    try:
        _translate_errors(command)
    except click.exceptions.Exit as end:
        return end.exit_code
    except SystemExit as end:  # a command that chooses its exit code itself
        return int(end.code or 0)
    except click.ClickException as error:
        error.show()
        return 2
    except GPTCoreError as error:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        if error.exits_at_once:
            sys.stdout.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except OSError as error:
        click.echo(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    return 0


def _translate_errors(command: Callable[[], Any]) -> None:
    """Run the command. Turn errors of MLflow and Prefect into GPTCoreErrors, if there is a translation."""
    try:
        command()
    except (GPTCoreError, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        # Unless MLflow has been imported, the error can be neither MLflow's nor Prefect's.
        if "mlflow" not in sys.modules:
            raise
        from flows.state.root import state_root
        from flows.tracking.errors import translate_error

        if (translated := translate_error(error, state_root())) is None:
            raise
        raise translated from error

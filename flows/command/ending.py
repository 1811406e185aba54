"""How a command ends: with one message and an exit code, and without delay."""

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import click

from gptcore.errors import GPTCoreError


def run_to_the_end(command: Callable[[], Any]) -> NoReturn:
    """Runs a command of click's, says what went wrong if something did, and exits."""
    ending = {"code": 1}  # of an error that nobody expected
    atexit.register(_end, ending)
    ending["code"] = _exit_code(command)
    sys.exit(ending["code"])


def _end(ending: dict[str, int]) -> None:
    """Ends the process. Registered first, it comes last: Prefect has sent, and all threads have ended.

    What Python would still do is to take apart all that was imported, which takes a second or two.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ending["code"])


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        _explained(command)
    except click.exceptions.Exit as done:
        return done.exit_code
    except SystemExit as done:  # a command that says itself how it ended
        return int(done.code or 0)
    except click.ClickException as error:
        error.show()
        return 2
    except GPTCoreError as error:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        if error.ends_at_once:
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


def _explained(command: Callable[[], Any]) -> None:
    try:
        command()
    except (GPTCoreError, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        # Only where MLflow has been imported can its errors, or Prefect's, have come up.
        if "mlflow" not in sys.modules:
            raise
        from flows.faults import explained
        from flows.state import state_root

        if (ours := explained(error, state_root())) is None:
            raise
        raise ours from error

"""What several commands share: options, checks of their values, opening the project, and printing JSON.

Nothing here imports torch, Prefect or MLflow, so that help and wrong input are answered at once.
"""

import logging
import os
import re
from typing import TYPE_CHECKING, Any

import click

from gptcore.errors import ConfigError, GPTCoreError

if TYPE_CHECKING:
    from flows.config.pipelines import PipelinesFile
    from flows.state.root import StateRoot


def check_reason(_context: click.Context, _option: click.Parameter, text: str) -> str:
    """Return the reason without spaces around it. Raises BadParameter if it is empty."""
    if not text.strip():
        raise click.BadParameter("say why: people will look for the reason in the log")
    return text.strip()


def check_model_name(_context: click.Context, _option: click.Parameter, name: str) -> str:
    """Return the name. Raises BadParameter if a registered model cannot have it."""
    from flows.config.pipelines import NAME

    if not re.fullmatch(NAME, name):
        raise click.BadParameter(
            f"{name!r} is not a model's name: use at most 64 letters, digits, '.', '_' and '-', as in gpt-notes"
        )
    return name


def parse_allowed_hosts(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    """Return the hosts of a comma-separated list. Raises BadParameter for anything else."""
    from flows.web import guard

    try:
        return guard.parse_allowed_hosts(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def check_device(_context: click.Context, _option: click.Parameter, name: str) -> str:
    """Return the name of a device, whether or not this machine has it. Raises BadParameter for anything else."""
    from gptcore.devices import check_name

    try:
        check_name(name)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    return name


def choose_generation_device(device: str, quantize: str | None) -> str:
    """Return the device to generate on. Rounded weights need the CPU, so `auto` is cpu for them.

    Raises UsageError if a GPU was chosen for them.
    """
    if quantize is None:
        return device
    if device not in ("auto", "cpu"):
        raise click.UsageError(f"--quantize {quantize} is for CPUs, but --device is {device}: leave one of them out")
    return "cpu"


ALLOWED_HOSTS = click.option(
    "--allowed-hosts",
    default="",
    metavar="HOSTS",
    callback=parse_allowed_hosts,
    help="Names besides localhost by which clients may reach the server, such as that of a reverse proxy: NAME or "
    "NAME:PORT, separated by commas. Other names and the web pages of other sites are refused.",
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    callback=check_device,
    help="Where the model computes: cpu, cuda, cuda:N, mps, or auto, which is the GPU if there is one, else the CPU.",
)
FILE = click.option("--file", metavar="PATH", help="The pipelines.yaml to use. Default: the one in this directory.")
REASON = click.option(
    "--reason",
    required=True,
    type=click.STRING,
    callback=check_reason,
    help='Why, for example "reads better". `gptflow show` prints it.',
)
RESET_SCHEDULES = click.option(
    "--reset-schedules",
    is_flag=True,
    help="Pause and resume schedules as the file says, even those that were paused or resumed in Prefect's UI.",
)
LIMIT = click.option(
    "--limit", default=2, show_default=True, type=click.IntRange(1), help="Maximum number of runs at once."
)
JSON = click.option("--json", is_flag=True, help="Print the result as JSON.")
QUANTIZE = click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="Round the weights to 8 bits, and generate on the CPU, which is then at least twice as fast.",
)


def load_pipelines_file(file: str | None, run_here: bool = False) -> "tuple[PipelinesFile, StateRoot]":
    """Return the file and a writable state root. Raises ConfigError if any of the file's pipelines is wrong.

    With `run_here`, the task runners of the pipelines must be installed on this machine.
    """
    from flows.config.pipelines import PipelinesFile, find_pipelines_file
    from flows.retrain import task_runners
    from flows.state.root import state_root

    path = find_pipelines_file(file)
    pipelines = PipelinesFile(path)
    for name in pipelines.names():
        pipeline = pipelines.pipeline(name)
        if run_here:
            task_runners.check(pipeline.task_runner)
    return pipelines, state_root(path).prepare()


def open_state_root(file: str | None) -> "StateRoot":
    """Return the state root for a command that reads the registry. Call this before importing MLflow."""
    from flows.config.pipelines import find_pipelines_file
    from flows.state.root import state_root

    root = state_root(find_pipelines_file(file) if file else None).prepare()
    root.set_environment()
    redirect_library_logs(root)
    root.prepare_registry()
    return root


def redirect_library_logs(root: "StateRoot") -> None:
    """Write the logs and warnings of libraries to a file instead of the screen. Call this before importing them."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    logging.raiseExceptions = False  # a log line that cannot be sent must not print a traceback
    handler = _LibraryLog(root.logs / "libraries.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)


def print_json(body: Any) -> None:
    """Print plain data as JSON."""
    import json

    click.echo(json.dumps(body, indent=1))


class _LibraryLog(logging.FileHandler):
    """A log file, opened at the first line. If it cannot be opened, the line is lost and the caller continues."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except (OSError, GPTCoreError):  # such as a full table of file descriptors
            self.handleError(record)

    def _open(self) -> Any:
        from gptcore.records import open_regular

        return open(self.baseFilename, self.mode, opener=open_regular)

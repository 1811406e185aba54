"""The command line `gptflow`: the group of all commands, and the commands `serve`, `deploy`, `up` and `serve-model`.

Each command imports what it needs when it runs, so that help and wrong input are answered at once. See the other
modules of this folder for the other commands, and exit.py for error messages and exit codes.
"""

import os
from pathlib import Path
from typing import Any

import click

from flows.cli import doctor, exchange, exit, generate, init, registry, run
from flows.cli.options import (
    ALLOWED_HOSTS,
    DEVICE,
    FILE,
    LIMIT,
    QUANTIZE,
    RESET_SCHEDULES,
    choose_generation_device,
    load_pipelines_file,
    open_state_root,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gptflow")
def cli() -> None:
    """Retrain GPT models when their text changes, and use the best version so far: the champion.

    The champion of a model is the version that the alias @champion names, as in models:/gpt-quickstart@champion. After
    each training the gate compares the new version with the champion, and promotes it if it is clearly better. Both are
    measured in bits per byte on the holdout. The holdout is text that neither version was trained on. Bits per byte say
    how many bits a model needs to encode one byte of text: fewer are better.

    Begin with `gptflow run quickstart`, or with `gptflow init PATH` for your own text.
    """


for _command in (
    *init.COMMANDS,
    *run.COMMANDS,
    *doctor.COMMANDS,
    *generate.COMMANDS,
    *registry.COMMANDS,
    *exchange.COMMANDS,
):
    cli.add_command(_command)


@cli.command(short_help="Run all pipelines by their schedules, on an existing server.")
@LIMIT
@RESET_SCHEDULES
@FILE
@click.option("--reconcile", is_flag=True, hidden=True, help="End runs of this state root that a crash left.")
def serve(limit: int, reset_schedules: bool, file: str | None, reconcile: bool) -> None:
    """Register the deployments of all pipelines at PREFECT_API_URL, and run them on this machine until Ctrl-C.

    A deployment lets Prefect start runs of a pipeline: by its schedule, by a trigger, or from Prefect's UI.
    """
    pipelines, root = load_pipelines_file(file, run_here=True)
    root.set_environment()
    if "PREFECT_API_URL" not in os.environ:
        raise click.UsageError("PREFECT_API_URL is not set: name a Prefect server, or start one with `gptflow up`")
    from flows.deployments.serve import serve as serve_pipelines

    serve_pipelines(pipelines, root, limit, reconcile, reset_schedules)


@cli.command(short_help="Let the workers of a Prefect work pool run all pipelines.")
@click.option("--work-pool", required=True, metavar="POOL", help="Work pool whose workers run the deployments.")
@click.option("--image", help="Container image with gptflow installed, which the pool's workers start.")
@RESET_SCHEDULES
@FILE
def deploy(work_pool: str, image: str | None, reset_schedules: bool, file: str | None) -> None:
    """Register the deployments of all pipelines at PREFECT_API_URL, so that the workers of a work pool run them.

    A deployment lets Prefect start runs of a pipeline: by its schedule, by a trigger, or from Prefect's UI.
    """
    pipelines, root = load_pipelines_file(file)
    if "PREFECT_API_URL" not in os.environ:
        raise click.UsageError("PREFECT_API_URL is not set: name the Prefect server that has the work pool")
    root.set_environment()
    from flows.deployments.work_pool import deploy as deploy_pipelines

    deploy_pipelines(pipelines, root, work_pool, image, reset_schedules)


@cli.command(short_help="Start all servers, and run all pipelines by their schedules.")
@click.option(
    "--prefect-port", default=4200, show_default=True, type=click.IntRange(1, 65535), help="Port of Prefect's server."
)
@click.option(
    "--mlflow-port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port of MLflow's server."
)
@click.option(
    "--database",
    metavar="URL",
    help="PostgreSQL database for the tables of Prefect and MLflow: postgresql://USER@HOST/NAME. "
    "Set its password as PGPASSWORD.",
)
@click.option("--artifacts", metavar="URL", help="Object store for the files of versions and runs: s3://BUCKET/PREFIX.")
@ALLOWED_HOSTS
@LIMIT
@RESET_SCHEDULES
@FILE
def up(
    prefect_port: int,
    mlflow_port: int,
    database: str | None,
    artifacts: str | None,
    allowed_hosts: tuple[str, ...],
    limit: int,
    reset_schedules: bool,
    file: str | None,
) -> None:
    """Start Prefect's server, MLflow's server and the deployments of all pipelines, and run them until Ctrl-C.

    A deployment lets Prefect start runs of a pipeline: by its schedule, by a trigger, or from Prefect's UI. The state
    root (the directory mlruns, which holds all results) remembers --database and --artifacts, also when they are given
    as GPTFLOW_DATABASE and GPTFLOW_ARTIFACTS. The value `local` goes back to files in the state root.
    """
    from flows.state import backends

    backends.apply_options(database, artifacts)
    pipelines, root = load_pipelines_file(file, run_here=True)
    from flows.deployments.up import Options
    from flows.deployments.up import up as supervise

    supervise(root, Options(pipelines.path, prefect_port, mlflow_port, limit, allowed_hosts, reset_schedules))


@cli.command("serve-model", short_help="Serve a registered version over OpenAI's API.")
@click.argument("uri", metavar="NAME@ALIAS|NAME/VERSION")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. An address beyond this machine needs a key, or --no-key.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="File with the key that clients must send. Default: the variable GPTFLOW_API_KEY. Without both, no key.",
)
@click.option("--page/--no-page", default=True, show_default=True, help="Serve a page at / where people try the model.")
@click.option("--no-key", is_flag=True, help="Let anyone who can reach --host use the server.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen at.")
@ALLOWED_HOSTS
@click.option(
    "--max-concurrent",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of texts generated at once. Each text takes memory for a context.",
)
@click.option(
    "--max-queue",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of texts that wait. More of them are answered with 429.",
)
@click.option(
    "--max-tokens", default=4096, show_default=True, type=click.IntRange(1), help="Maximum length of a text in tokens."
)
@DEVICE
@QUANTIZE
@FILE
def serve_model(
    uri: str,
    file: str | None,
    device: str,
    quantize: str | None,
    host: str,
    key_file: Path | None,
    no_key: bool,
    **options: Any,
) -> None:
    """Serve a registered version over OpenAI's completions API until Ctrl-C.

    An alias is followed: as soon as it names another version, new requests get that version.

    Example: gptflow serve-model gpt-quickstart@champion --port 8000
    """
    device = choose_generation_device(device, quantize)
    key = _choose_key(host, key_file, no_key)
    root = open_state_root(file)
    if "@" not in uri and "/" not in uri.removeprefix("models:/"):
        uri += "@champion"  # an alias is followed
    from flows.endpoint.server import Options
    from flows.endpoint.server import serve as serve_version

    serve_version(root, uri, Options(device=device, quantize=quantize, host=host, key=key, **options))


def _choose_key(host: str, key_file: Path | None, no_key: bool) -> str | None:
    """Return the key of the server, if any. Raises UsageError for an address beyond this machine without a key."""
    from flows.endpoint.access import KEY_VARIABLE, read_key
    from flows.web.guard import is_loopback

    key = read_key(key_file)
    if no_key and key is not None:
        raise click.UsageError(f"--no-key is given, and a key too: leave out --no-key, or the key ({KEY_VARIABLE})")
    if key is None and not no_key and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} can be reached from other machines, and there is no key: set {KEY_VARIABLE} or --key-file, "
            "or allow everyone with --no-key"
        )
    return key


def main() -> None:
    """Run a command as the installed program `gptflow` does, and exit."""
    exit.run_and_exit(lambda: cli(standalone_mode=False))

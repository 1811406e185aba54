"""A retraining on this machine: `gptflow run` runs the flow, `gptflow prepare` makes a run directory for a training.

Importing Prefect, MLflow and torch and starting Prefect's server take seconds each. So they start only after the input
was found to be right, and run side by side.
"""

import gc
import os
import time
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import click

from flows.cli.options import FILE, JSON, print_json, redirect_library_logs
from gptcore.errors import ConfigError, CorpusError, GPTCoreError

if TYPE_CHECKING:
    from flows.config.pipelines import Pipeline
    from flows.retrain.flow import Outcome
    from flows.state.console import Console
    from flows.state.root import StateRoot
    from gptcore.tokens.directory import Tokens

SET = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key of the pipeline, for example train.max_steps=50. May be given several times.",
)


class Interrupted(GPTCoreError):
    """The user pressed Ctrl-C."""

    exit_code = 130  # as a shell reports SIGINT


class RunCommand(click.Command):
    """`gptflow run`, whose help lists every key of the configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from flows.config.pipelines import SECTIONS, Pipeline

        for section in SECTIONS:
            default = Pipeline.model_fields[section].default
            fields = type(default).model_fields
            with formatter.section(f"Keys of {section}"):
                formatter.write_dl(
                    [
                        (f"{section}.{key}", f"{field.description} [{getattr(default, key)}]")
                        for key, field in fields.items()
                    ]
                )


@click.command("run", cls=RunCommand, short_help="Retrain a pipeline now.")
@click.argument("pipeline", default="quickstart")
@SET
@click.option("--force", is_flag=True, help="Train again even if nothing has changed.")
@click.option(
    "--accept-text",
    is_flag=True,
    help="The text is right, even if much of it is gone, or something unlike it has taken its place.",
)
@FILE
@JSON
def retrain_now(
    pipeline: str, overrides: tuple[str, ...], force: bool, accept_text: bool, file: str | None, json: bool
) -> None:
    """Retrain PIPELINE now: read its text, then train a model, evaluate it and register it as a version.

    PIPELINE is a name in pipelines.yaml (default: quickstart). The run ends at once if there is no reason to train,
    such as new text or new settings.

    Example: gptflow run quickstart --set train.max_steps=100
    """
    from dataclasses import asdict

    from flows.config.pipelines import overrides_sources
    from flows.state.console import Console
    from gptcore import devices

    loaded, root = load_pipeline(pipeline, overrides, file)
    if loaded.train.device not in ("auto", "cpu"):
        devices.choose_device(loaded.train.device)
    console = Console()
    console.terminal.quiet = json
    flags = {"force": force, "accept_text": accept_text, "sources_overridden": overrides_sources(overrides)}
    outcome = _launch(loaded, root, console, flags)
    if json:
        print_json(asdict(outcome))
    if outcome.verdict == "held":
        raise CorpusError(outcome.reason)
    if not json:
        _print_outcome(console, outcome)


@click.command("prepare", short_help="Prepare a directory for a training by hand.")
@click.argument("pipeline")
@click.argument("directory", type=click.Path(path_type=Path))
@SET
@FILE
def prepare_directory(pipeline: str, directory: Path, overrides: tuple[str, ...], file: str | None) -> None:
    """Write the settings and the tokens of PIPELINE into DIRECTORY, for a training by hand.

    The training is then `python -m gptcore.train DIRECTORY`, for example under a job scheduler or in a container. Where
    a key of train is auto, each start of the training chooses the value for its machine, prints it and records it.
    """
    loaded, root = load_pipeline(pipeline, overrides, file)
    tokens = prepare(loaded, root, directory)
    counts = tokens.counts
    click.echo(f"{directory}: {counts['train']:,} train and {counts['val']:,} val tokens, {tokens.tokenizer}")
    click.echo(f"train it with: python -m gptcore.train {directory}")


COMMANDS = (retrain_now, prepare_directory)


def load_pipeline(name: str, overrides: tuple[str, ...], file: str | None) -> "tuple[Pipeline, StateRoot]":
    """Return the pipeline and a writable state root.

    Every mistake that can be found without heavy imports is an error here: ConfigError or GPTCoreError.
    """
    from flows.config.pipelines import PipelinesFile, find_pipelines_file
    from flows.retrain import task_runners
    from flows.state.root import state_root
    from gptcore.corpus import sources
    from gptcore.tokens import tokenizer
    from gptcore.training import memory

    path = find_pipelines_file(file)
    pipeline = PipelinesFile(path).pipeline(name, overrides)
    sources.check(pipeline.corpus.sources, path.parent, pipeline.corpus.exclude, pipeline.corpus.formats)
    tokenizer.check(pipeline.corpus.tokenizer)
    task_runners.check(pipeline.task_runner)
    memory.check(pipeline.model, pipeline.train)
    return pipeline, state_root(path).prepare()


def prepare(pipeline: "Pipeline", root: "StateRoot", directory: Path) -> "Tokens":
    """Ingest and tokenize the text, then make `directory` a run directory. It contains its tokens, so it can be moved.

    An `auto` stays `auto`, because the trainer may run on another machine. Raises CheckpointError if the directory
    belongs to another training, ConfigError if it holds something else.
    """
    is_run_directory = (directory / "config.json").exists()
    if directory.is_file() or (directory.is_dir() and not is_run_directory and any(directory.iterdir())):
        raise ConfigError(
            f"{directory.resolve()} is a file, or holds files but is not a run directory. Name a new one."
        )
    from flows.registry import ancestry, versions
    from flows.retrain import attempts
    from gptcore.corpus.ingest import ingest
    from gptcore.tokens.files import tokenize
    from gptcore.training.run_directory import RunDirectory

    has_registry = root.mlflow_database is None or root.mlflow_database.path.exists()
    previous = None
    if has_registry or pipeline.train.start_from != ancestry.SCRATCH:
        root.prepare_registry()
        pipeline = attempts.keep_recorded_split(root, pipeline)
        previous = versions.find_split_snapshot(root, pipeline)
    start = ancestry.resolve_start(root, pipeline)
    # Shards are processed by local processes, because there is no flow run here that could have tasks.
    snapshot = ingest(pipeline.corpus, root.corpora, root.project, previous=previous)
    for line in filter(None, (*snapshot.reading.describe(), snapshot.reading.describe_secrets())):
        click.echo(line)
    pipeline = attempts.keep_split(pipeline, snapshot.split)
    vocabulary = start.load_tokenizer() if start else None
    tokens = tokenize(snapshot.path, pipeline.corpus.tokenizer, root.tokens, vocabulary=vocabulary)
    attempts.check_fits(pipeline, tokens)
    attempts.configure(RunDirectory(directory), pipeline, tokens, "tokens", start)
    _copy_tokens(tokens.path, directory / "tokens")
    return tokens


def _copy_tokens(tokens: Path, goal: Path) -> None:
    """Copy a token directory, unless `goal` is an intact copy already."""
    import shutil

    from gptcore import manifest

    manifest.set_aside_damaged(goal)
    if manifest.is_committed(goal):
        return
    if goal.exists():  # an earlier release was killed while it copied
        manifest.set_aside(goal)
    with manifest.stage(goal.parent) as staged:
        shutil.copytree(tokens, staged, dirs_exist_ok=True)
        manifest.adopt(staged, goal)


def _launch(pipeline: "Pipeline", root: "StateRoot", console: "Console", flags: dict[str, bool]) -> "Outcome":
    """Run the retraining flow in this process, with `flags` as parameters, and return its outcome.

    Raise what the flow raised.
    """
    import signal
    from dataclasses import replace

    from flows.deployments.ephemeral_server import disable_heartbeats

    began = time.perf_counter()
    root.set_environment()
    redirect_library_logs(root)
    gc.disable()  # imports make no garbage, and a fifth of their time would go into looking for it
    with console.terminal.status("starting Prefect and MLflow"):
        has_own_server = _start_prefect(root)
    gc.freeze()
    gc.enable()
    seconds = {"start": round(time.perf_counter() - began, 2)}
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with console.attach(), disable_heartbeats() if has_own_server else nullcontext():
            outcome = _run_flow(pipeline, root, flags)
    except KeyboardInterrupt:
        raise Interrupted("interrupted. The saved state stays. Run the same command again to resume.") from None
    seconds |= {**outcome.seconds, "total": round(time.perf_counter() - began, 2)}
    return replace(outcome, seconds=seconds)


def _interrupt(_number: int, _frame: object) -> None:
    """Stop in order at the first Ctrl-C: the trainer saves. A second one ends the process at once, like a kill."""
    import signal

    signal.signal(signal.SIGINT, _exit_at_once)
    raise KeyboardInterrupt


def _exit_at_once(_number: int, _frame: object) -> None:
    os.write(2, b"stopped at once. The saved state stays. Run the same command again to resume.\n")
    os._exit(Interrupted.exit_code)


def _start_prefect(root: "StateRoot") -> bool:
    """Import the flow while Prefect's server starts. Return whether the server is a temporary one.

    Raises GPTCoreError if the server does not answer.
    """
    from flows.deployments.ephemeral_server import start_temporary_server, wait_until_ready

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


def _import_and_open(root: "StateRoot") -> None:
    import_module("flows.retrain.flow")
    with suppress(Exception):  # the flow opens the database again and reports the error
        import_module("flows.tracking.runs").connect_and_migrate(root)


def _run_flow(pipeline: "Pipeline", root: "StateRoot", flags: dict[str, bool]) -> "Outcome":
    from flows.config.pipelines import SECTIONS
    from flows.retrain.flow import Outcome, TextHeld, retrain
    from flows.tracking import errors

    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    with errors.translate_errors(root):
        state = retrain(
            pipeline=pipeline.name,
            model_name=pipeline.model_name,
            **sections,
            **flags,
            overlap=pipeline.overlap,
            task_runner=pipeline.task_runner,
            notify=pipeline.notify,
            return_state=True,
        )
        if state.is_cancelled():
            what = str(state.message).partition(";")[0]  # without what the next run of a schedule does
            raise Interrupted(f"{what}. Run the same command again to resume.")
        try:
            outcome = state.result()
        except TextHeld as held:
            return held.outcome
    assert isinstance(outcome, Outcome), "the flow returns a state that carries its outcome"
    return outcome


def _print_outcome(console: "Console", outcome: "Outcome") -> None:
    """Print why the run was skipped, or a table of its results and the commands to try next."""
    from rich.table import Table

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
    if outcome.uri:
        table.add_row("model", outcome.uri)
    if outcome.plots:
        table.add_row("plots", os.path.relpath(outcome.plots))
    if outcome.run_directory:
        table.add_row("run directory", os.path.relpath(outcome.run_directory))
    table.add_row("seconds", ", ".join(f"{name} {took:.1f}" for name, took in outcome.seconds.items()))
    print_(table)
    print_("Next:")
    for command in _list_next_commands(outcome):
        print_(f"  [green]{command}[/green]")


def _list_next_commands(outcome: "Outcome") -> tuple[str, ...]:
    """Return commands that work after this outcome. A rejected version may have no champion beside it."""
    if outcome.verdict == "paused":
        return (f"gptflow run {outcome.pipeline}",)
    uri = f"{outcome.uri.rpartition('/')[0]}@champion" if outcome.verdict == "promoted" else outcome.uri
    prompt = "The assert statement" if outcome.pipeline == "quickstart" else "Once upon a time"
    return (f'gptflow generate {uri} --prompt "{prompt}"', f"gptflow show {uri}", "gptflow models")

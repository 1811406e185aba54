"""The command line `gptflow`.

Each command imports what it needs when it runs, so that help and wrong input are answered at once. User errors are
printed as one message without a traceback; exit codes are 0 (done), 2 (the input is wrong) and 1 (anything else).
"""

import json as json_module
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.command import ending
from flows.command.options import FILE, JSON, LIMIT, QUANTIZE, REASON, SET, RunCommand, named

if TYPE_CHECKING:
    from flows.pipelines import Pipeline, PipelinesFile
    from flows.state import StateRoot


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gptflow")
def cli() -> None:
    """Train GPTs that keep themselves up to date, and look up which one is the champion."""


@cli.command(cls=RunCommand)
@click.argument("pipeline", default="quickstart")
@SET
@click.option("--force", is_flag=True, help="Train again even if nothing has changed.")
@FILE
@JSON
def run(pipeline: str, overrides: tuple[str, ...], force: bool, file: str | None, json: bool) -> None:
    """Retrain PIPELINE here and now: corpus in; a trained, evaluated, registered model out."""
    from flows.command.launch import launch
    from flows.pipelines import overrides_sources

    asked, root = _asked(pipeline, overrides, file)
    launch(asked, root, force, json, overrides_sources(overrides))


@cli.command()
@LIMIT
@FILE
@click.option("--reconcile", is_flag=True, hidden=True, help="End runs of this state root that a crash left.")
def serve(limit: int, file: str | None, reconcile: bool) -> None:
    """Register the deployments of all pipelines at PREFECT_API_URL, and run what is due, until stopped."""
    pipelines, root = _all_pipelines(file, run_here=True)
    root.enter()
    if "PREFECT_API_URL" not in os.environ:
        raise click.UsageError("PREFECT_API_URL is not set: name a Prefect server, or start one with `gptflow up`")
    from flows.service.serve import serve as serve_pipelines

    serve_pipelines(pipelines, root, limit, reconcile)


@cli.command()
@click.option("--work-pool", required=True, metavar="POOL", help="Work pool whose workers run the deployments.")
@click.option("--image", help="Container image that the pool's workers start, with gptflow installed.")
@FILE
def deploy(work_pool: str, image: str | None, file: str | None) -> None:
    """Register the deployments of all pipelines at PREFECT_API_URL, to be run by the workers of a work pool."""
    pipelines, root = _all_pipelines(file)
    if "PREFECT_API_URL" not in os.environ:
        raise click.UsageError("PREFECT_API_URL is not set: name the Prefect server that has the work pool")
    root.enter()
    from flows.service.deploy import deploy as deploy_pipelines

    deploy_pipelines(pipelines, root, work_pool, image)


@cli.command()
@click.option("--prefect-port", default=4200, show_default=True, type=click.IntRange(1, 65535))
@click.option("--mlflow-port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--database", metavar="URL", help="postgresql://USER@HOST/NAME, for both; the password as PGPASSWORD.")
@click.option("--artifacts", metavar="URL", help="s3://BUCKET/PREFIX for all files of versions and runs.")
@LIMIT
@FILE
def up(
    prefect_port: int, mlflow_port: int, database: str | None, artifacts: str | None, limit: int, file: str | None
) -> None:
    """Start Prefect, MLflow and all deployments with their schedules, and keep them up until Ctrl-C.

    The state root remembers --database and --artifacts (or GPTFLOW_DATABASE and GPTFLOW_ARTIFACTS); `local` undoes it.
    """
    from flows.sharing import backends

    backends.ask(database, artifacts)
    pipelines, root = _all_pipelines(file, run_here=True)
    from flows.service.up import Options
    from flows.service.up import up as supervise

    supervise(root, Options(pipelines.path, prefect_port, mlflow_port, limit))


@cli.command()
@click.argument("pipeline")
@click.argument("directory", type=click.Path(path_type=Path))
@SET
@FILE
def prepare(pipeline: str, directory: Path, overrides: tuple[str, ...], file: str | None) -> None:
    """Make DIRECTORY a run directory of PIPELINE, to be trained by hand with `python -m gptcore.train DIRECTORY`."""
    asked, root = _asked(pipeline, overrides, file)
    from flows.command.prepare import prepare as prepare_directory

    tokens = prepare_directory(asked, root, directory)
    counts = tokens.counts
    click.echo(f"{directory}: {counts['train']:,} train and {counts['val']:,} val tokens, {tokens.tokenizer}")
    click.echo(f"train it with: python -m gptcore.train {directory}")


@cli.command()
@click.argument("model", required=False)
@FILE
@JSON
def models(model: str | None, file: str | None, json: bool) -> None:
    """List the versions of MODEL, or of every registered model, with their scores and the gate's verdicts."""
    root = _entered(file)
    from flows.command.show import models_table
    from flows.releases import registry
    from flows.releases.champion import moves as settle

    for name in {version.name for version in registry.versions(root, model)}:
        settle(root, name)
    listed = [registry.summary(root, version) for version in registry.versions(root, model)]
    if json:
        click.echo(json_module.dumps(listed, indent=1))
    else:
        models_table(listed)


@cli.command()
@click.argument("uri")
@FILE
@JSON
def show(uri: str, file: str | None, json: bool) -> None:
    """Show the whole lineage of the version URI, such as models:/gpt-quickstart@champion."""
    root = _entered(file)
    from flows.command.show import lineage_table
    from flows.releases import registry
    from flows.releases.champion import moves as log_of_moves

    found = registry.resolve(root, uri)
    concerned = [move for move in log_of_moves(root, found.name) if str(found.version) in (move.source, move.target)]
    described = {**registry.describe(root, found), "moves": [move.as_dict() for move in concerned]}
    if json:
        click.echo(json_module.dumps(described, indent=1))
    else:
        lineage_table(described)


@cli.command()
@click.argument("uri")
@click.option("--anyway", is_flag=True, help="Go on where something is different; then other weights are no failure.")
@FILE
@JSON
def reproduce(uri: str, anyway: bool, file: str | None, json: bool) -> None:
    """Train the version URI again from its own lineage, and compare the weights bit for bit.

    What is different from then is named first: packages, code, machine, text. If any of it may change the weights,
    nothing is trained and the exit code is 2, unless --anyway is given. The exit code is 0 if the weights are equal, or
    if they differ after differences that --anyway accepted, and 1 if they differ without any. Nothing is registered.
    """
    root = _entered(file)
    from flows.releases.reproduce import reproduce as train_again

    train_again(root, uri, anyway, json)


@cli.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1))
@REASON
@FILE
@JSON
def promote(model: str, version: int, reason: str, file: str | None, json: bool) -> None:
    """Make VERSION the champion of MODEL, whatever the gate said."""
    from flows.command.hand import promote as move_to

    move_to(_entered(file), model, str(version), reason, json)


@cli.command()
@click.argument("model")
@REASON
@FILE
@JSON
def rollback(model: str, reason: str, file: str | None, json: bool) -> None:
    """Go back to the previous champion of MODEL, and withdraw the current one."""
    from flows.command.hand import rollback as move_back

    move_back(_entered(file), model, reason, json)


@cli.command("import")
@click.argument("source")
@click.option("--model", required=True, metavar="NAME", callback=named, help="Registered model that it belongs to.")
@click.option("--n-heads", type=click.IntRange(1), help="Attention heads, where no config.json says it.")
@FILE
@JSON
def import_(source: str, model: str, n_heads: int | None, file: str | None, json: bool) -> None:
    """Register a GPT-2 from elsewhere: SOURCE is a Hugging Face directory, a hub name, a .safetensors or a .pth.

    It becomes the champion of a model that has none. Of a .pth only tensors are read, so it cannot run code.
    """
    root = _entered(file)
    from gptcore.exchange.checkpoints import read

    checkpoint = read(source, n_heads)
    from flows.command.exchange import bring

    bring(root, checkpoint, model, json)


@cli.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@FILE
@JSON
def export(uri: str, directory: Path, file: str | None, json: bool) -> None:
    """Write the version URI into DIRECTORY as a GPT-2 that Hugging Face's transformers loads, with its tokenizer."""
    root = _entered(file)
    from flows.command.exchange import take

    take(root, uri, directory, json)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only list what would be freed, with its bytes.")
@FILE
@JSON
def prune(dry_run: bool, file: str | None, json: bool) -> None:
    """Free the files of old versions that no rollback can reach, and what only they needed (retrain.keep)."""
    pipelines, _ = _all_pipelines(file)
    root = _entered(file)
    from flows.command.hand import prune as free

    free(root, pipelines.keep(), dry_run, json)


@cli.command()
@FILE
@JSON
def doctor(file: str | None, json: bool) -> None:
    """Check versions, servers, disk, registry and stale champions, and say what cures each failure."""
    from flows.command.doctor import doctor as examine

    sys.exit(examine(file, json))


@cli.command()
@click.argument("uri")
@click.option("--prompt", default="", help="What to continue. Empty: begin a new document.")
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(1), help="Draw among this many likeliest tokens.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option(
    "--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Share of the likeliest one's."
)
@click.option("--repetition-penalty", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--seed", type=click.IntRange(0), help="Repeat a text. Default: a new one each time.")
@click.option("--num-samples", default=1, show_default=True, type=click.IntRange(1))
@QUANTIZE
@FILE
def generate(uri: str, file: str | None, **options: Any) -> None:
    """Continue a prompt with the version URI, token by token as they come."""
    root = _entered(file)
    from flows.command.writing import write

    write(root, uri, **options)


@cli.command("serve-model")
@click.argument("uri", metavar="MODEL@ALIAS|MODEL/VERSION")
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine, whoever reaches it may ask.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--max-concurrent",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Texts written at once; each takes memory for a context.",
)
@click.option("--max-queue", default=64, show_default=True, type=click.IntRange(0), help="Texts that may wait.")
@click.option("--max-tokens", default=4096, show_default=True, type=click.IntRange(1), help="The longest text.")
@QUANTIZE
@FILE
def serve_model(uri: str, file: str | None, **options: Any) -> None:
    """Answer OpenAI's completions API with a registered model, until Ctrl-C; an alias is followed as it moves."""
    root = _entered(file)
    from flows.serving.server import Options
    from flows.serving.server import serve as serve_version

    serve_version(root, uri, Options(**options))


def _asked(name: str, overrides: tuple[str, ...], file: str | None) -> "tuple[Pipeline, StateRoot]":
    """The pipeline and a writable state root, or an error about whatever can be found wrong without heavy imports."""
    from flows import runners
    from flows.pipelines import PipelinesFile, find_pipelines_file
    from flows.state import state_root
    from gptcore import memory, tokenizer
    from gptcore.text import sources

    path = find_pipelines_file(file)
    asked = PipelinesFile(path).pipeline(name, overrides)
    sources.check(asked.corpus.sources, path.parent)
    tokenizer.check(asked.corpus.tokenizer)
    runners.check(asked.task_runner)
    memory.check(asked.model, asked.train)
    return asked, state_root(path).create()


def _all_pipelines(file: str | None, run_here: bool = False) -> "tuple[PipelinesFile, StateRoot]":
    """The file, all of whose pipelines are right, and a writable state root. Needs no heavy imports."""
    from flows import runners
    from flows.pipelines import PipelinesFile, find_pipelines_file
    from flows.state import state_root

    path = find_pipelines_file(file)
    pipelines = PipelinesFile(path)
    for name in pipelines.names():
        asked = pipelines.pipeline(name)
        if run_here:
            runners.check(asked.task_runner)
    return pipelines, state_root(path).create()


def _entered(file: str | None) -> "StateRoot":
    """The state root for a command that reads the registry. Libraries imported after this are quiet."""
    from flows.command.launch import quieten
    from flows.pipelines import find_pipelines_file
    from flows.state import state_root

    root = state_root(find_pipelines_file(file) if file else None).create()
    root.enter()
    quieten(root)
    return root


def main() -> None:
    """Entry point: runs a command, and turns our errors into a message and an exit code."""
    ending.run_to_the_end(lambda: cli(standalone_mode=False))

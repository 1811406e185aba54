"""The commands about registered versions: list, show, reproduce, promote, roll back and prune.

They work on the registry directly, without Prefect. Each command imports what it needs when it runs.
"""

import os

import click

from flows.cli.options import FILE, JSON, REASON, load_pipelines_file, open_state_root, print_json


@click.command("models", short_help="List the registered versions and their scores.")
@click.argument("model", required=False)
@FILE
@JSON
def list_models(model: str | None, file: str | None, json: bool) -> None:
    """List the versions of MODEL, or of all registered models, with their scores and the gate's verdicts.

    The gate compares a new version with the champion, the version that the alias @champion names, and promotes it if it
    is clearly better. Scores are bits per byte on held-out text: how many bits a model needs to encode one byte. Fewer
    are better.
    """
    root = open_state_root(file)
    from flows.cli.tables import print_models
    from flows.registry import champion, versions

    champion.complete_logs(root, model)
    summaries = versions.summarize_all(root, model)
    if json:
        print_json(summaries)
    else:
        print_models(summaries)


@click.command("show", short_help="Show where a version comes from.")
@click.argument("uri")
@click.option("--full", is_flag=True, help="Show every recorded key.")
@FILE
@JSON
def show_lineage(uri: str, full: bool, file: str | None, json: bool) -> None:
    """Show the lineage of the version URI: its text, settings, code, packages, ancestors, promotions and rollbacks.

    URI names a version by its number or by an alias: NAME/3 or NAME@champion, with or without MLflow's models:/ in
    front. NAME alone is the champion, the best version so far.

    Example: gptflow show gpt-quickstart@champion
    """
    root = open_state_root(file)
    from flows.cli.tables import print_lineage
    from flows.registry import champion, versions

    version = versions.resolve(root, uri)
    champion.complete_log(root, version.name)
    number = str(version.version)
    moves = [move for move in champion.read_moves(root, version.name) if number in (move.source, move.target)]
    lineage = {**versions.describe(root, version), "moves": [move.as_dict() for move in moves]}
    if json:
        print_json(lineage)
    else:
        print_lineage(lineage, full)


@click.command(short_help="Train a version again, and compare the weights.")
@click.argument("uri")
@click.option("--anyway", is_flag=True, help="Train even if something has changed. Other weights are then accepted.")
@FILE
@JSON
def reproduce(uri: str, anyway: bool, file: str | None, json: bool) -> None:
    """Train the version URI again from its recorded lineage, and compare the weights bit for bit.

    First the command lists what has changed since then: packages, code, machine and text. If a change can affect the
    weights, it trains nothing and exits with code 2, unless --anyway is given. Nothing is registered.

    The exit code is 0 if the weights are equal, or if they differ after changes that --anyway accepted. It is 1 if they
    differ although nothing has changed.

    Example: gptflow reproduce models:/gpt-quickstart/1
    """
    root = open_state_root(file)
    from flows.operations.reproduce import reproduce as train_again

    train_again(root, uri, anyway, json)


@click.command(short_help="Make a version the champion.")
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@REASON
@FILE
@JSON
def promote(model: str, version: int | None, reason: str, file: str | None, json: bool) -> None:
    """Make VERSION the champion of MODEL, whatever the gate has decided. MODEL/VERSION names it as well.

    The champion is the version that the alias @champion names. The gate is the comparison after each training that
    otherwise decides.

    Example: gptflow promote gpt-notes/7 --reason "reads better"
    """
    root = open_state_root(file)
    _preload_bundle_imports()
    from flows.registry import champion, versions

    if version is None:
        named = versions.resolve(root, model)
        model, version = named.name, int(named.version)
    move = champion.promote(root, model, str(version), reason, by=user_name())
    if json:
        unchanged = {"from": str(version), "to": str(version), "kind": "unchanged"}
        print_json({"model": model, **(unchanged if move is None else move.as_dict())})
    elif move is None:
        click.echo(f"version {version} is the champion of {model} already")
    else:
        click.echo(f"{model}: version {move.target} is champion, after {move.source or 'none'}")


@click.command(short_help="Make the previous champion the champion again.")
@click.argument("model")
@REASON
@FILE
@JSON
def rollback(model: str, reason: str, file: str | None, json: bool) -> None:
    """Make the previous champion of MODEL the champion again, and withdraw the current one.

    The champion is the version that the alias @champion names. No retraining promotes a withdrawn
    version again. Another rollback goes further back.

    Example: gptflow rollback gpt-notes --reason "repeats itself"
    """
    root = open_state_root(file)
    _preload_bundle_imports()
    from flows.registry import champion

    move = champion.rollback(root, model, reason, by=user_name())
    if json:
        print_json({"model": model, **move.as_dict()})
    else:
        click.echo(f"{model}: back to version {move.target}; version {move.source or '(none)'} is withdrawn")


@click.command(short_help="Delete the files of old versions.")
@click.option("--dry-run", is_flag=True, help="Only list what would be deleted, with its size in bytes.")
@FILE
@JSON
def prune(dry_run: bool, file: str | None, json: bool) -> None:
    """Delete the files of old versions that no rollback can reach, and files that only those versions used.

    A rollback makes the previous champion the champion again. The key retrain.keep of pipelines.yaml says how many of
    the newest versions of each model stay.
    """
    pipelines, _ = load_pipelines_file(file)
    root = open_state_root(file)
    from dataclasses import asdict

    from flows.operations.retention import prune as free

    freed = free(root, pipelines.keep(), dry_run)
    if json:
        print_json({**asdict(freed), "bytes": freed.bytes, "dry_run": dry_run})
    else:
        click.echo("\n".join([*freed.lines(), freed.summary(dry_run)]))


COMMANDS = (list_models, show_lineage, reproduce, promote, rollback, prune)


def _preload_bundle_imports() -> None:
    """Start to import what loading a bundle needs, beside the imports of the command."""
    from threading import Thread

    Thread(target=__import__, args=("gptcore.bundle",)).start()


def user_name() -> str:
    """Return the user's name, for the log of promotions and rollbacks."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"

"""Moving a champion and freeing disk from the command line: done here and now, without Prefect, and shown."""

import getpass
import json as json_module
import os
from collections.abc import Mapping
from dataclasses import asdict
from threading import Thread
from typing import Any

import click

from flows.state import StateRoot


def promote(root: StateRoot, model: str, version: str, reason: str, json: bool) -> None:
    """Makes the version champion. Raises what `champion.promote` raises."""
    champion = _champion()
    move = champion.promote(root, model, version, reason, by=who())
    body = {"from": version, "to": version, "kind": "unchanged"} if move is None else move.as_dict()
    if json:
        _print(model, body)
    elif move is None:
        click.echo(f"version {version} is the champion of {model} already")
    else:
        click.echo(f"{model}: version {move.target} is champion, after {move.source or 'none'}")


def rollback(root: StateRoot, model: str, reason: str, json: bool) -> None:
    """Goes back to the previous champion. Raises what `champion.rollback` raises."""
    move = _champion().rollback(root, model, reason, by=who())
    if json:
        _print(model, move.as_dict())
    else:
        click.echo(f"{model}: back to version {move.target}; version {move.source or '(none)'} is withdrawn")


def prune(root: StateRoot, keep: Mapping[str, int], dry_run: bool, json: bool) -> None:
    """Frees what nobody needs, or lists it. Raises what `prune.prune` raises."""
    from flows.releases.prune import prune as free

    freed = free(root, keep, dry_run)
    if json:
        click.echo(json_module.dumps({**asdict(freed), "bytes": freed.bytes, "dry_run": dry_run}, indent=1))
    else:
        click.echo("\n".join([*freed.lines(), freed.summary(dry_run)]))


def _champion() -> Any:
    """The module, while what loading a bundle needs is imported side by side."""
    Thread(target=__import__, args=("gptcore.bundle",)).start()
    from flows.releases import champion

    return champion


def who() -> str:
    """The user's name, for the log."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def _print(model: str, body: Mapping[str, Any]) -> None:
    click.echo(json_module.dumps({"model": model, **body}, indent=1))

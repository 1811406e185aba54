"""Models from elsewhere, and models that go there: `gptflow import` and `gptflow export`."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from mlflow.entities.model_registry import ModelVersion

from flows.command.hand import who
from flows.releases import imported, model_card, registry
from flows.releases.imported import Imported
from flows.releases.loading import load
from flows.state import StateRoot
from gptcore.bundle import CARD
from gptcore.config import SIZES
from gptcore.exchange import huggingface
from gptcore.exchange.checkpoints import Checkpoint


def bring(root: StateRoot, checkpoint: Checkpoint, model: str, json: bool) -> None:
    """Registers a checkpoint and says what it is. Raises what `imported.register` raises."""
    done = imported.register(root, model, checkpoint, by=who())
    if json:
        keys = ("weights_sha256", "tokenizer", "parameters", "dropped_ids", "imported_from", "files")
        body = {"model": model, "version": int(done.version), "uri": done.uri, "is_new": done.is_new}
        body |= {"champion": int(done.champion), "cfg": checkpoint.cfg, **{key: done.lineage[key] for key in keys}}
        click.echo(json_module.dumps(body, indent=1))
        return
    shape = ", ".join(f"{key} {value}" for key, value in checkpoint.cfg.items() if key != "drop_rate")
    click.echo(f"{done.uri}: {done.lineage['parameters']:,} parameters ({shape})")
    click.echo(f"from {checkpoint.source}, tokenizer {checkpoint.tokenizer.name}")
    if checkpoint.dropped_ids:
        click.echo(f"{checkpoint.dropped_ids} rows of the embedding belong to no token and are left out")
    if not done.is_new:
        click.echo("the registry had it already")
    move = f"gptflow promote {model} {done.version} --reason ..."
    is_champion = done.champion == done.version
    click.echo(f"it is the champion of {model}" if is_champion else f"version {done.champion} stays champion; {move}")
    click.echo(_pipeline(done, checkpoint))


def take(root: StateRoot, uri: str, directory: Path, json: bool) -> None:
    """Writes a version as a Hugging Face directory. Raises what `registry.resolve` and `huggingface.export` raise."""
    found = registry.resolve(root, uri)
    loaded = load(root, found)
    card = model_card.for_transformers(_card(root, found, loaded.cfg))
    huggingface.export(loaded.cfg, loaded.model.state_dict(), loaded.tokenizer, directory, card)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if json:
        body = {"uri": registry.uri_of(found), "directory": str(directory.absolute()), "files": sizes}
        click.echo(json_module.dumps(body, indent=1))
    else:
        click.echo(f"{registry.uri_of(found)} -> {directory}: {', '.join(sizes)}; {sum(sizes.values()):,} bytes")


def _card(root: StateRoot, found: ModelVersion, cfg: Mapping[str, Any]) -> str:
    """The version's card; of one from before there were cards, what its lineage can say."""
    path = registry.bundle_path(root, found.name, str(found.version)) / CARD
    if path.exists():
        return path.read_text(encoding="utf-8")
    return model_card.page(found.name, cfg, registry.lineage_of(root, found.name, str(found.version)))


def _pipeline(done: Imported, checkpoint: Checkpoint) -> str:
    """What a pipeline has to say to train it further."""
    cfg = checkpoint.cfg
    shape = {key: cfg[key] for key in SIZES["gpt2"]}
    size = next((name for name, known in SIZES.items() if known == shape), None)
    told = [f"size: {size}"] if size else [f"{key}: {value}" for key, value in shape.items()]
    told += [f"{key}: true" for key in ("qkv_bias", "tied") if cfg.get(key)]
    return (
        "a pipeline trains it further with:\n"
        f"  corpus: {{tokenizer: {checkpoint.tokenizer.name}}}\n"
        f"  model: {{{', '.join(told)}}}\n"
        f"  train: {{start_from: {done.uri}}}"
    )

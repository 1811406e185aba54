"""The commands that exchange models with Hugging Face: `gptflow import` and `gptflow export`.

Each command imports what it needs when it runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.options import FILE, JSON, check_model_name, open_state_root, print_json
from flows.cli.registry import user_name

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from flows.registry.import_ import Imported
    from flows.state.root import StateRoot
    from gptcore.huggingface.import_ import Checkpoint


@click.command("import", short_help="Register a model from elsewhere.")
@click.argument("source")
@click.option("--model", required=True, metavar="NAME", callback=check_model_name, help="Model that gets the version.")
@click.option("--n-heads", type=click.IntRange(1), help="Attention heads. Needed if there is no config.json.")
@FILE
@JSON
def import_model(source: str, model: str, n_heads: int | None, file: str | None, json: bool) -> None:
    """Register a GPT-2 from elsewhere, or an export of ours, as a version of a model.

    SOURCE is a directory in Hugging Face's format, a name on the Hugging Face hub, a .safetensors file or a .pth file.
    Only tensors are read from a .pth file, so it cannot run code. The version becomes the champion if the model has no
    champion yet. The champion is the version that the alias @champion names.

    Example: gptflow import openai-community/gpt2 --model gpt-base
    """
    root = open_state_root(file)
    from gptcore.huggingface.import_ import read_checkpoint

    checkpoint = read_checkpoint(source, n_heads)
    from flows.registry import import_

    imported = import_.register(root, model, checkpoint, by=user_name())
    if json:
        print_json(_describe_import(imported, checkpoint, model))
    else:
        click.echo("\n".join(_import_lines(imported, checkpoint, model)))


@click.command("export", short_help="Write a version in Hugging Face's format.")
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@FILE
@JSON
def export_version(uri: str, directory: Path, file: str | None, json: bool) -> None:
    """Write the version URI into DIRECTORY as a model that `transformers` of Hugging Face loads, with its tokenizer.

    A model of the recipe gpt2 becomes a GPT-2, one of the recipe modern a Qwen3.

    Example: gptflow export models:/gpt-notes@champion hugging-face
    """
    root = open_state_root(file)
    from flows.cards import model_card
    from flows.registry import versions
    from flows.registry.loading import load
    from gptcore.huggingface import export

    version = versions.resolve(root, uri)
    loaded = load(root, version)
    architecture = export.choose_architecture(loaded.cfg)
    card = model_card.adapt_for_transformers(_read_card(root, version, loaded.cfg), architecture.name)
    export.export(loaded.cfg, loaded.model.state_dict(), loaded.tokenizer, directory, card)
    exported = versions.uri_of(version)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if json:
        print_json({"uri": exported, "directory": str(directory.absolute()), "files": sizes})
    else:
        click.echo(f"{exported} -> {directory}: {', '.join(sizes)}; {sum(sizes.values()):,} bytes")


COMMANDS = (import_model, export_version)


def _describe_import(imported: "Imported", checkpoint: "Checkpoint", model: str) -> dict[str, Any]:
    keys = ("weights_sha256", "tokenizer", "parameters", "dropped_ids", "imported_from", "files")
    return {
        "model": model,
        "version": int(imported.version),
        "uri": imported.uri,
        "is_new": imported.is_new,
        "champion": int(imported.champion),
        "cfg": checkpoint.cfg,
        **{key: imported.lineage[key] for key in keys},
    }


def _import_lines(imported: "Imported", checkpoint: "Checkpoint", model: str) -> list[str]:
    shape = ", ".join(f"{key} {value}" for key, value in checkpoint.cfg.items() if key != "drop_rate")
    lines = [
        f"{imported.uri}: {imported.lineage['parameters']:,} parameters ({shape})",
        f"from {checkpoint.source}, tokenizer {checkpoint.tokenizer.name}",
    ]
    if checkpoint.dropped_ids:
        lines.append(f"{checkpoint.dropped_ids} rows of the embedding belong to no token and are left out")
    if not imported.is_new:
        lines.append("the registry already has this version")
    if imported.champion == imported.version:
        lines.append(f"it is the champion of {model}")
    else:
        promotion = f"gptflow promote {model} {imported.version} --reason ..."
        lines.append(f"version {imported.champion} stays champion; to change that: {promotion}")
    return [*lines, *_pipeline_lines(imported, checkpoint)]


def _pipeline_lines(imported: "Imported", checkpoint: "Checkpoint") -> list[str]:
    """Return the keys with which a pipeline trains the imported version further."""
    from gptcore.components import RECIPES
    from gptcore.config import SIZES
    from gptcore.model.gpt import read_components

    cfg = checkpoint.cfg
    components = {key: value for key, value in read_components(cfg).items() if key != "init"}
    recipe = "modern" if components["positions"] == RECIPES["modern"]["positions"] else "gpt2"
    shape = {key: cfg[key] for key in SIZES["gpt2"]}
    size = next((name for name, known in SIZES.items() if known == shape), None)
    keys = [f"size: {size}"] if size else [f"{key}: {value}" for key, value in shape.items()]
    keys += ["recipe: modern"] if recipe == "modern" else []
    keys += ["qkv_bias: true"] if cfg["qkv_bias"] else []
    keys += [f"{key}: {str(value).lower()}" for key, value in components.items() if value != RECIPES[recipe][key]]
    return [
        "to train it further, give a pipeline these keys:",
        f"  corpus: {{tokenizer: {checkpoint.tokenizer.name}}}",
        f"  model: {{{', '.join(keys)}}}",
        f"  train: {{start_from: {imported.uri}}}",
    ]


def _read_card(root: "StateRoot", version: "ModelVersion", cfg: Mapping[str, Any]) -> str:
    """Return the version's model card. A version from before there were cards gets one from its lineage."""
    from flows.cards import model_card
    from flows.registry import versions
    from gptcore.bundle import CARD

    path = versions.fetch_bundle(root, version.name, str(version.version)) / CARD
    if path.exists():
        return path.read_text(encoding="utf-8")
    lineage = versions.read_lineage(root, version)
    return model_card.render_card(version.name, cfg, lineage)

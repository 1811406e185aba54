"""Options that several commands have, and help that lists every key."""

import re

import click


def said(_context: click.Context, _option: click.Parameter, text: str) -> str:
    """A reason, which must not be empty."""
    if not text.strip():
        raise click.BadParameter("say why: it is what people will look for in the log")
    return text.strip()


def named(_context: click.Context, _option: click.Parameter, name: str) -> str:
    """The name of a registered model."""
    from flows.pipelines import NAME

    if not re.fullmatch(NAME, name):
        raise click.BadParameter(f"{name!r} is no name of a model: use letters, digits, '.', '_' and '-', at most 64")
    return name


FILE = click.option("--file", metavar="PATH", help="pipelines.yaml to use. Default: the working directory's.")
REASON = click.option("--reason", required=True, type=click.STRING, callback=said, help="Why. It stays in the log.")
LIMIT = click.option(
    "--limit", default=2, show_default=True, type=click.IntRange(1), help="How many runs share this machine at once."
)
JSON = click.option("--json", is_flag=True, help="Print the result as JSON.")
QUANTIZE = click.option(
    "--quantize", type=click.Choice(["int8"]), help="Round the weights: at least twice as fast on a CPU."
)
SET = click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: train.max_steps=50")


class RunCommand(click.Command):
    """`gptflow run`, whose help lists every key of the configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from flows.pipelines import SECTIONS, Pipeline

        for section in SECTIONS:
            fields = Pipeline.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
            with formatter.section(f"Keys of {section}"):
                formatter.write_dl(
                    [(f"{section}.{key}", f"{field.description} [{field.default}]") for key, field in fields.items()]
                )

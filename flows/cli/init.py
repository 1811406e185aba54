"""The command `gptflow init`: it looks at a text and writes a pipelines.yaml that trains on it."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptcore.errors import ConfigError, CorpusError, GPTCoreError, make_printable

if TYPE_CHECKING:
    from gptcore.config import SizeName
    from gptcore.corpus.survey import Survey

_LEAST_BYTES = 10_000
"""From this size on, no side of the split is empty (split.choose_settings)."""
_BYTES_PER_ENTRY = 500
_BPE_SIZES = (1024, 2048, 4096, 8192)
_TRAIN_SHARE = 0.9
_EPOCHS = 4
_TOKENS_PER_PARAMETER = 20
_STEPS, _LEAST_STEPS, _MOST_STEPS = 400, 200, 5000
_BATCHES = (4, 8, 16, 32)


@click.command("init", short_help="Write a pipelines.yaml for a text.")
@click.argument("path", default=".")
def init(path: str) -> None:
    """Look at the text at PATH, a file or a directory (default: this one), and write pipelines.yaml here.

    The file names the text and chooses tokenizer, model and training by its size. Edit it as you like. It is never
    overwritten.

    Example: gptflow init notes
    """
    from gptcore.corpus.survey import survey

    goal = Path("pipelines.yaml").absolute()
    if goal.exists() or goal.is_symlink():
        raise GPTCoreError(f"{goal} exists already, and is not overwritten. Edit it, or move it away first.")
    source, exclude = _name_source(path)
    found = survey(source, Path.cwd(), exclude)
    if found.num_bytes < _LEAST_BYTES:
        raise CorpusError(
            f"{make_printable(path)} holds {found.num_bytes:,} bytes of text (expected at least {_LEAST_BYTES:,}, for "
            "training, validation and holdout). Give more text."
        )
    name = _name_pipeline(path)
    text = compose(name, source, exclude, found)
    try:
        with goal.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise GPTCoreError(f"{goal} exists already, and is not overwritten.") from None
    for line in filter(None, (*found.reading.describe(), found.reading.describe_secrets())):
        click.echo(line)
    click.echo(f"{goal}: the pipeline {name} learns from {_count(found)}")
    click.echo(f"train it with: gptflow run {name}")


COMMANDS = (init,)


@dataclass(frozen=True)
class Choice:
    """What `choose` has chosen."""

    tokenizer: str
    size: "SizeName"
    batch_size: int
    max_steps: int
    epochs: float


def choose(num_bytes: int, sample: str) -> Choice:
    """Choose tokenizer, size, batch and number of updates for a text of `num_bytes` that begins with `sample`.

    - Tokenizer: a vocabulary of one entry per 500 bytes of text, rounded down to 1024, 2048, 4096 or 8192, or
      fewer if the beginning of the text gives fewer. Below 1024 entries, a token is a byte.
    - Tokens to learn from: 4 epochs of 90 percent of the text. Up to there, a repeated text is worth almost as much as
      a new one (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv:2305.16264).
    - Size: the largest of mini, small and gpt2 that has 20 such tokens for each parameter of its blocks (Hoffmann et
      al. 2022, arXiv:2203.15556), but at least mini. A block of width d has 12 d^2 parameters.
    - Batch: the largest of 4, 8, 16 and 32 windows with which these tokens make 400 updates, but at least 4. Updates:
      these tokens, divided by those of an update, but 200 to 5,000.
    """
    from gptcore.config import SIZES

    tokenizer, bytes_per_token = _choose_tokenizer(num_bytes, sample)
    tokens_per_epoch = _TRAIN_SHARE * num_bytes / bytes_per_token
    tokens = _EPOCHS * tokens_per_epoch
    size: SizeName = "mini"
    larger: tuple[SizeName, ...] = ("small", "gpt2")
    for name in larger:
        if _TOKENS_PER_PARAMETER * 12 * SIZES[name]["n_layers"] * SIZES[name]["emb_dim"] ** 2 <= tokens:
            size = name
    context = SIZES[size]["context_length"]
    batch_size = max((batch for batch in _BATCHES if batch * context * _STEPS <= tokens), default=_BATCHES[0])
    steps = min(max(math.ceil(tokens / (batch_size * context)), _LEAST_STEPS), _MOST_STEPS)
    return Choice(tokenizer, size, batch_size, steps, steps * batch_size * context / tokens_per_epoch)


def _choose_tokenizer(num_bytes: int, sample: str) -> tuple[str, float]:
    """Return the tokenizer, and how many bytes a token has on average."""
    from gptcore.tokens.tokenizer import train_bpe

    half = sample[: len(sample) // 2]  # the train split may hold little more than half of a small text
    for size in reversed(_BPE_SIZES):
        if size * _BYTES_PER_ENTRY <= num_bytes:
            with suppress(CorpusError):  # the text gives fewer entries
                trained, part = train_bpe([half], size), half[:200_000]
                return trained.name, len(part.encode()) / len(trained.encode(part))
    return "bytes", 1.0


def compose(name: str, source: str, exclude: tuple[str, ...], found: "Survey") -> str:
    """Return the text of a pipelines.yaml for what was found at `source`."""
    choice = choose(found.num_bytes, found.sample)
    corpus = [f"sources: [{_quote(source)}]"]
    if exclude:
        corpus.append(f"exclude: [{', '.join(map(_quote, exclude))}]")
    if found.text != "text":
        corpus.append(f"text: {_quote(found.text)}  # of each row of a table: a column, or a template over columns")
    if found.reading.num_bad:
        corpus.append(f"errors: skip  # {found.reading.num_bad:,} files cannot be used; each run names them")
    corpus.append(f"tokenizer: {choice.tokenizer}  # bytes, bpe:N, or gpt2")
    lines = [
        "# Written by `gptflow init`. `gptflow run --help` lists every key.",
        "pipelines:",
        f"  {_quote(name)}:",
        f"    corpus:  # {_count(found)}",
        *(f"      {line}" for line in corpus),
        f"    model: {{size: {choice.size}, recipe: modern}}",
        "    train:",
        f"      max_steps: {choice.max_steps}  # about {choice.epochs:.1f} times through the text",
        f"      batch_size: {choice.batch_size}",
        "      optimizer: muon",
        "      weight_decay: 0.3",
        "      schedule: linear",
        "      grad_clip: 0",
        f"      eval_every: {choice.max_steps // 10}",
        "    # When `gptflow up` or `gptflow serve` retrains it:",
        '    # schedule: {cron: "30 2 * * *", timezone: Europe/Berlin}',
        "    # triggers: [{on: corpus_changed}]",
    ]
    return "\n".join(lines) + "\n"


def _name_source(path: str) -> tuple[str, tuple[str, ...]]:
    """Return the entry of corpus.sources for a path, and what to exclude: the file that is written, if it is inside."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{make_printable(path)!r} is not Unicode text, which pipelines.yaml needs.") from None
    if "://" in path:
        raise ConfigError(f"{path.partition('://')[0]}:// is an address. Download the text, and name its directory.")
    source = f"./{path}" if path == "python-docs" else path
    is_inside = Path.cwd().is_relative_to(Path(path).resolve())
    return source, ("pipelines.yaml",) if is_inside else ()


def _name_pipeline(path: str) -> str:
    """Return a name for the pipeline from the name of the file or directory, as in `My notes.txt` -> `My-notes`."""
    resolved = Path(path).resolve()
    name = resolved.name if resolved.is_dir() else resolved.name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:50].strip("._-") or "text"


def _count(found: "Survey") -> str:
    from gptcore.corpus.reading import count_documents

    return f"{count_documents(found.documents)}, {found.num_bytes / 1000:,.0f} kB of text"


def _quote(text: str) -> str:
    """Return the text in quotation marks, as YAML reads it."""
    return json.dumps(text, ensure_ascii=False)

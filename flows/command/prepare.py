"""Preparing a run directory to be trained by hand, under a job scheduler or in a container."""

import shutil
from pathlib import Path

from flows.attempt import configure
from flows.pipelines import Pipeline
from flows.releases import ancestry
from flows.state import StateRoot
from gptcore import memory
from gptcore.corpus import ingest
from gptcore.data import Tokens, check_sizes, tokenize
from gptcore.errors import ConfigError
from gptcore.learning.rundir import RunDirectory
from gptcore.train import resolve


def prepare(pipeline: Pipeline, root: StateRoot, directory: Path) -> Tokens:
    """Ingests and tokenizes, then makes `directory` a run directory that holds its tokens and can be moved.

    Raises CheckpointError if the directory belongs to another training, ConfigError if it holds something else.
    """
    is_run_directory = (directory / "config.json").exists()
    if directory.is_file() or (directory.is_dir() and not is_run_directory and any(directory.iterdir())):
        raise ConfigError(f"{directory.resolve()} is a file, or holds files and is no run directory; name a new one.")
    asked = pipeline.model_copy(update={"train": resolve(pipeline.train)})
    start = ancestry.start_of(root, asked)
    # There is no flow run here whose tasks the shards could be: local processes work on them.
    snapshot = ingest(asked.corpus, root.corpora, Path.cwd())
    vocabulary = start.tokenizer() if start else None
    tokens = tokenize(snapshot.path, asked.corpus.tokenizer, root.tokens, vocabulary=vocabulary)
    context = asked.model.shape()["context_length"]
    check_sizes(tokens, context, asked.train.stride or context, asked.train.batch_size * asked.train.accumulation)
    memory.check(asked.model, asked.train, tokens.n_vocab)
    configure(RunDirectory(directory), asked, tokens, "tokens", start)
    if not (directory / "tokens").exists():
        shutil.copytree(tokens.path, directory / "tokens")
    return tokens

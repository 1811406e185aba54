"""Preparing a run directory to be trained by hand, under a job scheduler or in a container."""

import shutil
from pathlib import Path

from flows.lineage import run_key
from flows.pipelines import Pipeline
from flows.retrain import run_config
from flows.state import StateRoot
from gptcore.corpus import ingest
from gptcore.data import Tokens, check_sizes, tokenize
from gptcore.rundir import RunDirectory
from gptcore.train import TRAINING_VERSION, resolve


def prepare(pipeline: Pipeline, root: StateRoot, directory: Path) -> Tokens:
    """Ingests and tokenizes, then makes `directory` a run directory that holds its tokens and can be moved.

    Raises CheckpointError if the directory belongs to another training.
    """
    asked = pipeline.model_copy(update={"train": resolve(pipeline.train)})
    snapshot = ingest(asked.corpus, root.corpora, Path.cwd())
    tokens = tokenize(snapshot.path, asked.corpus.tokenizer, root.tokens)
    context = asked.model.shape()["context_length"]
    check_sizes(tokens, context, asked.train.stride or context, asked.train.batch_size * asked.train.accumulation)
    RunDirectory(directory).prepare(run_config(asked, tokens, "tokens", run_key(asked, tokens, TRAINING_VERSION)))
    if not (directory / "tokens").exists():
        shutil.copytree(tokens.path, directory / "tokens")
    return tokens

"""`gptflow prepare`: a run directory for a training by hand, for example under a job scheduler or in a container."""

import shutil
from pathlib import Path

from flows.config.pipelines import Pipeline
from flows.registry import ancestry
from flows.retrain.attempts import configure
from flows.state.root import StateRoot
from gptcore.corpus.ingest import ingest
from gptcore.errors import ConfigError
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.training import memory
from gptcore.training.batches import check_sizes
from gptcore.training.resolve import resolve
from gptcore.training.run_directory import RunDirectory


def prepare(pipeline: Pipeline, root: StateRoot, directory: Path) -> Tokens:
    """Ingest and tokenize the text, then make `directory` a run directory. It contains its tokens, so it can be moved.

    Raises CheckpointError if the directory belongs to another training, ConfigError if it holds something else.
    """
    is_run_directory = (directory / "config.json").exists()
    if directory.is_file() or (directory.is_dir() and not is_run_directory and any(directory.iterdir())):
        raise ConfigError(
            f"{directory.resolve()} is a file, or holds files but is not a run directory. Name a new one."
        )
    pipeline = pipeline.model_copy(update={"train": resolve(pipeline.train)})
    start = ancestry.resolve_start(root, pipeline)
    # Shards are processed by local processes, because there is no flow run here that could have tasks.
    snapshot = ingest(pipeline.corpus, root.corpora, Path.cwd())
    vocabulary = start.load_tokenizer() if start else None
    tokens = tokenize(snapshot.path, pipeline.corpus.tokenizer, root.tokens, vocabulary=vocabulary)
    context, train = pipeline.model.shape()["context_length"], pipeline.train
    check_sizes(tokens, context, train.stride or context, train.batch_size * train.accumulation)
    memory.check(pipeline.model, train, tokens.n_vocab)
    configure(RunDirectory(directory), pipeline, tokens, "tokens", start)
    if not (directory / "tokens").exists():
        shutil.copytree(tokens.path, directory / "tokens")
    return tokens

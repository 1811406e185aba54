"""The tiny model, corpus and pipeline of the tests. A test that needs another shape replaces some of the keys."""

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize

WORDS = (
    "the a model learns from text and writes what comes next while every night new words arrive in many files".split()
)
ODD_WORDS = [*WORDS, "größe", "日本語", "🎈", "e.g.", "x" * 30]

TINY_CFG: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
"""A model of bytes, as the book describes a model."""
TINY_MODEL = {key: TINY_CFG[key] for key in ("context_length", "emb_dim", "n_heads", "n_layers")}
"""The same model as the section `model` of a pipeline."""
TINY_PIPELINE: dict[str, Any] = {
    "corpus": {
        "sources": ["text"],
        "tokenizer": "bytes",
        "block_bytes": 256,
        "val_fraction": 0.15,
        "holdout_fraction": 0.15,
    },
    "model": {**TINY_MODEL, "recipe": "gpt2", "context_length": 32, "emb_dim": 32, "n_layers": 1},
    "train": {
        "max_steps": 60,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "eval_every": 20,
        "threads": 1,
    },
    "sample": {"prompts": ["The model"], "temperatures": [0.0], "max_new_tokens": 20},
}
"""A pipeline that trains in a second. 9000 words of prose give it the 20 holdout blocks that the gate requires."""


def prose(seed: int, num_words: int = 3000, words: Sequence[str] = WORDS) -> str:
    """Return about `num_words` words of made-up English in paragraphs. The same seed gives the same text."""
    draw = random.Random(seed)
    sentences = [
        " ".join(draw.choices(words, k=draw.randint(5, 15))).capitalize() + "." for _ in range(num_words // 10)
    ]
    return "".join(sentence + ("\n\n" if draw.random() < 0.2 else " ") for sentence in sentences)


def odd_prose(seed: int, chars: int) -> str:
    """Return exactly `chars` characters of prose with words of several scripts."""
    return prose(seed, chars + 10, ODD_WORDS)[:chars]


def make_snapshot(root: Path, num_words: int = 870, **changes: Any) -> Snapshot:
    """Write prose, and ingest it below `root`. A fifth of it goes to each of val and holdout."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text(prose(7, num_words))
    settings = {"block_bytes": 256, "val_fraction": 0.2, "holdout_fraction": 0.2, **changes}
    return ingest(CorpusConfig(sources=("text.txt",), **settings), root / "corpora", root)


def make_tokens(root: Path, num_words: int = 870) -> Tokens:
    """Tokenize prose as bytes below `root`. With 870 words, the training text has 3020 tokens."""
    return tokenize(make_snapshot(root, num_words).path, "bytes", root / "tokens")


def write_pipelines(project: Path, watch_seconds: int = 3600, **pipelines: dict[str, Any]) -> None:
    """Write the project's pipelines.yaml. Each pipeline is the tiny one with keys, or keys of a section, replaced."""
    written = {name: {**deepcopy(TINY_PIPELINE), **changes} for name, changes in pipelines.items()}
    for pipeline in written.values():
        for section, keys in deepcopy(TINY_PIPELINE).items():
            pipeline[section] = {**keys, **pipeline[section]}
    text = yaml.safe_dump({"watch_seconds": watch_seconds, "pipelines": written}, sort_keys=False)
    (project / "pipelines.yaml").write_text(text)


def write_project(path: Path, **changes: Any) -> Path:
    """Write a text and a pipelines.yaml with the pipeline `tiny`, with some keys replaced. Return the directory."""
    (path / "text").mkdir()
    (path / "text" / "one.txt").write_text(prose(1, num_words=9000))
    write_pipelines(path, tiny=changes)
    return path

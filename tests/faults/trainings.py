"""Small trainings of several kinds and their outcomes, for tests that compare a training with its twin."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptcore import manifest
from gptcore.config import CorpusConfig, ModelConfig, RunConfig, Start, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.training.resolve import TRAINING_VERSION
from gptcore.training.run_directory import RunDirectory

WORDS = "the old man looked at a grey sea and said that nothing would come of it but wind and rain".split()
MODEL = {"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1, "qkv_bias": True}
TRAIN = {
    "max_steps": 10,
    "batch_size": 6,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_every": 3,
    "eval_batches": 2,
    "checkpoint_seconds": None,
    "checkpoint_steps": 4,
    "keep_checkpoints": 1,
    "device": "cpu",
    "precision": "fp32",
    "compile": False,
    "threads": 1,
}
"""AdamW, dropout, accumulated gradients; saved after 4 and 8 of 10 updates. An epoch ends after update 7."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two epochs": {"max_steps": None, "max_epochs": 2, "checkpoint_steps": 5, "keep_checkpoints": 2},
    "no accumulation": {"checkpoint_steps": 3, "accumulation": 1, "schedule": "linear", "stride": 16},
    "every update": {"checkpoint_steps": 1, "keep_checkpoints": 3, "schedule": "constant", "grad_clip": 0.0},
    # At this rate no evaluation is better than the first.
    "early stopping": {"learning_rate": 1e-30, "eval_every": 2, "patience": 3, "checkpoint_steps": 3},
    "warm start": {"start": True, "warmup_steps": 0},
    "in sessions": {"session_seconds": 1e-9, "max_steps": 4, "checkpoint_steps": None},
    "bf16": {"precision": "bf16", "weight_decay": 0.0},
    "muon": {"optimizer": "muon", "model": {**MODEL, "recipe": "modern"}},
}
"""The differences of each scenario from TRAIN and from MODEL."""

MEASURED = {"tokens_per_second", "seconds", "memory_mb", "time_ms"}


def make_tokens(root: Path, paragraphs: int = 110) -> Tokens:
    """Tokenize made-up English, always the same, as bytes."""
    draw = random.Random(7)
    text = "".join(" ".join(draw.choices(WORDS, k=9)).capitalize() + ".\n\n" for _ in range(paragraphs))
    root.mkdir(parents=True, exist_ok=True)
    (root / "text.txt").write_text(text)
    asked = {"sources": ("text.txt",), "block_bytes": 256, "val_fraction": 0.2, "holdout_fraction": 0.2}
    return tokenize(ingest(CorpusConfig(**asked), root / "corpora", root).path, "bytes", root / "tokens")


def prepare(
    path: Path, tokens: Tokens, start: bool = False, model: dict[str, Any] = MODEL, **train: Any
) -> RunDirectory:
    """Prepare a run directory with TRAIN updated by `train`. With `start`, it starts from another model's weights."""
    run = RunDirectory(path)
    weights = None
    if start:
        torch.manual_seed(5)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = path.with_name("ancestor.safetensors")
        cfg = ModelConfig(**model).build_cfg(tokens.n_vocab)
        save_file(GPTModel(cfg).state_dict(), weights)
    config = RunConfig(
        training_version=TRAINING_VERSION,
        tokens=str(tokens.path),
        tokens_sha256=tokens.sha256,
        model=ModelConfig(**model),
        vocab_size=tokens.n_vocab,
        train=TrainConfig(**{**TRAIN, **train}),
        start=Start(uri="models:/m/1", weights_sha256=manifest.sha256_of_file(weights)) if weights else None,
        run_key="ab" * 32,
    )
    run.prepare(config, weights)
    return run


def updates_of(run: RunDirectory) -> int:
    """Return the number of logged updates. Unlike `read_metrics`, it parses nothing, so it can be called often."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def outcome(run: RunDirectory) -> dict[str, Any]:
    """Return the weights' hash, the result and every metrics line, without measured times and memory."""
    result = run.read_result()
    assert result is not None, f"{run.path} is not finished"
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in run.read_metrics()]
    return {
        "weights": manifest.sha256_of_file(run.weights),
        "result": {**asdict(result), "seconds": None},
        "lines": [json.dumps(line, sort_keys=True) for line in lines],
    }

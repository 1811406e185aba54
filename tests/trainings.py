"""Small trainings of several kinds and their outcomes, for tests that compare a training with its twin."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptcore import manifest
from gptcore.config import ModelConfig, RunConfig, Start, TrainConfig
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.training.resolve import find_training_version
from gptcore.training.run_directory import Result, RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from tests.tiny import TINY_MODEL

MODEL = {**TINY_MODEL, "context_length": 32, "drop_rate": 0.1, "qkv_bias": True}
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


def prepare(
    path: Path, tokens: Tokens, start: bool | Path = False, model: dict[str, Any] = MODEL, **train: Any
) -> RunDirectory:
    """Prepare a run directory with TRAIN updated by `train`. With `start`, it starts from these or from new weights."""
    run = RunDirectory(path)
    weights = start if isinstance(start, Path) else None
    if start is True:
        torch.manual_seed(5)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = path.with_name("ancestor.safetensors")
        cfg = ModelConfig(**model).build_cfg(tokens.n_vocab)
        save_file(GPTModel(cfg).state_dict(), weights)
    asked = TrainConfig(**{**TRAIN, **train})
    config = RunConfig(
        training_version=find_training_version(asked, is_warm_start=weights is not None),
        tokens=str(tokens.path),
        tokens_sha256=tokens.sha256,
        model=ModelConfig(**model),
        vocab_size=tokens.n_vocab,
        train=asked,
        start=Start(uri="models:/m/1", weights_sha256=manifest.sha256_of_file(weights)) if weights else None,
        run_key="ab" * 32,
    )
    run.prepare(config, weights)
    return run


def edit_config(run: RunDirectory, section: str | None, key: str, value: Any) -> None:
    """Change a key in the config.json of a run directory, at the top or in a section."""
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config)[key] = value
    path.write_text(json.dumps(config))


class StopAfter:
    """A stand-in for `Stop`: a request to stop that is made once update `step` is logged."""

    def __init__(self, run: RunDirectory, step: int) -> None:
        self.run, self.step = run, step

    @property
    def reason(self) -> str | None:
        return "the test" if updates_of(self.run) >= self.step else None


def finish(run: RunDirectory) -> Result | None:
    """Train to the end, or to the end of a session. Return the result, or None after a session."""
    return train_directory(run.path, Stop())


def updates_of(run: RunDirectory) -> int:
    """Return the number of logged updates. Unlike `read_metrics`, it parses nothing, so it can be called often."""
    return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0


def outcome(run: RunDirectory) -> dict[str, Any]:
    """Return the result, with the weights' hash, and every metrics line, without measured times and memory."""
    result = run.read_result()
    assert result is not None, f"{run.path} is not finished"
    assert manifest.sha256_of_file(run.weights) == result.weights_sha256
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in run.read_metrics()]
    return {
        "result": {**asdict(result), "seconds": None},
        "lines": [json.dumps(line, sort_keys=True) for line in lines],
    }

"""Where a model comes from: everything that one needs to name, and to train again, a version of the registry."""

import os
import platform
import subprocess
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from flows.pipelines import RUNNING_KEYS, Pipeline
from gptcore import manifest
from gptcore.corpus import Snapshot
from gptcore.data import Tokens
from gptcore.dossier import Scores
from gptcore.rundir import Result, RunDirectory

PACKAGES = ("gptflow", "torch", "numpy", "tiktoken", "rustbpe", "safetensors", "mlflow", "prefect")

# What a run key does not depend on: where text was read from (its content counts), what is only looked at or kept.
_CORPUS_KEYS_OUTSIDE = {"sources"}
_TRAIN_KEYS_OUTSIDE = {"checkpoint_seconds", "checkpoint_steps", "keep_checkpoints", "session_seconds", "start_from"}


def run_key(pipeline: Pipeline, tokens: Tokens, training_version: int) -> str:
    """Names a training: equal keys train equal weights. `pipeline.train` must be resolved (no auto)."""
    return manifest.sha256_of(
        {
            "pipeline": pipeline.name,
            "model_name": pipeline.model_name,
            "tokens": tokens.sha256,
            "corpus": pipeline.corpus.model_dump(mode="json", exclude=_CORPUS_KEYS_OUTSIDE),
            "model": pipeline.model.for_vocabulary(tokens.n_vocab),
            "train": pipeline.train.model_dump(mode="json", exclude=_TRAIN_KEYS_OUTSIDE),
            "training_version": training_version,
        }
    )


def lineage(
    pipeline: Pipeline, snapshot: Snapshot, tokens: Tokens, run: RunDirectory, result: Result, scores: Scores
) -> dict[str, Any]:
    """What a version's lineage.json says, apart from what the flow run adds."""
    reported = scores.reported
    return {
        "pipeline": pipeline.name,
        "weights_sha256": result.weights_sha256,
        "run_key": run.config().run_key,
        "corpus_sha256": snapshot.sha256,
        "corpus": {"documents": snapshot.documents, "blocks": snapshot.blocks, "bytes": snapshot.bytes},
        "split": pipeline.corpus.split,
        "tokenizer": tokens.tokenizer,
        "tokens_sha256": tokens.sha256,
        "config": pipeline.model_dump(mode="json", exclude=set(RUNNING_KEYS)),
        "seed": pipeline.train.seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "holdout_bits_per_byte": reported.bits_per_byte,
        "also_used_for_selection": reported.also_used_for_selection,
        "code_commit": code_commit(),
        "packages": {name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "hardware": {"machine": platform.machine(), "processor": _processor(), "threads": pipeline.train.threads},
    }


def code_commit() -> str:
    """The commit of the checkout that this code runs from, with -dirty if it was edited; else the installed version."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--", ".", "../gptcore")
    except (OSError, subprocess.CalledProcessError):
        return f"gptflow {installed('gptflow')}"
    return f"{commit}-dirty" if dirty else commit


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

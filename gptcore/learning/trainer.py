"""The trainer of a run directory: resume, train, evaluate, save, and commit the best weights.

It is the caller that gptcore.train's generator leaves the decisions to. It holds the directory's lock, so there are
never two writers, and it stops after the current update, with a checkpoint, on SIGTERM, on SIGINT, when the process
that started it is gone, or when its session is over (train.session_seconds). Where several processes train together
(ranks.py), the first one holds the lock and does all that is done once; whatever one of them is told, all do.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from safetensors.torch import save_file

from gptcore import manifest, memory
from gptcore.config import EXECUTION_KEYS, RunConfig, uneven
from gptcore.data import Batches, Tokens, check_sizes, eval_batches, load_tokens
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, RankLost, TrainingDiverged
from gptcore.learning import checkpoint, warmstart
from gptcore.learning.ranks import ALONE, Ranks, is_restarted, joined
from gptcore.learning.rundir import STOPPED, Paused, Result, RunDirectory, result_about
from gptcore.learning.state import TrainState
from gptcore.learning.stop import Stop
from gptcore.train import (
    TRAINING_VERSION,
    MicroBatches,
    Update,
    budget_reached,
    evaluated_loss,
    is_evaluated,
    steps_in_budget,
    training,
)

_LOCK_SECONDS = 60.0
"""How long one of several processes waits for another that held the directory before it and is about to end."""


def train_directory(path: Path, stop: Stop, ranks: Ranks = ALONE) -> Result | None:
    """Trains the run directory to its end and returns the result, or None if it saved and stopped before that.

    It stops when `stop` asks for it, of any rank, or when its session is over, which is left in paused.json. A finished
    directory returns its result at once. Raises ConfigError, CorpusError, CheckpointError, DiskFull or
    TrainingDiverged, the same on all ranks; the reason is left in failure.json too.
    """
    directory = RunDirectory(path)
    config = ranks.all(directory.config)
    patience = _LOCK_SECONDS if ranks.size > 1 or is_restarted(os.environ) else 0.0
    with ExitStack() as held:
        ranks.first(lambda: _enter(directory, held, patience))
        try:
            with manifest.full_disk_named(path):
                result = _finished(directory, ranks)
                if result is None:
                    result = _Training.resumed(directory, config, ranks).run(stop)
        except GPTCoreError as error:
            if ranks.is_first:
                directory.record_failure(error)
            raise
    return result


def _enter(directory: RunDirectory, held: ExitStack, patience: float) -> None:
    """Takes the lock into `held`, and sweeps up behind the attempt before."""
    held.enter_context(directory.lock(patience))
    manifest.sweep(directory.path, older_than_seconds=0)
    directory.forget_ending()


def _finished(directory: RunDirectory, ranks: Ranks) -> Result | None:
    def look() -> dict[str, Any] | None:
        if (result := directory.result()) is None:
            return None
        checkpoint.prune(directory.checkpoints, keep=0)  # of a trainer that was killed before it removed them
        return asdict(result)

    found = ranks.first(look)
    return None if found is None else Result(**found)


@dataclass
class _Training:
    """One process's work on one run directory."""

    directory: RunDirectory
    config: RunConfig
    state: TrainState
    batches: Batches
    evaluated_train: MicroBatches
    evaluated_val: MicroBatches
    began: float
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def resumed(cls, directory: RunDirectory, config: RunConfig, ranks: Ranks) -> "_Training":
        began = time.monotonic()
        train, shape = config.train, config.model.shape()
        if (wrong := uneven(train.batch_size, ranks.size, "processes (WORLD_SIZE)")) is not None:
            raise ConfigError(f"train: {wrong}")
        tokens = ranks.all(lambda: _load_checked_tokens(directory, config))
        torch.set_num_threads(max(1, int(train.threads) // ranks.local_size))
        context, stride = shape["context_length"], train.stride or shape["context_length"]
        check_sizes(tokens, context, stride, train.batch_size * train.accumulation)
        ranks.all(lambda: str(ranks.device(train.device)))  # that each has one, before any waits for another
        state = TrainState.initial(config.cfg(), train, ranks)
        if not checkpoint.restore(directory.checkpoints, state, _identity(config)) and config.start is not None:
            _start(state, directory, config.start.weights_sha256)
        ranks.first(lambda: directory.truncate_metrics(state.step))
        sides = {side: tokens.side(side) for side in ("train", "val")}
        val = eval_batches(sides["val"], context, train.batch_size, train.eval_batches)
        share = (ranks.rank, ranks.size)
        return cls(
            directory=directory,
            config=config,
            state=state,
            batches=Batches(sides["train"], context, stride, train.batch_size, train.accumulation, train.seed, share),
            evaluated_train=eval_batches(sides["train"], context, train.batch_size, len(val)),
            evaluated_val=val,
            began=began,
        )

    @property
    def ranks(self) -> Ranks:
        return self.state.ranks

    def run(self, stop: Stop) -> Result | None:
        with self.directory.metrics.open("a", buffering=1) if self.ranks.is_first else ExitStack() as log:
            for done in self.updates():
                losses = self.evaluated()
                note = partial(self.noted, done, losses, stop, log)
                must_stop, must_pause, must_save = self.ranks.any(note)
                if must_stop:
                    self.save()
                    return None
                if must_pause:
                    self.pause()
                    return None
                if must_save:
                    self.save()
        return self.finish()

    def noted(
        self, done: Update, losses: tuple[float, float] | None, stop: Stop, log: IO[str] | ExitStack
    ) -> tuple[bool, bool, bool]:
        """Logs an update, and says what this rank would do after it: stop, pause, save."""
        if not isinstance(log, ExitStack):
            now = time.time_ns() // 1_000_000
            line = {**asdict(done), "memory_mb": _memory_mb(self.state.device), "time_ms": now}
            if losses is not None:
                line |= dict(zip(("train_loss", "val_loss"), losses))
                print(_progress_line(done, losses), flush=True)
            with manifest.full_disk_named(self.directory.path):
                log.write(json.dumps(line) + "\n")
        return stop.reason is not None, self.must_pause(), self.must_save()

    def updates(self) -> Iterator[Update]:
        train = self.config.train
        if self.config.start is not None:
            train = warmstart.rewarmed(train, self.batches)
        updates = training(self.state, self.batches, train)
        # Asked before the first update too: a training stopped just after its last one has none left to make.
        while not self.out_of_patience() and (done := next(updates, None)) is not None:
            yield done

    def out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.state.stale_evaluations >= patience

    def is_budget_reached(self) -> bool:
        train = self.config.train
        return budget_reached(self.state, train, steps_in_budget(train, self.batches))

    def must_evaluate(self) -> bool:
        return self.is_budget_reached() or is_evaluated(self.state.step, self.config.train.eval_every)

    def evaluated(self) -> tuple[float, float] | None:
        """Train and val loss after an update that is evaluated."""
        if not self.must_evaluate():
            return None
        precision = self.config.train.precision
        losses = [
            evaluated_loss(self.state, batches, precision) for batches in (self.evaluated_train, self.evaluated_val)
        ]
        if not all(map(math.isfinite, losses)):
            raise TrainingDiverged(
                f"the train and val loss after update {self.state.step} are {losses[0]} and {losses[1]}. "
                "Lower train.learning_rate or raise train.warmup_steps.",
                self.state.step,
            )
        self.state.note_evaluation(*losses)
        return self.state.losses

    def must_pause(self) -> bool:
        limit = self.config.train.session_seconds
        is_over = limit is not None and time.monotonic() - self.began >= limit
        return is_over and not self.is_budget_reached() and not self.out_of_patience()

    def pause(self) -> None:
        self.save()
        seconds = round(time.monotonic() - self.began, 3)
        self.ranks.first(lambda: self.directory.record_pause(Paused("session_seconds", self.state.step, seconds)))

    def must_save(self) -> bool:
        train = self.config.train
        by_steps = train.checkpoint_steps is not None and self.state.step % train.checkpoint_steps == 0
        by_time = train.checkpoint_seconds is not None and time.monotonic() - self.saved_at >= train.checkpoint_seconds
        return by_steps or by_time

    def save(self) -> None:
        self.ranks.first(lambda: manifest.flush(self.directory.metrics))
        train = self.config.train
        checkpoint.save(self.directory.checkpoints, self.state, _identity(self.config), train.keep_checkpoints)
        self.saved_at = time.monotonic()

    def finish(self) -> Result:
        """Commits the best weights and the result; the checkpoints have served."""
        return Result(**self.ranks.first(lambda: asdict(self.commit())))

    def commit(self) -> Result:
        best = self.state.best
        assert best is not None, "the last update is always evaluated"
        manifest.flush(self.directory.metrics)
        with manifest.staging(self.directory.path) as staged:
            weights = staged / self.directory.weights.name
            save_file(best.weights, weights)
            result = Result(
                steps=self.state.step,
                tokens_seen=self.state.tokens_seen,
                seconds=round(self.state.seconds, 3),
                stopped_by=self.reason(),
                best_step=best.step,
                best_val_loss=best.val_loss,
                weights_sha256=manifest.sha256_of_file(weights),
            )
            manifest.commit(staged, self.directory.final, result_about(result))
        checkpoint.prune(self.directory.checkpoints, keep=0)
        return result

    def reason(self) -> str:
        train, state = self.config.train, self.state
        spent = {
            "max_steps": state.step,
            "max_epochs": state.step / self.batches.steps_per_epoch,
            "max_tokens": state.tokens_seen,
            "max_seconds": state.seconds,
        }
        limits = {key: limit for key in spent if (limit := getattr(train, key)) is not None}
        return next((key for key, limit in limits.items() if spent[key] >= limit), "patience")


def _start(state: TrainState, directory: RunDirectory, sha256: str) -> None:
    """Gives the model the weights that the training is to start from."""
    read: list[dict[str, torch.Tensor]] = []  # by the first rank

    def look() -> None:
        read.append(warmstart.read_weights(state.model, directory.start, sha256))

    state.ranks.first(look)
    state.spread.load(read[0] if read else {})


def _load_checked_tokens(directory: RunDirectory, config: RunConfig) -> Tokens:
    if config.training_version != TRAINING_VERSION:
        raise CheckpointError(
            f"{directory.path} was prepared for training version {config.training_version}, this release has version "
            f"{TRAINING_VERSION}: prepare another run directory."
        )
    tokens = load_tokens(directory.tokens_path())
    if tokens.sha256 != config.tokens_sha256:
        raise CheckpointError(
            f"{tokens.path} has identity {tokens.sha256}, config.json expects {config.tokens_sha256}. Prepare it again."
        )
    return tokens


def _progress_line(done: Update, losses: tuple[float, float]) -> str:
    return (
        f"update {done.step}: train loss {losses[0]:.4f}, val loss {losses[1]:.4f}, "
        f"{done.tokens_seen:,} tokens at {done.tokens_per_second:,.0f}/s"
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint must agree with: all of the configuration but the keys that do not change the weights."""
    kept = config.train.model_dump(mode="json", exclude={*EXECUTION_KEYS, "start_from"})
    train = {f"train.{key}": value for key, value in kept.items()}
    model = {f"model.{key}": value for key, value in config.cfg().items()}
    start = {"start.weights_sha256": config.start.weights_sha256 if config.start else None}
    return {"training_version": config.training_version, "tokens": config.tokens_sha256, **start, **model, **train}


def _memory_mb(device: torch.device) -> float:
    """Memory in use: the most that was allocated on a CUDA device, else what this process holds now."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def _how_it_stopped(stop: Stop, run_dir: Path) -> str:
    if (paused := RunDirectory(run_dir).paused()) is None:
        return f"stopped ({stop.reason or 'another process of the training was told to'})"
    return f"paused after update {paused.step} (train.{paused.reason}: {paused.seconds:.1f} s)"


def main() -> int:
    """`python -m gptcore.train RUN_DIR`: 0 when the training is finished, 75 when it stopped or paused, and saved.

    Under torchrun it is 0 too where starting again would not help, as torchrun would: the run directory says how it
    ended.
    """
    parser = argparse.ArgumentParser(prog="python -m gptcore.train", description="Train a run directory to its end.")
    parser.add_argument("run_dir", type=Path, help="made by `gptflow prepare PIPELINE RUN_DIR`")
    parser.add_argument(
        "--stop-at-end-of-input", action="store_true", help="save and stop when standard input, a pipe, is closed"
    )
    arguments = parser.parse_args()
    memory.keep_freed()
    is_watched = is_restarted(os.environ)
    stop = Stop().on_signals(is_patient=is_watched)
    if arguments.stop_at_end_of_input:
        stop.on_end_of_input()
    ranks = ALONE
    try:
        with joined() as ranks:
            result = train_directory(arguments.run_dir, stop, ranks)
    except GPTCoreError as error:
        if ranks.is_first or isinstance(error, RankLost):
            print(f"error: {error}", file=sys.stderr)
        return 0 if is_watched and not isinstance(error, RankLost) else error.exit_code
    if ranks.is_first:
        print(_ending(result, stop, arguments.run_dir), flush=True)
    return STOPPED if result is None and not is_watched else 0


def _ending(result: Result | None, stop: Stop, run_dir: Path) -> str:
    if result is None:
        return f"{_how_it_stopped(stop, run_dir)} and saved: the same command goes on"
    return (
        f"finished by {result.stopped_by} after {result.steps} updates; best val loss {result.best_val_loss:.4f} nats "
        f"per token at update {result.best_step}; weights in {run_dir / 'final'}"
    )

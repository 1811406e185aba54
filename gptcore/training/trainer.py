"""The trainer of a run directory: it resumes, trains, evaluates, saves, and commits the best weights.

loop.py makes the updates; this module decides what happens between them. The trainer holds the directory's lock, so
there are never two writers. After the current update it saves a checkpoint and stops if it gets SIGTERM or SIGINT, if
the process that started it is gone, or if its session is over (train.session_seconds). With several ranks
(distributed.py), rank 0 holds the lock and does everything that is done once, and all ranks stop if any rank has to.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from safetensors.torch import save_file

from gptcore import manifest
from gptcore.config import EXECUTION_KEYS, MachineSettings, RunConfig, explain_uneven
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, RankLost, TrainingDiverged
from gptcore.records import open_regular
from gptcore.sections import hashed_keys
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import load_tokens
from gptcore.training import checkpoint, memory, warm_start
from gptcore.training.batches import Batches, BatchPairs, check_sizes, make_eval_batches
from gptcore.training.distributed import ALONE, Ranks, join_ranks
from gptcore.training.loop import evaluate_loss, is_budget_reached, is_evaluation_step, run_updates, steps_in_budget
from gptcore.training.rendezvous import has_restarting_launcher, remove_old_stores
from gptcore.training.resolve import find_training_version, resolve
from gptcore.training.run_directory import STOPPED, Paused, Result, RunDirectory, Update, describe_result
from gptcore.training.signals import Stop
from gptcore.training.state import TrainState

_LOCK_SECONDS = 60.0
"""How long one of several ranks waits for an earlier rank that still holds the directory and is about to end."""


def train_directory(path: Path, stop: Stop, ranks: Ranks = ALONE) -> Result | None:
    """Train the run directory to its end and return the result, or return None if the trainer saved and stopped early.

    It stops early if `stop` of any rank has a reason, or if its session is over; paused.json then says so. A finished
    directory returns its result at once. Raises ConfigError, CorpusError, CheckpointError, DiskFull or
    TrainingDiverged, the same on all ranks, and leaves the reason in failure.json.
    """
    directory = RunDirectory(path)
    config = ranks.run_on_all_ranks(directory.read_config)
    patience = _LOCK_SECONDS if ranks.size > 1 or has_restarting_launcher(os.environ) else 0.0
    with ExitStack() as held:
        ranks.run_on_rank_0(lambda: _enter(directory, held, patience))
        try:
            with manifest.report_full_disk(path):
                result = _read_result(directory, ranks)
                if result is None:
                    result = _Training.resumed(directory, config, ranks).run(stop)
        except GPTCoreError as error:
            if ranks.is_rank_0:
                directory.record_failure(error)
            raise
    return result


def _enter(directory: RunDirectory, held: ExitStack, patience: float) -> None:
    """Take the lock, which `held` releases, and clean up after the previous start."""
    held.enter_context(directory.lock(patience))
    manifest.sweep(directory.path, older_than_seconds=0)
    remove_old_stores(directory.path)
    directory.remove_ending()


def _read_result(directory: RunDirectory, ranks: Ranks) -> Result | None:
    """Read the result of a finished directory, and remove checkpoints that a killed trainer left there."""

    def read() -> dict[str, Any] | None:
        if (result := directory.read_result()) is None:
            return None
        checkpoint.prune(directory.checkpoints, keep=0)
        return asdict(result)

    fields = ranks.run_on_rank_0(read)
    return None if fields is None else Result(**fields)


class _Action(IntEnum):
    """What to do after an update. If ranks disagree, the largest action wins."""

    CONTINUE = 0
    SAVE = 1
    PAUSE = 2
    """Save and end the session, which is over."""
    STOP = 3
    """Save and end, as someone asked."""


@dataclass
class _Training:
    """One rank's work on one run directory."""

    directory: RunDirectory
    config: RunConfig
    """With a value for each `auto` of config.json."""
    state: TrainState
    batches: Batches
    train_eval_batches: BatchPairs
    val_eval_batches: BatchPairs
    began: float
    saved_at: float = field(default_factory=time.monotonic)

    @classmethod
    def resumed(cls, directory: RunDirectory, config: RunConfig, ranks: Ranks) -> "_Training":
        """Load tokens, and the state from the newest checkpoint, from start.safetensors or from scratch."""
        began = time.monotonic()
        config = _choose_settings(directory, config, ranks)
        train, context = config.train, config.model.shape()["context_length"]
        if (problem := explain_uneven(train.batch_size, ranks.size, "processes (WORLD_SIZE)")) is not None:
            raise ConfigError(f"train: {problem}")
        tokens = ranks.run_on_all_ranks(
            lambda: _load_checked_tokens(directory, config, must_verify=ranks.local_rank == 0)
        )
        stride = train.stride or context
        check_sizes(tokens, context, stride, train.batch_size * train.accumulation)
        # A rank without a device fails here, before any rank waits for another.
        ranks.run_on_all_ranks(lambda: str(ranks.choose_device(train.device)))
        state = _restore_state(directory, config, ranks)
        sides = {side: tokens.side(side) for side in ("train", "val")}
        val_eval_batches = make_eval_batches(sides["val"], context, train.batch_size, train.eval_batches)
        return cls(
            directory=directory,
            config=config,
            state=state,
            batches=Batches(
                sides["train"],
                context,
                stride,
                train.batch_size,
                train.accumulation,
                train.seed,
                rank=ranks.rank,
                num_ranks=ranks.size,
            ),
            train_eval_batches=make_eval_batches(sides["train"], context, train.batch_size, len(val_eval_batches)),
            val_eval_batches=val_eval_batches,
            began=began,
        )

    @property
    def ranks(self) -> Ranks:
        return self.state.ranks

    def run(self, stop: Stop) -> Result | None:
        """Train to the end and return the result, or None after a pause or stop."""
        with self.open_log() as log:
            for update in self.updates():
                logged = self.evaluate(update)
                # Logging is in here so that a full disk on rank 0 raises its error on all ranks.
                action = self.ranks.run_and_take_max(partial(self.log_and_choose_action, logged, log, stop))
                if action == _Action.PAUSE:
                    self.pause()
                elif action != _Action.CONTINUE:
                    self.save()
                if action >= _Action.PAUSE:
                    return None
        return self.finish()

    def open_log(self) -> AbstractContextManager[IO[str] | None]:
        """Open metrics.jsonl on rank 0. Other ranks write nothing and get None."""
        if not self.ranks.is_rank_0:
            return nullcontext()
        return open(self.directory.metrics, "a", buffering=1, opener=open_regular)

    def updates(self) -> Iterator[Update]:
        """Update the weights until the budget or the patience is used up. Yield after each update."""
        train = self.config.train
        if self.config.start is not None:
            train = warm_start.add_warm_up(train, self.batches)
        execution = _describe_execution(MachineSettings.of(train), self.ranks)
        updates = run_updates(self.state, self.batches, train)
        # Patience is checked before the first update too: a training stopped after its last update has none left.
        while not self.is_out_of_patience() and (update := next(updates, None)) is not None:
            self.state.record_execution(execution)
            yield update

    def is_out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.state.stale_evaluations >= patience

    def is_budget_reached(self) -> bool:
        train = self.config.train
        return is_budget_reached(self.state, train, steps_in_budget(train, self.batches))

    def evaluate(self, update: Update) -> Update:
        """Return `update` with train and val loss, if an evaluation is due after it."""
        if not self.must_evaluate():
            return update
        precision = self.config.train.precision
        train_loss = evaluate_loss(self.state, self.train_eval_batches, precision)
        val_loss = evaluate_loss(self.state, self.val_eval_batches, precision)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise TrainingDiverged(
                f"the train and val loss after step {self.state.step} are {train_loss} and {val_loss}. "
                "Lower train.learning_rate or raise train.warmup_steps.",
                self.state.step,
            )
        self.state.record_evaluation(val_loss)
        return replace(update, train_loss=train_loss, val_loss=val_loss)

    def must_evaluate(self) -> bool:
        return self.is_budget_reached() or is_evaluation_step(self.state.step, self.config.train.eval_every)

    def log_and_choose_action(self, update: Update, log: IO[str] | None, stop: Stop) -> _Action:
        """Log an update on rank 0, then return what this rank wants to do next."""
        if log is not None:
            self.log_update(update, log)
        should_stop, should_pause, should_save = stop.reason is not None, self.must_pause(), self.must_save()
        if should_stop:
            return _Action.STOP
        if should_pause:
            return _Action.PAUSE
        return _Action.SAVE if should_save else _Action.CONTINUE

    def log_update(self, update: Update, log: IO[str]) -> None:
        """Write a line of metrics.jsonl, and print a line after an evaluation."""
        now = time.time_ns() // 1_000_000
        update = replace(update, memory_mb=_memory_mb(self.state.device), time_ms=now)
        if update.val_loss is not None:
            print(_progress_line(update), flush=True)
        with manifest.report_full_disk(self.directory.path):
            log.write(json.dumps(update.to_line()) + "\n")

    def must_pause(self) -> bool:
        """Whether the session is over. Each rank has its own clock, so the caller combines the ranks."""
        limit = self.config.train.session_seconds
        is_over = limit is not None and time.monotonic() - self.began >= limit
        return is_over and not self.is_budget_reached() and not self.is_out_of_patience()

    def pause(self) -> None:
        """Save, and record the pause on rank 0. All ranks must call this."""
        self.save()
        seconds = round(time.monotonic() - self.began, 3)
        paused = Paused("session_seconds", self.state.step, seconds)
        self.ranks.run_on_rank_0(lambda: self.directory.record_pause(paused))

    def must_save(self) -> bool:
        """Whether a checkpoint is due. Each rank has its own clock, so the caller combines the ranks."""
        train = self.config.train
        by_steps = train.checkpoint_steps is not None and self.state.step % train.checkpoint_steps == 0
        by_time = train.checkpoint_seconds is not None and time.monotonic() - self.saved_at >= train.checkpoint_seconds
        return by_steps or by_time

    def save(self) -> None:
        """Save a checkpoint. All ranks must call this.

        The metrics are flushed first, so that no checkpoint is ahead of them.
        """
        self.ranks.run_on_rank_0(lambda: manifest.flush(self.directory.metrics))
        keep = self.config.train.keep_checkpoints
        checkpoint.save(self.directory.checkpoints, self.state, _identity(self.config), keep)
        self.saved_at = time.monotonic()

    def finish(self) -> Result:
        """Commit the best weights and the result on rank 0. Return the result on all ranks."""
        return Result(**self.ranks.run_on_rank_0(lambda: asdict(self.commit())))

    def commit(self) -> Result:
        """Write final/, then remove the checkpoints."""
        best = self.state.best
        assert best is not None, "the last update is always evaluated"
        manifest.flush(self.directory.metrics)
        with manifest.stage(self.directory.path) as staged:
            weights = staged / self.directory.weights.name
            save_file(best.weights, weights)
            result = Result(
                steps=self.state.step,
                tokens_seen=self.state.tokens_seen,
                seconds=round(self.state.seconds, 3),
                stopped_by=self.name_reached_limit(),
                best_step=best.step,
                best_val_loss=best.val_loss,
                weights_sha256=manifest.sha256_of_file(weights),
                executions=self.state.executions,
            )
            manifest.commit(staged, self.directory.final, describe_result(result))
        checkpoint.prune(self.directory.checkpoints, keep=0)
        return result

    def name_reached_limit(self) -> str:
        """Return the key of `train` that ended the training."""
        train, state = self.config.train, self.state
        used = {
            "max_steps": state.step,
            "max_epochs": state.step / self.batches.steps_per_epoch,
            "max_tokens": state.tokens_seen,
            "max_seconds": state.seconds,
        }
        limits = {key: limit for key in used if (limit := getattr(train, key)) is not None}
        return next((key for key, limit in limits.items() if used[key] >= limit), "patience")


def _choose_settings(directory: RunDirectory, config: RunConfig, ranks: Ranks) -> RunConfig:
    """Return `config` with a value for each `auto`, and set the threads of this rank.

    Rank 0 chooses for all ranks, prints its choice and records it in config.json. Only the number of threads is each
    rank's own.
    """
    requested = config.train
    is_open = [key for key, value in MachineSettings.of(requested) if value == "auto"]
    threads = ranks.count_own_cores() if requested.threads == "auto" else int(requested.threads) // ranks.local_size
    torch.set_num_threads(max(1, threads))
    if not is_open:
        return config

    def choose() -> dict[str, Any]:
        here = {"processes": 1, **({"threads": threads * ranks.local_size} if "threads" in is_open else {})}
        train = resolve(requested.model_copy(update=here), config.precision_so_far)
        memory.check(config.model, train, config.vocab_size)
        chosen = MachineSettings.of(train)
        print(_describe_choice(is_open, config.chosen, chosen), flush=True)
        directory.record_choice(chosen)
        return chosen.model_dump()

    return config.with_train(requested.model_copy(update=ranks.run_on_rank_0(choose)))


def _describe_choice(keys: Sequence[str], before: MachineSettings | None, now: MachineSettings) -> str:
    """Return what a start has chosen for these keys, and what the start before had chosen if that was different."""

    def describe(key: str) -> str:
        value = getattr(now, key)
        return f"{key} {value}" if getattr(before or now, key) == value else f"{key} {getattr(before, key)} -> {value}"

    return f"chosen on this machine: {', '.join(map(describe, keys))}"


def _describe_execution(machine: MachineSettings, ranks: Ranks) -> dict[str, Any]:
    return {**machine.model_dump(), "processes": ranks.size}


def _restore_state(directory: RunDirectory, config: RunConfig, ranks: Ranks) -> TrainState:
    """Make the state, from the newest checkpoint if there is one. Remove the metrics of later updates."""
    state = TrainState.initial(config.cfg(), config.train, ranks)
    if not checkpoint.restore(directory.checkpoints, state, _identity(config)) and config.start is not None:
        _load_start(state, directory, config.start.weights_sha256)
    if state.step and not state.executions:  # an earlier release saved it
        state.record_execution(_describe_execution(config.machine_in_run_key, ranks))
    ranks.run_on_rank_0(lambda: directory.truncate_metrics(state.step))
    return state


def _load_start(state: TrainState, directory: RunDirectory, sha256: str) -> None:
    """Give the model the weights of start.safetensors."""
    weights = state.ranks.run_on_rank_0_only(lambda: warm_start.read_weights(state.model, directory.start, sha256))
    state.parallel.load_weights(weights or {})


def _load_checked_tokens(directory: RunDirectory, config: RunConfig, must_verify: bool) -> Tokens:
    """Open the tokens that config.json names. One rank of each machine verifies the files."""
    version = find_training_version(config.train, is_warm_start=config.start is not None)
    if config.training_version != version:
        raise CheckpointError(
            f"{directory.path} was prepared for training version {config.training_version}, this release has version "
            f"{version} for its settings. Prepare another run directory."
        )
    tokens = load_tokens(directory.tokens_path(), must_verify)
    if tokens.sha256 != config.tokens_sha256:
        raise CheckpointError(
            f"{tokens.path} has identity {tokens.sha256}, config.json expects {config.tokens_sha256}. Prepare it again."
        )
    return tokens


def _progress_line(update: Update) -> str:
    return (
        f"step {update.step}: train loss {update.train_loss:.4f}, val loss {update.val_loss:.4f}, "
        f"{update.tokens_seen:,} tokens at {update.tokens_per_second:,.0f}/s"
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint must agree with: every key that changes the weights, as the run key holds it."""
    hashed = config.train.model_copy(update=dict(config.machine_in_run_key))
    kept = hashed_keys(hashed, {*EXECUTION_KEYS, "start_from"})
    train = {f"train.{key}": value for key, value in kept.items()}
    model = {f"model.{key}": value for key, value in config.cfg().items()}
    start = {"start.weights_sha256": config.start.weights_sha256 if config.start else None}
    return {"training_version": config.training_version, "tokens": config.tokens_sha256, **start, **model, **train}


def _memory_mb(device: torch.device) -> float:
    """Return the memory in use, in MB: the peak allocation of a CUDA device, else this process's resident memory."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def _describe_stop(stop: Stop, run_dir: Path) -> str:
    if (paused := RunDirectory(run_dir).read_pause()) is None:
        return f"stopped ({stop.reason or 'another rank was asked to stop'})"
    return f"paused after step {paused.step} (train.{paused.reason}: {paused.seconds:.1f} s)"


def main() -> int:
    """Run `python -m gptcore.train RUN_DIR`. Return exit code 0 if the training finished, 75 if it saved and stopped.

    Under torchrun, which starts again after any other code, also return 0 if that would not help. The run directory
    then says how the training ended.
    """
    parser = argparse.ArgumentParser(prog="python -m gptcore.train", description="Train a run directory to its end.")
    parser.add_argument("run_dir", type=Path, help="made by `gptflow prepare PIPELINE RUN_DIR`")
    parser.add_argument(
        "--stop-at-end-of-input", action="store_true", help="save and stop when standard input, a pipe, is closed"
    )
    arguments = parser.parse_args()
    memory.keep_freed_memory()
    launcher_restarts = has_restarting_launcher(os.environ)
    stop = Stop().listen_to_signals(ignore_second=launcher_restarts)
    if arguments.stop_at_end_of_input:
        stop.listen_to_end_of_input()
    ranks = ALONE
    try:
        with join_ranks() as ranks:
            result = train_directory(arguments.run_dir, stop, ranks)
    except GPTCoreError as error:
        if ranks.is_rank_0 or isinstance(error, RankLost):
            print(f"error: {error}", file=sys.stderr)
        return 0 if launcher_restarts and not isinstance(error, RankLost) else error.exit_code
    if ranks.is_rank_0:
        print(_describe_ending(result, stop, arguments.run_dir), flush=True)
    return STOPPED if result is None and not launcher_restarts else 0


def _describe_ending(result: Result | None, stop: Stop, run_dir: Path) -> str:
    if result is None:
        return f"{_describe_stop(stop, run_dir)} and saved. Run the same command again to resume."
    return (
        f"finished by {result.stopped_by} after {result.steps} steps; best val loss {result.best_val_loss:.4f} nats "
        f"per token at step {result.best_step}; weights in {run_dir / 'final'}"
    )

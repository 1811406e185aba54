"""The trainer of a run directory: however often it is interrupted, it ends as its never-interrupted twin does."""

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptcore import manifest
from gptcore.config import CorpusConfig, RunConfig
from gptcore.corpus import ingest
from gptcore.data import Batches, load_tokens, tokenize
from gptcore.errors import CheckpointError, ConfigError, CorpusError, GPTCoreError, TrainingDiverged
from gptcore.learning import trainer
from gptcore.learning.rundir import STOPPED, RunDirectory
from gptcore.learning.trainer import Stop, train_directory
from gptcore.train import TRAINING_VERSION

WORDS = (
    "the old man looked at a grey sea and said that nothing would come of it but more wind and a little rain".split()
)
MODEL = {"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
TRAIN = {
    "max_steps": 21,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_batches": 2,
    "checkpoint_steps": 4,
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
}
MEASURED = {"tokens_per_second", "seconds", "memory_mb", "time_ms"}
LONG = {**TRAIN, "max_steps": 400, "checkpoint_steps": None}
"""Long enough that a signal always finds the training unfinished."""


def write_text(path: Path, num_bytes: int) -> None:
    """Made-up English in paragraphs of some sentences, always the same."""
    draw = random.Random(7)
    text = ""
    while len(text) < num_bytes:
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + "." for _ in range(3))
        text += " ".join(sentences) + "\n\n"
    path.write_text(text)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokens")
    write_text(root / "text.txt", 4500)
    asked = {"sources": ("text.txt",), "tokenizer": "bytes", "block_bytes": 256}
    cfg = CorpusConfig(**asked, val_fraction=0.2, holdout_fraction=0.2)
    return tokenize(ingest(cfg, root / "corpora", root).path, "bytes", root / "tokens")


@pytest.fixture
def make(tmp_path, tokens):
    """Makes a run directory of a name with some training keys changed."""

    def prepared(name="run", model=MODEL, **train):
        run = RunDirectory(tmp_path / name)
        run.prepare(
            RunConfig(
                training_version=TRAINING_VERSION,
                tokens=str(tokens.path),
                tokens_sha256=tokens.sha256,
                model=model,
                vocab_size=tokens.n_vocab,
                train={**TRAIN, **train},
                run_key="ab" * 32,
            )
        )
        return run

    return prepared


@pytest.fixture(scope="module")
def steps_per_epoch(tokens):
    return Batches(tokens.side("train"), 32, 32, 4, 2, 123).steps_per_epoch


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved."""


class StopAfter:
    """Asks to stop, or kills, once update `step` is logged."""

    def __init__(self, run: RunDirectory, step: int, kill: bool = False) -> None:
        self.run, self.step, self.kill = run, step, kill

    @property
    def reason(self):
        if self.run.read_metrics()[-1]["step"] < self.step:
            return None
        if self.kill:
            raise Killed
        return "the test"


def finish(run):
    return train_directory(run.path, Stop())


def stop_after(run, step):
    assert train_directory(run.path, StopAfter(run, step)) is None
    assert run.result() is None


def kill_after(run, step):
    with contextlib.suppress(Killed):
        train_directory(run.path, StopAfter(run, step, kill=True))
    assert run.result() is None


def what_came_out(run):
    """Weights, result and metrics, without what was measured in seconds and megabytes."""
    lines = [{key: value for key, value in line.items() if key not in MEASURED} for line in run.read_metrics()]
    result = run.result()
    assert manifest.sha256_of_file(run.weights) == result.weights_sha256
    return lines, {key: value for key, value in vars(result).items() if key != "seconds"}


def checkpoints(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# One training from its beginning to its end.


def test_a_training_leaves_its_best_weights_its_result_and_a_line_per_update(make):
    run = make()
    result = finish(run)
    assert result == run.result() and (result.steps, result.stopped_by) == (21, "max_steps")
    assert result.tokens_seen == 21 * 4 * 2 * 32
    assert manifest.verify(run.final)["kind"] == "final"
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 22))
    evaluated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert list(evaluated) == [1, 5, 9, 13, 17, 21], "the seed's grid, and after the last update"
    assert min(evaluated, key=evaluated.get) == result.best_step
    assert evaluated[result.best_step] == result.best_val_loss < evaluated[1]
    assert run.failure() is None and checkpoints(run) == []


def test_the_last_update_is_evaluated_even_off_the_grid(make):
    run = make(max_steps=7)
    finish(run)
    assert [line["step"] for line in run.read_metrics() if "val_loss" in line] == [1, 5, 7]


def test_a_finished_directory_returns_at_once(make, monkeypatch):
    run = make(max_steps=3)
    result = finish(run)
    before = run.weights.stat(), run.metrics.stat()
    monkeypatch.setattr(trainer, "training", None)
    assert finish(run) == result
    assert (run.weights.stat(), run.metrics.stat()) == before


def test_evaluating_more_often_leaves_the_weights_bit_for_bit(make):
    def weights_after_nine(run):
        stop_after(run, 9)
        return manifest.sha256_of_file(run.checkpoints / "step-00000009" / "model.safetensors")

    assert weights_after_nine(make("often", eval_every=1)) == weights_after_nine(make("seldom", eval_every=5))


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 5}, lambda epoch: 5),
        ({"max_steps": None, "max_epochs": 2}, lambda epoch: 2 * epoch),
        ({"max_steps": None, "max_tokens": 5 * 256 - 1}, lambda epoch: 5),
        ({"max_steps": 99, "max_epochs": 1}, lambda epoch: epoch),
    ],
)
def test_the_budget_that_ran_out_is_named(make, steps_per_epoch, budget, steps):
    result = finish(make(**budget))
    assert result.steps == steps(steps_per_epoch)
    assert result.stopped_by == [key for key, value in budget.items() if value is not None][-1]


def test_a_budget_of_seconds_ends_the_training_with_an_evaluation(make):
    run = make(max_steps=None, max_seconds=0.05, eval_every=1000)
    result = finish(run)
    assert result.stopped_by == "max_seconds" and result.seconds >= 0.05
    assert "val_loss" in run.read_metrics()[-1]


# A learning rate of 1e-30 changes no weight, so that no evaluation is better than the first.
def test_patience_ends_the_training_and_is_named(make):
    result = finish(make(learning_rate=1e-30, eval_every=1, patience=3))
    assert (result.steps, result.best_step, result.stopped_by) == (4, 1, "patience")


def test_a_training_stopped_when_its_patience_is_at_an_end_makes_no_further_update(make):
    twin = make("twin", learning_rate=1e-30, eval_every=1, patience=3)
    finish(twin)
    run = make(learning_rate=1e-30, eval_every=1, patience=3)
    stop_after(run, 4)
    finish(run)
    assert what_came_out(run) == what_came_out(twin)


# Interrupted and run again.


@pytest.fixture(scope="module")
def twin_outcome():
    """Filled by the first test that needs the never-interrupted twin."""
    return []


@pytest.fixture
def twin(make, twin_outcome):
    if not twin_outcome:
        run = make("twin")
        finish(run)
        twin_outcome.append(what_came_out(run))
    return twin_outcome[0]


@pytest.mark.parametrize("interrupt", [stop_after, kill_after])
@pytest.mark.parametrize("where", ["first", "mid-epoch", "epoch border", "after the border", "last"])
def test_an_interrupted_training_ends_as_its_twin_does(make, twin, steps_per_epoch, interrupt, where):
    assert 6 < steps_per_epoch < 20, "the run crosses the border of an epoch"
    border = steps_per_epoch
    step = {"first": 1, "mid-epoch": 6, "epoch border": border, "after the border": border + 1, "last": 21}[where]
    run = make()
    interrupt(run, step)
    finish(run)
    assert what_came_out(run) == twin


def test_a_training_interrupted_after_every_few_updates_ends_as_its_twin_does(make, twin):
    run = make()
    for step in (1, 2, 5, 11, 20):
        stop_after(run, step)
        kill_after(run, step + 1)
    finish(run)
    assert what_came_out(run) == twin


def test_a_kill_before_the_first_checkpoint_starts_over_with_clean_metrics(make, twin):
    run = make()
    kill_after(run, 3)
    assert len(run.read_metrics()) == 3 and not run.checkpoints.exists()
    finish(run)
    assert what_came_out(run) == twin


def test_a_death_while_the_result_is_committed_is_made_good(make, twin, monkeypatch):
    run = make()

    commit = manifest.commit

    def dying(staged, goal, about):
        if goal == run.final:
            raise Killed
        return commit(staged, goal, about)

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "commit", dying)
        with pytest.raises(Killed):
            finish(run)
    assert run.result() is None
    finish(run)
    assert what_came_out(run) == twin


# In sessions.


@pytest.fixture
def clock(monkeypatch):
    """Each look at it takes a second, and it is looked at after every update."""

    class Clock:
        seconds = 0.0

        def monotonic(self):
            self.seconds += 1.0
            return self.seconds

        def __getattr__(self, name):
            return getattr(time, name)

    monkeypatch.setattr(trainer, "time", Clock())


def sessions_until_finished(run):
    """The step after each session."""
    reached = []
    while finish(run) is None:
        assert checkpoints(run)[-1] == f"step-{run.paused().step:08d}"
        reached.append(run.paused().step)
    assert run.paused() is None
    return reached


@pytest.mark.parametrize("seconds", [1, 4, 5])
def test_a_training_in_sessions_ends_as_its_uninterrupted_twin_does(make, twin, steps_per_epoch, clock, seconds):
    run = make(session_seconds=seconds, checkpoint_seconds=None, checkpoint_steps=None)
    reached = sessions_until_finished(run)
    assert reached == list(range(reached[0], 21, reached[0])) and len(reached) >= 3
    assert reached[0] < steps_per_epoch < reached[-1], "some session meets the border of an epoch"
    assert what_came_out(run) == twin


def test_a_session_too_short_for_anything_makes_one_update(make):
    run = make(max_steps=3, session_seconds=1e-9)
    assert sessions_until_finished(run) == [1, 2]
    assert run.result().steps == 3


def test_a_session_that_ends_with_the_training_finishes_it(make):
    run = make(session_seconds=1e-9, learning_rate=1e-30, eval_every=1, patience=1)
    assert sessions_until_finished(run) == [1]
    assert (run.result().steps, run.result().stopped_by) == (2, "patience")


def test_a_signal_is_no_pause(make):
    run = make(session_seconds=1e-9)
    stop_after(run, 1)
    assert run.paused() is None


def test_a_directory_goes_on_in_sessions_of_another_length(make, twin):
    run = make(session_seconds=1e-9)
    assert finish(run) is None
    run = make(session_seconds=3600.0)
    finish(run)
    assert what_came_out(run) == twin


# What is refused.


def test_a_second_trainer_on_the_same_directory_is_refused_with_the_pid_of_the_first(make):
    run = make()
    with run.lock(), pytest.raises(GPTCoreError, match=f"is being trained by process {os.getpid()}"):
        finish(run)
    assert run.failure() is None, "the failure file belongs to the one that holds the lock"


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_twin_still_reached(make, twin):
    run = make()
    stop_after(run, 10)
    assert checkpoints(run) == ["step-00000008", "step-00000010"]
    flip_bit(run.checkpoints / "step-00000010" / "model.safetensors")
    with pytest.warns(UserWarning, match="checkpoint passed over: .*step-00000010"):
        stop_after(run, 11)
    assert checkpoints(run) == ["step-00000008", "step-00000011"]
    finish(run)
    assert what_came_out(run) == twin


def test_a_checkpoint_without_manifest_on_the_way_is_replaced(make, twin):
    run = make()
    stop_after(run, 8)
    (run.checkpoints / "step-00000008" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step-00000008 has no manifest.json"):
        finish(run)
    assert what_came_out(run) == twin


def test_when_every_checkpoint_is_damaged_training_does_not_start_over(make):
    run = make()
    stop_after(run, 10)
    for name in checkpoints(run):
        flip_bit(run.checkpoints / name / "optimizer.safetensors")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match="none of the 2 checkpoints"),
    ):
        finish(run)
    assert isinstance(run.failure(), CheckpointError)
    assert len(run.read_metrics()) == 10, "nothing was dropped"


def edit(run, section, key, value):
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config)[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "learning_rate", 0.02, r"train\.learning_rate is 0\.01 there and 0\.02 here"),
        ("train", "seed", 7, r"train\.seed is 123 there and 7 here"),
        ("model", "n_layers", 3, r"model\.n_layers is 2 there and 3 here"),
        (None, "vocab_size", 300, r"model\.vocab_size is 257 there and 300 here"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_key_and_both_values(make, section, key, value, said):
    run = make()
    stop_after(run, 2)
    edit(run, section, key, value)
    with pytest.raises(CheckpointError, match=said):
        finish(run)
    assert str(run.failure()).startswith(str(run.checkpoints))


def test_how_often_checkpoints_are_saved_may_change_between_attempts(make, twin):
    run = make()
    stop_after(run, 6)
    edit(run, "train", "checkpoint_steps", 5)
    edit(run, "train", "keep_checkpoints", 1)
    finish(run)
    assert what_came_out(run) == twin


def test_other_tokens_than_the_configured_ones_are_refused_with_both_identities(make, tokens):
    run = make()
    edit(run, None, "tokens_sha256", "ef" * 32)
    with pytest.raises(CheckpointError, match=f"has identity {tokens.sha256}, config.json expects {'ef' * 32}"):
        finish(run)


def test_a_directory_of_another_training_version_is_refused_with_both_versions(make):
    run = make()
    edit(run, None, "training_version", 999)
    with pytest.raises(CheckpointError, match=f"version 999, this release has version {TRAINING_VERSION}"):
        finish(run)


def test_a_directory_without_configuration_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(ConfigError, match="gptflow prepare"):
        train_directory(tmp_path, Stop())
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_planted_in_a_checkpoint_is_not_executed(make, tmp_path, twin):
    run = make()
    stop_after(run, 10)
    planted = run.checkpoints / "step-00000010" / "model.safetensors"
    planted.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.warns(UserWarning, match="passed over"):
        finish(run)
    assert not (tmp_path / "executed").exists()
    assert what_came_out(run) == twin


def test_a_corpus_that_is_too_small_is_refused_with_counts_and_the_reason_is_left(make, tokens):
    run = make(batch_size=512)
    count = load_tokens(tokens.path).counts["train"]
    with pytest.raises(CorpusError, match=f"the train split has {count} tokens.*at least {1024 * 32 + 1}"):
        finish(run)
    assert isinstance(run.failure(), CorpusError) and not run.metrics.exists()


def test_a_diverging_training_is_ended_with_the_reason_and_registers_nothing(make):
    run = make(learning_rate=10, warmup_steps=0, grad_clip=0, schedule="constant", model={**MODEL, "n_layers": 1})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "mean_loss", lambda *_: float("nan"))
        with pytest.raises(TrainingDiverged, match="after update 1 are nan and nan"):
            finish(run)
    assert (run.failure().step, run.result()) == (1, None)


def test_the_reason_of_a_failure_is_gone_after_the_next_attempt(make):
    run = make(max_steps=2)
    run.record_failure(GPTCoreError("earlier"))
    finish(run)
    assert run.failure() is None


# Real processes.


@contextlib.contextmanager
def started(run, *options, stdin=subprocess.DEVNULL):
    root = Path(trainer.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gptcore.train", str(run.path), *options]
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()


def wait_for_updates(run, process, count):
    while process.poll() is None and len(run.read_metrics()) < count:
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()


@pytest.fixture(scope="module")
def long_outcome():
    return []


@pytest.fixture
def long_twin(make, long_outcome):
    if not long_outcome:
        run = make("long-twin", **LONG)
        finish(run)
        long_outcome.append(what_came_out(run))
    return long_outcome[0]


def run_to_its_end(run):
    with started(run) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def test_the_program_stops_and_saves_when_the_process_that_started_it_is_gone(make):
    run = make(**LONG)
    with started(run, "--stop-at-end-of-input", stdin=subprocess.PIPE) as process:
        wait_for_updates(run, process, 3)
        output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    assert "stopped (the process that started it is gone) and saved" in output
    assert checkpoints(run) == [f"step-{len(run.read_metrics()):08d}"]


def test_a_program_whose_session_is_over_says_so_and_how_to_go_on(make):
    run = make(**LONG, session_seconds=1e-9)
    with started(run) as process:
        output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    assert "paused after update 1 (train.session_seconds: " in output
    assert output.endswith("and saved: the same command goes on\n")
    assert (run.paused().step, checkpoints(run)) == (1, ["step-00000001"])


def test_the_program_answers_a_wrong_directory_without_a_traceback(make):
    run = make()
    edit(run, "train", "learning_rate", -1)
    with started(run) as process:
        output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: {run.path}/config.json: train.learning_rate: ") and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_told_to_stop_saves_and_its_next_start_ends_as_the_twin(make, long_twin, number):
    run = make(**LONG)
    with started(run) as process:
        wait_for_updates(run, process, 3)
        process.send_signal(number)
        output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    assert f"stopped ({number.name}) and saved" in output
    assert checkpoints(run) == [f"step-{len(run.read_metrics()):08d}"]
    assert "finished by max_steps after 400 updates" in run_to_its_end(run)
    assert what_came_out(run) == long_twin


@pytest.mark.slow
def test_a_program_that_is_killed_again_and_again_ends_as_the_twin(make, long_twin):
    run = make(**{**LONG, "checkpoint_steps": 1})
    reached = 0
    for more in (1, 40, 111):
        with started(run) as process:
            wait_for_updates(run, process, reached + more)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL and run.result() is None
        reached = len(run.read_metrics())
    run_to_its_end(run)
    assert what_came_out(run) == long_twin


@pytest.mark.slow
def test_a_second_program_is_refused_while_the_first_one_trains(make):
    run = make(**LONG)
    with started(run) as first:
        wait_for_updates(run, first, 1)
        first.send_signal(signal.SIGSTOP)
        with started(run) as second:
            output, _ = second.communicate()
        assert (second.returncode, f"by process {first.pid}" in output) == (1, True)

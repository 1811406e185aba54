"""The trainer of a run directory: a training that is stopped and resumed ends like its uninterrupted twin.

Killed trainers are tested in tests/faults.
"""

import json
import platform
import subprocess
import sys
import time

import pytest
import torch

from gptcore import manifest
from gptcore.config import MachineSettings, TrainConfig
from gptcore.errors import CheckpointError, ConfigError, CorpusError, GPTCoreError
from gptcore.processor import choose_precision
from gptcore.tokens.files import load_tokens
from gptcore.training import trainer
from gptcore.training.batches import Batches
from gptcore.training.resolve import TRAINING_VERSION, find_training_version, resolve
from gptcore.training.signals import Stop
from gptcore.training.state import TrainState
from gptcore.training.trainer import train_directory
from tests.fake_gpu import fake_gpu
from tests.trainings import StopAfter, edit_config, finish, outcome, prepare

TRAIN = {"max_steps": 21, "batch_size": 4, "eval_every": 4, "keep_checkpoints": 2}


@pytest.fixture
def make(tmp_path, tokens):
    """A function that makes a run directory with the given name and training keys."""

    def prepared(name="run", **train):
        return prepare(tmp_path / name, tokens, **{**TRAIN, **train})

    return prepared


@pytest.fixture(scope="module")
def steps_per_epoch(tokens):
    return Batches(tokens.side("train"), 32, 32, 4, 2, 123).steps_per_epoch


def stop_after(run, step):
    assert train_directory(run.path, StopAfter(run, step)) is None
    assert run.read_result() is None


def checkpoints(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


# One training from start to end.


def test_a_training_writes_its_best_weights_its_result_and_a_line_per_update(make):
    run = make()
    result = finish(run)
    assert result == run.read_result() and (result.steps, result.stopped_by) == (21, "max_steps")
    assert result.tokens_seen == 21 * 4 * 2 * 32
    assert manifest.verify(run.final)["kind"] == "final"
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 22))
    evaluated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert list(evaluated) == [1, 5, 9, 13, 17, 21], "the evaluation steps of the book, and the last update"
    assert min(evaluated, key=evaluated.get) == result.best_step
    assert evaluated[result.best_step] == result.best_val_loss < evaluated[1]
    assert run.read_failure() is None and checkpoints(run) == []


def test_the_last_update_is_always_evaluated(make):
    run = make(max_steps=7)
    finish(run)
    assert [line["step"] for line in run.read_metrics() if "val_loss" in line] == [1, 5, 7]


def test_training_a_finished_directory_returns_its_result_at_once(make, monkeypatch):
    run = make(max_steps=3)
    result = finish(run)
    before = run.weights.stat(), run.metrics.stat()
    monkeypatch.setattr(trainer, "run_updates", None)
    assert finish(run) == result
    assert (run.weights.stat(), run.metrics.stat()) == before


def test_evaluating_more_often_leaves_the_weights_bitwise_unchanged(make):
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
def test_the_result_names_the_budget_that_ran_out(make, steps_per_epoch, budget, steps):
    result = finish(make(**budget))
    assert result.steps == steps(steps_per_epoch)
    assert result.stopped_by == [key for key, value in budget.items() if value is not None][-1]


def test_a_budget_of_seconds_ends_the_training_with_an_evaluation(make):
    run = make(max_steps=None, max_seconds=0.05, eval_every=1000)
    result = finish(run)
    assert result.stopped_by == "max_seconds" and result.seconds >= 0.05
    assert "val_loss" in run.read_metrics()[-1]


# A learning rate of 1e-30 changes no weight, so no evaluation is better than the first.
def test_patience_ends_the_training_and_the_result_names_it(make):
    result = finish(make(learning_rate=1e-30, eval_every=1, patience=3))
    assert (result.steps, result.best_step, result.stopped_by) == (4, 1, "patience")


def test_a_training_stopped_when_its_patience_has_run_out_makes_no_further_update(make):
    twin = make("twin", learning_rate=1e-30, eval_every=1, patience=3)
    finish(twin)
    run = make(learning_rate=1e-30, eval_every=1, patience=3)
    stop_after(run, 4)
    finish(run)
    assert outcome(run) == outcome(twin)


# Stopped and resumed.


@pytest.fixture(scope="module")
def twin_outcome():
    """A list that the first test that needs the uninterrupted twin fills with the outcome of the twin."""
    return []


@pytest.fixture
def twin(make, twin_outcome):
    if not twin_outcome:
        run = make("twin")
        finish(run)
        twin_outcome.append(outcome(run))
    return twin_outcome[0]


@pytest.mark.parametrize("where", ["first", "mid-epoch", "epoch border", "after the border", "last"])
def test_an_interrupted_training_ends_like_its_uninterrupted_twin(make, twin, steps_per_epoch, where):
    assert 6 < steps_per_epoch < 20, "the run crosses the end of an epoch"
    border = steps_per_epoch
    step = {"first": 1, "mid-epoch": 6, "epoch border": border, "after the border": border + 1, "last": 21}[where]
    run = make()
    stop_after(run, step)
    finish(run)
    assert outcome(run) == twin


def test_a_training_interrupted_every_few_updates_ends_like_its_uninterrupted_twin(make, twin):
    run = make()
    for step in (1, 2, 5, 11, 20):
        stop_after(run, step)
    finish(run)
    assert outcome(run) == twin


# Trained in sessions.


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by one second per reading. The trainer reads the clock after every update."""

    class Clock:
        seconds = 0.0

        def monotonic(self):
            self.seconds += 1.0
            return self.seconds

        def __getattr__(self, name):
            return getattr(time, name)

    monkeypatch.setattr(trainer, "time", Clock())


def sessions_until_finished(run):
    """Train in sessions until the training is finished. Return the step at the end of each session but the last."""
    reached = []
    while finish(run) is None:
        assert checkpoints(run)[-1] == f"step-{run.read_pause().step:08d}"
        reached.append(run.read_pause().step)
    assert run.read_pause() is None
    return reached


@pytest.mark.parametrize("seconds", [1, 4, 5])
def test_a_training_in_sessions_ends_like_its_uninterrupted_twin(make, twin, steps_per_epoch, clock, seconds):
    run = make(session_seconds=seconds, checkpoint_seconds=None, checkpoint_steps=None)
    reached = sessions_until_finished(run)
    assert reached == list(range(reached[0], 21, reached[0])) and len(reached) >= 3
    assert reached[0] < steps_per_epoch < reached[-1], "the sessions cross the end of an epoch"
    assert outcome(run) == twin


def test_even_the_shortest_session_makes_one_update(make):
    run = make(max_steps=3, session_seconds=1e-9)
    assert sessions_until_finished(run) == [1, 2]
    assert run.read_result().steps == 3


def test_if_session_and_training_end_together_the_training_is_finished(make):
    run = make(session_seconds=1e-9, learning_rate=1e-30, eval_every=1, patience=1)
    assert sessions_until_finished(run) == [1]
    assert (run.read_result().steps, run.read_result().stopped_by) == (2, "patience")


def test_a_signal_is_not_recorded_as_a_pause(make):
    run = make(session_seconds=1e-9)
    stop_after(run, 1)
    assert run.read_pause() is None


def test_a_directory_can_resume_in_sessions_of_another_length(make, twin):
    run = make(session_seconds=1e-9)
    assert finish(run) is None
    run = make(session_seconds=3600.0)
    finish(run)
    assert outcome(run) == twin


# Changed, refused and failed.


def test_checkpoint_settings_may_change_between_attempts(make, twin):
    run = make()
    stop_after(run, 6)
    edit_config(run, "train", "checkpoint_steps", 5)
    edit_config(run, "train", "keep_checkpoints", 1)
    finish(run)
    assert outcome(run) == twin


def test_a_training_resumes_with_other_threads_and_the_result_says_so(make, monkeypatch):
    run = make()
    stop_after(run, 6)
    make(threads=2)
    stop_after(run, 9)
    config = run.read_config()
    assert (config.train.threads, config.machine_in_run_key.threads) == (2, 1)
    counters = TrainState.counters
    with monkeypatch.context() as earlier_release:  # it did not record how its updates were computed
        earlier_release.setattr(TrainState, "counters", lambda self: {**counters(self), "executions": []})
        stop_after(run, 12)
    result = finish(make(threads=3))
    assert [execution["threads"] for execution in result.executions] == [1, 3]
    assert result.executions[0] == {
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "threads": 1,
        "processes": 1,
    }
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 22))


def test_each_start_chooses_what_is_auto_prints_it_and_records_it(make, monkeypatch, capsys):
    run = make(device="auto", precision="auto", compile="auto", threads="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    stop_after(run, 6)
    chosen = f"device cpu, precision {choose_precision()}, compile False, threads 2"
    assert f"chosen on this machine: {chosen}\n" in capsys.readouterr().out
    assert run.read_config().chosen.threads == torch.get_num_threads() == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    result = finish(run)
    assert "compile False, threads 2 -> 1\n" in capsys.readouterr().out and torch.get_num_threads() == 1
    config = run.read_config()
    assert (config.chosen.threads, config.train.threads, config.in_run_key) == (1, "auto", None)
    assert [execution["threads"] for execution in result.executions] == [2, 1]
    assert [line["step"] for line in run.read_metrics()] == list(range(1, 22))


def test_a_training_goes_on_without_its_gpu_and_takes_it_again(make, twin):
    run = make(device="auto")
    with fake_gpu():
        stop_after(run, 6)
    stop_after(run, 12)
    assert run.read_config().chosen.device == "cpu"
    with fake_gpu() as gpu:
        result = finish(run)
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    assert [execution["device"] for execution in result.executions] == ["cuda", "cpu", "cuda"]
    losses = [line["loss"] for line in run.read_metrics()]
    assert losses == pytest.approx([json.loads(line)["loss"] for line in twin["lines"]], rel=1e-2)


def test_a_training_that_began_elsewhere_in_bf16_keeps_it_at_auto(make):
    run = make(device="auto", precision="auto")
    elsewhere = MachineSettings(device="cuda", precision="bf16", compile=True, threads=1)
    edit_config(run, None, "chosen", elsewhere.model_dump())
    (execution,) = finish(run).executions
    assert (execution["device"], execution["precision"]) == (str(resolve(TrainConfig()).device), "bf16")


def test_a_directory_of_another_training_version_is_refused_with_both_versions(make):
    run = make()
    edit_config(run, None, "training_version", 999)
    with pytest.raises(CheckpointError, match=f"version 999, this release has version {TRAINING_VERSION} for its"):
        finish(run)


@pytest.mark.parametrize(
    ("given", "is_warm_start", "version"),
    [
        ({}, False, 2),
        ({"schedule": "linear"}, False, 2),
        ({"warmup_steps": 3}, False, 3),
        ({}, True, 3),
        ({"warmup_steps": 3, "schedule": "constant"}, True, 2),
        ({"optimizer": "muon"}, False, 3),
    ],
)
def test_a_training_by_adamw_without_warm_up_keeps_the_version_of_earlier_releases(given, is_warm_start, version):
    assert find_training_version(TrainConfig(**given), is_warm_start) == version


def test_a_directory_without_configuration_is_refused_and_left_unchanged(tmp_path):
    with pytest.raises(ConfigError, match="gptflow prepare"):
        train_directory(tmp_path, Stop())
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_too_small_is_refused_with_counts_and_the_failure_is_recorded(make, tokens):
    run = make(batch_size=512)
    count = load_tokens(tokens.path).counts["train"]
    with pytest.raises(CorpusError, match=f"the train split has {count} tokens.*at least {1024 * 32 + 1}"):
        finish(run)
    assert isinstance(run.read_failure(), CorpusError) and not run.metrics.exists()


def test_tokens_that_were_altered_since_the_checkpoint_are_not_trained_on(make, tokens):
    run = make("altered")
    stop_after(run, 8)
    file = tokens.path / "train.bin"
    intact, logged = file.read_bytes(), run.metrics.read_text()
    try:
        file.write_bytes(intact[:200] + bytes(100) + intact[300:])
        with pytest.raises(CheckpointError, match=r"train\.bin has sha256 .*: it was altered"):
            finish(run)
        assert run.metrics.read_text() == logged and isinstance(run.read_failure(), CheckpointError)
    finally:
        file.write_bytes(intact)
    assert finish(run).steps == 21


def test_the_next_attempt_removes_a_recorded_failure(make):
    run = make(max_steps=2)
    run.record_failure(GPTCoreError("earlier"))
    finish(run)
    assert run.read_failure() is None


KEEPING = """
import sys, numpy, psutil
from gptcore.training import memory
if sys.argv[1] == "keep":
    memory.keep_freed_memory()
buffer = numpy.ones(32_000_000)
before = psutil.Process().memory_info().rss
del buffer
print(before - psutil.Process().memory_info().rss > 100_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is the one that can be told")
def test_keep_freed_memory_keeps_freed_memory_in_the_process():
    gave_back = [
        subprocess.run([sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True).stdout.strip()
        for how in ("keep", "as usual")
    ]
    assert gave_back == ["False", "True"]

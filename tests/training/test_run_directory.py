"""The run directory as other processes see it: its configuration, lock, metrics, and result, failure or pause."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.errors import CheckpointError, ConfigError, CorpusError, GPTCoreError, TrainingDiverged
from gptcore.training import run_directory
from gptcore.training.run_directory import MetricsReader, Paused, Result, RunDirectory, describe_result

CONFIG = {
    "training_version": 1,
    "tokens": "../tokens",
    "tokens_sha256": "ab" * 32,
    "model": {},
    "vocab_size": 257,
    "train": {"device": "cpu", "precision": "fp32", "compile": False, "threads": 1},
    "run_key": "cd" * 32,
}
HOLD = """
import pathlib, sys, time
from gptcore.training.run_directory import RunDirectory
with RunDirectory(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(RunConfig(**CONFIG))
    return directory


def write_lines(run, steps):
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def steps(lines):
    return [line["step"] for line in lines]


def test_a_prepared_directory_returns_its_configuration(run):
    assert run.read_config() == RunConfig(**CONFIG)
    assert run.tokens_path() == (run.path.parent / "tokens").resolve()


def test_preparing_again_for_the_same_training_changes_nothing(run):
    before = (run.path / "config.json").stat()
    run.prepare(RunConfig(**CONFIG))
    assert (run.path / "config.json").stat() == before


SAVED_OTHERWISE = {"session_seconds": 60.0, "checkpoint_seconds": None, "checkpoint_steps": 7, "keep_checkpoints": 5}


def saved_otherwise(**train):
    return RunConfig(**{**CONFIG, "train": {**CONFIG["train"], **SAVED_OTHERWISE, **train}})


def test_preparing_again_updates_only_when_to_save_and_pause(run):
    run.prepare(saved_otherwise(learning_rate=0.5))
    assert run.read_config() == saved_otherwise()


def test_a_directory_that_is_being_trained_is_not_changed(run):
    with run.lock(), pytest.raises(GPTCoreError, match=f"is being trained by process {os.getpid()}"):
        run.prepare(saved_otherwise())
    with run.lock():
        run.prepare(RunConfig(**CONFIG))
    assert run.read_config() == RunConfig(**CONFIG)


def test_preparing_for_another_training_is_refused_with_both_run_keys(run):
    with pytest.raises(CheckpointError, match="belongs to run key cdcdcdcdcdcdcdcd, not efefefefefefefef"):
        run.prepare(RunConfig(**{**CONFIG, "run_key": "ef" * 32}))
    assert run.read_config().run_key == CONFIG["run_key"]


def started_from(path, **start):
    digest = manifest.sha256_of_file(path)
    return RunConfig(**CONFIG, start={"uri": "models:/gpt-a/3", "weights_sha256": digest, **start})


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    return tmp_path / "model.safetensors"


def test_start_weights_are_copied_before_the_configuration_is_written(tmp_path, weights, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "_write_config", None)
        with pytest.raises(TypeError):
            run.prepare(started_from(weights), weights)
    assert run.start.read_bytes() == weights.read_bytes()
    run.prepare(started_from(weights), weights)
    weights.unlink()
    assert manifest.sha256_of_file(run.start) == run.read_config().start.weights_sha256
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "start.safetensors"]


def test_start_weights_with_another_hash_are_refused_with_both_hashes_and_leave_no_files(tmp_path, weights):
    run = RunDirectory(tmp_path / "run")
    config = started_from(weights, weights_sha256="ef" * 32)
    found = manifest.sha256_of_file(weights)
    with pytest.raises(CheckpointError, match=f"has sha256 {found}, the weights of models:/gpt-a/3 have {'ef' * 32}"):
        run.prepare(config, weights)
    assert list(run.path.iterdir()) == []


def test_a_directory_without_configuration_is_refused_with_the_fix(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist: `gptflow prepare"):
        RunDirectory(tmp_path).read_config()


def test_a_configuration_that_is_not_json_is_refused_by_name(run):
    (run.path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        run.read_config()


def test_a_wrong_key_in_the_configuration_is_reported_with_its_file(run):
    (run.path / "config.json").write_text(json.dumps({**CONFIG, "train": {"sed": 1}}))
    with pytest.raises(ConfigError, match=r"config\.json: train\.sed: there is no such key; did you mean seed\?"):
        run.read_config()


def test_only_one_process_holds_the_lock_and_the_error_names_the_holder(run):
    with (
        run.lock(),
        pytest.raises(GPTCoreError, match=f"is being trained by process {os.getpid()}"),
        RunDirectory(run.path).lock(),
    ):
        pass
    with run.lock():
        pass


def test_the_lock_is_released_when_its_holder_is_killed(run):
    root = Path(run_directory.__file__).parents[1]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], cwd=root, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(GPTCoreError, match=f"process {holder.pid}"), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_an_incomplete_line_of_metrics_is_not_read(run):
    write_lines(run, [1, 2])
    with run.metrics.open("a") as file:
        file.write('{"step": 3')
    assert steps(run.read_metrics()) == [1, 2]


def test_a_reader_returns_every_line_once(run):
    reader = MetricsReader(run.metrics)
    assert reader.read_new_lines() == []
    write_lines(run, [1, 2])
    with run.metrics.open("a") as file:
        file.write('{"step"')
    assert steps(reader.read_new_lines()) == [1, 2]
    assert reader.read_new_lines() == []
    with run.metrics.open("a") as file:
        file.write(": 3}\n")
    assert steps(reader.read_new_lines()) == [3]


def test_a_reader_starts_over_when_a_resumed_training_has_replaced_the_file(run):
    reader = MetricsReader(run.metrics)
    write_lines(run, [1, 2, 3])
    reader.read_new_lines()
    run.truncate_metrics(2)
    assert steps(reader.read_new_lines()) == [1, 2]


def test_truncating_drops_later_updates_and_a_half_written_line(run):
    write_lines(run, [1, 2, 3, 4])
    with run.metrics.open("a") as file:
        file.write('{"ste')
    run.truncate_metrics(3)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_truncating_without_metrics_creates_no_file(run):
    run.truncate_metrics(0)
    assert not run.metrics.exists()


def test_a_training_is_finished_when_its_result_is_committed(run):
    assert run.read_result() is None
    result = Result(10, 100, 1.5, "max_steps", 8, 2.5, "ab" * 32)
    with manifest.stage(run.path) as staged:
        (staged / "model.safetensors").write_bytes(b"weights")
        assert run.read_result() is None
        manifest.commit(staged, run.final, describe_result(result))
    assert run.read_result() == result


@pytest.mark.parametrize("error", [CorpusError("too small"), GPTCoreError("x"), TrainingDiverged("nan", 7)])
def test_a_recorded_failure_is_read_as_the_same_error(run, error):
    run.record_failure(error)
    back = run.read_failure()
    assert (type(back), str(back), getattr(back, "step", None)) == (
        type(error),
        str(error),
        getattr(error, "step", None),
    )


def test_a_pause_stays_recorded_until_the_next_attempt_begins(run):
    assert run.read_pause() is None
    run.record_pause(Paused("session_seconds", 12, 3.5))
    assert run.read_pause() == Paused("session_seconds", 12, 3.5)
    run.remove_ending()
    assert run.read_pause() is None


def test_a_removed_failure_is_not_read_again(run):
    run.record_failure(GPTCoreError("x"))
    run.remove_ending()
    run.remove_ending()
    assert run.read_failure() is None

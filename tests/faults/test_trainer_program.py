"""The trainer as its own program, `python -m gptcore.train`: its exit codes and its output."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gptcore.tokens.directory import Tokens
from gptcore.training import trainer
from gptcore.training.run_directory import STOPPED, RunDirectory
from tests.trainings import edit_config, prepare

LONG = {"max_steps": 2000, "checkpoint_steps": None}
"""Long enough that the training does not finish before it is stopped."""


@contextlib.contextmanager
def started(run: RunDirectory, *options: str, stdin: int = subprocess.DEVNULL) -> Iterator["subprocess.Popen[str]"]:
    root = Path(trainer.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gptcore.train", str(run.path), *options]
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()


def test_the_program_stops_and_saves_when_the_process_that_started_it_is_gone(tmp_path: Path, tokens: Tokens) -> None:
    run = prepare(tmp_path / "run", tokens, **LONG)
    with started(run, "--stop-at-end-of-input", stdin=subprocess.PIPE) as process:
        while process.poll() is None and len(run.read_metrics()) < 3:
            time.sleep(0.01)
        output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    assert "stopped (the process that started it is gone) and saved" in output
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{len(run.read_metrics()):08d}"]


def test_a_program_whose_session_is_over_says_so_and_how_to_resume(tmp_path: Path, tokens: Tokens) -> None:
    run = prepare(tmp_path / "run", tokens, **LONG, session_seconds=1e-9)
    with started(run) as process:
        output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    assert "paused after step 1 (train.session_seconds: " in output
    assert output.endswith("and saved. Run the same command again to resume.\n")
    paused = run.read_pause()
    assert paused and paused.step == 1 and (run.checkpoints / "step-00000001").exists()


def test_the_program_refuses_a_wrong_config_without_a_traceback(tmp_path: Path, tokens: Tokens) -> None:
    run = prepare(tmp_path / "run", tokens)
    edit_config(run, "train", "learning_rate", -1)
    with started(run) as process:
        output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: {run.path / 'config.json'}: train.learning_rate: ") and "Traceback" not in output

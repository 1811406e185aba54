"""Odd bytes in the files that gptflow keeps: named or replaced, work goes on where it can, and nothing hangs."""

import json
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import doctor_checks, options
from flows.cli.doctor_checks import CheckTarget
from flows.config.pipelines import Pipeline
from flows.deployments.child_process import Child
from flows.retrain import attempts, hold, last_success, trainer_process, watch
from flows.state import backends, locks, relocate
from flows.state.backends import Backends
from flows.state.root import StateRoot
from flows.state.servers import find_running_servers, read_servers, up_lock
from gptcore import manifest
from gptcore.corpus import http
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError
from gptcore.evaluation import run_report
from gptcore.records import NotAFile
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import MetricsReader, RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from tests.servers import Receiver
from tests.trainings import prepare

DEEP = b"[" * 100_000
ODD = [b"", b"\0" * 4096, b"\xff\xfe{}", DEEP, b'{"a": ' * 100_000, b"null", b"[1, 2]", b'"text"', b"7", b'{"half": ']
ODD += [b'{"prefect": {}, "pid": [], "at": -1, "format": [], "error": 5, "own": {}, "processes": {"x": [-5, 1]}}']


def put_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def put_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mknod(path, 0o600 | stat.S_IFSOCK)


IN_PLACE = pytest.mark.parametrize("put", [put_fifo, put_directory, put_socket])


def read_up(root: StateRoot) -> Any:
    return read_servers(root.path)


def read_lock(root: StateRoot) -> Any:
    with locks.hold(root.path / "locks" / "tiny.lock") as died:
        return died


def read_success(root: StateRoot) -> Any:
    return last_success.read_last(root, "tiny")


def read_memory(root: StateRoot) -> Any:
    found = watch.read_memory(root, "tiny")
    return None if found == watch.Memory() else found


def read_current(root: StateRoot) -> Any:
    return attempts.read_current(root.path / "runs" / "tiny") or None


def read_failure(root: StateRoot) -> Any:
    return RunDirectory(root.path / "runs" / "tiny" / "x-1").read_failure()


def read_pause(root: StateRoot) -> Any:
    return RunDirectory(root.path / "runs" / "tiny" / "x-1").read_pause()


def read_accepted(root: StateRoot) -> Any:
    return hold.read_accepted(root, "tiny")


def read_held(root: StateRoot) -> Any:
    return hold.read_held(root, "tiny")


def read_state(root: StateRoot) -> Any:
    return relocate.read_state(root.path)


def read_backends(root: StateRoot) -> Any:
    return backends.read_backends(root.path)


def read_registered(root: StateRoot) -> Any:
    return watch.read_registered(root)


def read_config(root: StateRoot) -> Any:
    return RunDirectory(root.path / "runs" / "tiny" / "x-1").read_config()


REPLACEABLE: dict[Callable[[StateRoot], Any], str] = {
    read_up: "up.json",
    read_lock: "locks/tiny.lock",
    read_success: "successes/tiny.json",
    read_memory: "watch/tiny.json",
    read_current: "runs/tiny/current.json",
    read_accepted: "runs/tiny/accepted.json",
    read_held: "runs/tiny/held.json",
    read_failure: "runs/tiny/x-1/failure.json",
    read_pause: "runs/tiny/x-1/paused.json",
}
"""Records without which work can go on. A damaged one counts as missing, and the next one replaces it."""
NAMED: dict[Callable[[StateRoot], Any], str] = {
    read_state: "state.json",
    read_backends: "backends.json",
    read_registered: "watch/.watched.json",
    read_config: "runs/tiny/x-1/config.json",
}
"""Records without which it is unknown what to do. A damaged one is an error with the fix."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateRoot:
    for name in ("GPTFLOW_DATABASE", "GPTFLOW_ARTIFACTS", "MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI"):
        monkeypatch.delenv(name, raising=False)
    root = StateRoot(tmp_path / "mlruns").prepare()
    for name in (*REPLACEABLE.values(), *NAMED.values()):
        (root.path / name).parent.mkdir(parents=True, exist_ok=True)
    return root


@pytest.mark.parametrize("read", REPLACEABLE, ids=lambda read: read.__name__)
def test_a_damaged_record_counts_as_missing(home: StateRoot, read: Callable[[StateRoot], Any]) -> None:
    for odd in ODD:
        (home.path / REPLACEABLE[read]).write_bytes(odd)
        assert read(home) is None, odd[:40]


@pytest.mark.parametrize("read", NAMED, ids=lambda read: read.__name__)
def test_a_damaged_record_that_nothing_can_replace_is_named_with_its_fix(
    home: StateRoot, read: Callable[[StateRoot], Any]
) -> None:
    path = home.path / NAMED[read]
    for odd in ODD:
        path.write_bytes(odd)
        with pytest.raises(GPTCoreError, match=path.name.replace(".", r"\.")):
            read(home)


@IN_PLACE
@pytest.mark.parametrize("read", {**REPLACEABLE, **NAMED}, ids=lambda read: read.__name__)
def test_a_pipe_or_a_directory_in_place_of_a_file_is_named_and_never_awaited(
    home: StateRoot, read: Callable[[StateRoot], Any], put: Callable[[Path], None]
) -> None:
    path = home.path / {**REPLACEABLE, **NAMED}[read]
    put(path)
    with pytest.raises(NotAFile, match=rf"{path} is not a regular file.*Move it away"):
        read(home)


@IN_PLACE
def test_a_pipe_or_a_directory_in_place_of_a_lock_is_named(home: StateRoot, put: Callable[[Path], None]) -> None:
    put(up_lock(home.path))
    with pytest.raises(NotAFile, match=r"up\.lock"):
        find_running_servers(home.path)
    put(home.path / "mlflow.lock")
    (home.path / "state.json").unlink()
    with pytest.raises(NotAFile, match=r"mlflow\.lock"):
        home.prepare()


def test_damaged_addresses_are_never_taken_for_local_files_and_the_given_ones_replace_them(
    home: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home.path / "backends.json").write_bytes(b"\0" * 80)
    with pytest.raises(ConfigError, match="GPTFLOW_DATABASE and GPTFLOW_ARTIFACTS"):
        home.prepare()
    monkeypatch.setenv("GPTFLOW_DATABASE", "local")
    monkeypatch.setenv("GPTFLOW_ARTIFACTS", "local")
    backends.save_backends(home.path, home.prepare().backends)
    monkeypatch.delenv("GPTFLOW_DATABASE")
    monkeypatch.delenv("GPTFLOW_ARTIFACTS")
    assert home.prepare().backends == Backends()


def test_doctor_survives_a_record_of_servers_with_odd_addresses(home: StateRoot, tmp_path: Path) -> None:
    for url in ("", "\0", "nowhere", "http://[", "file:///etc/passwd", "http://127.0.0.1:99999"):
        (home.path / "up.json").write_text(json.dumps({"prefect": url, "mlflow": url}))
        with locks.hold(up_lock(home.path)):
            assert find_running_servers(home.path) is None
            checks = doctor_checks.check_servers(CheckTarget(tmp_path / "pipelines.yaml", home))
            assert not all(check.ok for check in checks)


def write_lines(path: Path, count: int, tail: bytes) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() + b"\n" for step in range(1, count + 1)]
    path.write_bytes(b"".join(lines) + tail)


TAILS = [*(odd + b"\n" for odd in ODD if odd), b"\n", b'{"step": "5"}\n', b'{"step": 5', b"\0" * 100]


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
def test_a_resumed_training_replaces_a_damaged_end_of_its_metrics(tmp_path: Path, tail: bytes) -> None:
    run = RunDirectory(tmp_path)
    write_lines(run.metrics, 4, tail)
    reader = MetricsReader(run.metrics)
    assert [line["step"] for line in reader.read_new_lines()] == [1, 2, 3, 4]
    assert reader.read_new_lines() == []
    if tail.endswith(b"\n"):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged at byte 100\. Restore"):
            run.read_metrics()
        with pytest.raises(CheckpointError, match="before the line of step 5"):
            run.truncate_metrics(5)
    run.truncate_metrics(4)
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n')
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in reader.read_new_lines()] == [1, 2, 3, 4, 5], "a follower reads the new file"


@IN_PLACE
def test_a_pipe_or_a_directory_in_place_of_the_metrics_is_named(tmp_path: Path, put: Callable[[Path], None]) -> None:
    run = RunDirectory(tmp_path)
    put(run.metrics)
    for read in (run.read_metrics, lambda: run.truncate_metrics(3)):
        with pytest.raises(NotAFile, match=r"metrics\.jsonl"):
            read()


@IN_PLACE
def test_a_pipe_or_a_directory_in_place_of_a_log_is_named_or_loses_its_lines(
    tmp_path: Path, tokens: Tokens, put: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(tmp_path / "run", tokens, max_steps=1)
    put(run.metrics)
    with pytest.raises(NotAFile, match=r"metrics\.jsonl"):
        train_directory(run.path, Stop())
    put(run.path / "trainer.log")
    with pytest.raises(NotAFile, match=r"trainer\.log"):
        trainer_process.train(run, print)
    child = Child("prefect", (sys.executable, "-c", ""), tmp_path / "prefect.log", {}, Child.is_alive)
    put(child.log)
    for open_log in (child.start, child.read_log):
        with pytest.raises(NotAFile, match=r"prefect\.log"):
            open_log()
    put(tmp_path / "libraries.log")
    monkeypatch.setattr("logging.raiseExceptions", False)
    options._LibraryLog(tmp_path / "libraries.log", delay=True).emit(logging.makeLogRecord({}))


@IN_PLACE
def test_a_pipe_or_a_directory_in_place_of_the_lock_of_a_download_is_named(
    tmp_path: Path, receiver: Receiver, put: Callable[[Path], None]
) -> None:
    http.download(receiver.url, None, tmp_path)
    (lock,) = tmp_path.glob("*/lock")
    put(lock)
    with pytest.raises(NotAFile, match="lock"):
        http.download(receiver.url, None, tmp_path)


def test_a_damaged_evaluation_is_made_again(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "samples.json").write_text("[]")

    run = RunDirectory(tmp_path)
    made = run_report._publish(run, "samples", {"sample": 1}, fill)
    for odd in (b"\0\0", DEEP, b'{"a": 1}', b"[7]", b"5"):
        (made / "samples.json").write_bytes(odd)
        with pytest.raises(CheckpointError, match=r"samples\.json is damaged: .*replaces samples-"):
            run_report.read_samples(made)
        assert run_report._publish(run, "samples", {"sample": 1}, fill) == made
        assert run_report.read_samples(made) == []
    for put in (put_fifo, put_directory):
        put(made / "samples.json")
        with pytest.raises(CheckpointError, match=r"samples\.json"):
            run_report.read_samples(made)
        run_report._publish(run, "samples", {"sample": 1}, fill)
    (made / manifest.MANIFEST).write_text('{"format": 8, "files": {}, "about": {}}')
    with pytest.raises(CheckpointError, match="newer release"):
        run_report._publish(run, "samples", {"sample": 1}, fill)
    shutil.rmtree(made)


def test_a_pipeline_that_was_registered_is_read_as_it_was(home: StateRoot, tiny: Pipeline) -> None:
    watched = tiny.model_copy(update={"name": "watched"})
    (home.path / "watch" / ".watched.json").write_text(
        json.dumps([watched.model_dump(mode="json", include=watch._REGISTERED)])
    )
    assert [pipeline.corpus for pipeline in watch.read_registered(home)] == [tiny.corpus]

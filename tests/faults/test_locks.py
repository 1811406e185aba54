"""Two processes and one lock: skip or wait, the lock holder, and the lock after a kill."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.config.pipelines import SECTIONS, Pipeline
from flows.notifications.verdicts import read_verdict
from flows.state import lock_holder, locks
from flows.state.root import StateRoot

HOLD = "import sys; from pathlib import Path; from flows.state.locks import hold\n"
HOLD += "with hold(Path(sys.argv[1]), 'run-1'): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock `x.lock` until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "x.lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_error_of_a_second_process_names_the_lock_holder_and_since_when_it_holds_the_lock(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    said = rf"another run holds the lock \(pid {other.pid}, since 20..-"
    with pytest.raises(lock_holder.LockHeld, match=said) as held, locks.hold(tmp_path / "x.lock"):
        pass
    assert held.value.holder is not None and held.value.holder.flow_run == "run-1"
    assert locks.find_holder(tmp_path / "x.lock") == held.value.holder
    with locks.hold(tmp_path / "y.lock"):
        pass


def test_a_lock_that_no_run_has_signed_is_waited_for_instead_of_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, has_waited = tmp_path / "x.lock", threading.Event()
    path.touch()
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr("time.sleep", lambda _: has_waited.set())

    def hold() -> bool:
        with locks.hold(path):
            return True

    with ThreadPoolExecutor(1) as thread:
        with locks.try_lock(path) as is_free:  # as `prune` takes it
            held = thread.submit(hold)
            assert is_free and has_waited.wait(60) and not held.done()
        assert held.result()


def test_a_waiting_process_gets_the_lock_when_it_is_free(other: "subprocess.Popen[str]", tmp_path: Path) -> None:
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {other.pid}"])
    began = time.monotonic()
    with locks.hold(tmp_path / "x.lock", overlap="wait"):
        assert time.monotonic() - began > 0.3
    killer.wait()


def test_a_kill_frees_the_lock_and_children_of_the_holder_do_not_keep_it(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    other.kill()
    other.wait()
    path = tmp_path / "x.lock"
    assert locks.find_holder(path) is None
    with locks.hold(path):
        child = subprocess.Popen(["sleep", "30"])
        assert locks.find_holder(path) is not None and locks.find_holder(path).pid == os.getpid()
    try:
        assert locks.find_holder(path) is None
    finally:
        child.kill()
        child.wait()


def test_a_new_lock_holder_learns_of_the_previous_one_only_if_it_died_with_the_lock(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    path = tmp_path / "x.lock"
    other.kill()
    other.wait()
    with locks.hold(path, "run-2") as died:
        assert died is not None and (died.pid, died.flow_run) == (other.pid, "run-1")
    with contextlib.suppress(RuntimeError), locks.hold(path, "run-3") as died:
        assert died is None, "run-2 released it"
        raise RuntimeError
    with locks.hold(path, "run-4") as died:
        assert died is None, "run-3 failed, but released it"


def test_a_short_check_of_the_lock_is_not_mistaken_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    look = "import sys, time; from pathlib import Path; from flows.state.locks import try_lock\n"
    look += "with try_lock(Path(sys.argv[1])) as free: print(free, flush=True); time.sleep(0.4)"
    with subprocess.Popen([sys.executable, "-c", look, str(path)], stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout is not None and looking.stdout.readline() == "True\n"
        with locks.hold(path):
            pass


@pytest.mark.usefixtures("prefect_server")
def test_a_run_is_skipped_while_another_one_holds_the_lock_of_the_pipeline(tiny: Pipeline, root: StateRoot) -> None:
    from flows.retrain.flow import retrain

    sections = {name: getattr(tiny, name) for name in SECTIONS}
    path = root.lock_path("tiny")
    path.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holding:
        assert holding.stdout is not None and holding.stdout.readline() == "held\n"
        state = retrain("tiny", tiny.model_name, **sections, return_state=True)
    assert state.is_completed() and read_verdict(state) == "skipped"
    assert f"pid {holding.pid}, since" in state.message and state.result().verdict == "skipped"
    assert not list(root.corpora.glob("*"))

"""The pool of child processes: what it promises to all who use it. See tests/corpus/test_shards.py for deaths."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from gptcore import processes
from gptcore.processes import WorkerDied, start_pool


def test_results_are_in_the_order_of_the_arguments_and_at_most_two_calls_per_process_are_under_way() -> None:
    taken: list[int] = []
    with start_pool(1, with_this_process=True) as pool:
        results = pool.map(abs, (taken.append(number) or -number for number in range(20)))
        assert next(results) == 0 and len(taken) == 4
        assert list(results) == list(range(1, 20))


def test_an_error_in_a_child_is_raised_here_even_if_its_function_cannot_be_imported_there() -> None:
    with start_pool(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(eval, "1 / 0").result()
        sys.modules["only_here"] = only_here = type(sys)("only_here")
        exec("def function(argument): return argument", vars(only_here))
        with pytest.raises(ModuleNotFoundError, match="only_here"):
            pool.submit(only_here.function, 1).result()
        del sys.modules["only_here"]
        assert pool.submit(abs, -3).result() == 3


def test_busy_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "from gptcore.processes import WorkerDied, start_pool\n"
        "with start_pool(2) as pool:\n"
        "    pool.submit(exec, 'import os, time; os.write(2, b\"busy\\\\n\"); time.sleep(600)').result()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[1])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None and running.stderr.readline() == b"busy\n"
        children = psutil.Process(running.pid).children()
        running.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert len(children) == 2 and all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


def test_an_error_in_the_block_ends_children_and_threads() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), start_pool(2) as pool:
        pool.submit(eval, "__import__('time').sleep(600)")
        raise KeyboardInterrupt
    assert set(psutil.Process().children()) <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_a_child_that_is_replaced_while_the_pool_ends_is_killed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with start_pool(1) as pool:
        child = pool._idle.get()
        assert child is not None
        close = child._close_pipes

        def close_while_another_thread_kills() -> None:
            close()
            monkeypatch.undo()
            child.kill()

        monkeypatch.setattr(child, "_close_pipes", close_while_another_thread_kills)
        with pytest.raises(WorkerDied, match="the work was stopped"):
            child.call(os._exit, 3)
        assert child._process.returncode == -signal.SIGKILL

"""Records how every Python process of a run of the tests spends its time. See bench/suite.py.

Python imports a module of this name at its start. Each event is one line that is appended at once to the file that
SUITE_TRACE names, so the events of a killed process are recorded up to the kill.
"""

import atexit
import importlib.util
import json
import os
import resource
import sys
import time
from types import ModuleType
from typing import Any

FILE = os.environ.get("SUITE_TRACE", "")
WATCHED = {
    *("torch", "mlflow", "prefect", "prefect.server.api.server", "alembic.command", "pandas", "pyarrow", "matplotlib"),
    *("sqlalchemy", "fastapi", "transformers", "distributed", "ray", "kubernetes_asyncio", "moto", "playwright"),
}
_slept = 0.0
_being_found: set[str] = set()
_within: list[list[float]] = []
"""Wall and processor seconds of the imports inside each unfinished import."""


def tell(kind: str, **values: Any) -> None:
    """Append one event."""
    line = json.dumps({"kind": kind, "pid": os.getpid(), **values}) + "\n"
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, line.encode())
    os.close(file)


class Watcher:
    """Finds the watched modules, and times their execution without that of other watched modules inside them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED or name in _being_found:
            return None
        _being_found.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _being_found.discard(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                begin, inner = (time.monotonic(), time.process_time()), [0.0, 0.0]
                _within.append(inner)
                try:
                    execute(module)
                finally:
                    _within.pop()
                    took = [time.monotonic() - begin[0], time.process_time() - begin[1]]
                    for number, outer in enumerate(_within[-1:] * 2):
                        outer[number] += took[number]
                    tell("import", name=name, wall=took[0] - inner[0], cpu=took[1] - inner[1])
                    if name == "alembic.command":
                        _time_migrations(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _time_migrations(module: Any) -> None:
    upgrade = module.upgrade

    def timed(*arguments: Any, **keywords: Any) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        try:
            return upgrade(*arguments, **keywords)
        finally:
            tell("migration", wall=time.monotonic() - wall, cpu=time.process_time() - cpu)

    module.upgrade = timed


def _time_sleep() -> None:
    sleep = time.sleep

    def slept(seconds: float) -> None:
        global _slept
        begin = time.monotonic()
        sleep(seconds)
        _slept += time.monotonic() - begin

    time.sleep = slept


def _end_at_once(code: int, _exit: Any = os._exit) -> None:
    _end()
    _exit(code)


def _end() -> None:
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = [usage.ru_utime + usage.ru_stime for usage in (own, below)]
    tell("end", cpu=processors[0], children=processors[1], slept=_slept)


if FILE:
    tell("start", command=sys.orig_argv[1:])
    _time_sleep()
    sys.meta_path.insert(0, Watcher)  # type: ignore[arg-type]
    atexit.register(_end)
    os._exit = _end_at_once  # type: ignore[assignment]
    os.register_at_fork(after_in_child=lambda: tell("fork"))

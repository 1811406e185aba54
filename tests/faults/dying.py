"""Run a trainer in a forked process, and kill or disturb it at a named point.

The child runs the real `gptcore.training.trainer.main()`. `Points` sees each of its file operations under a name such
as `save of update 8 before rename to checkpoints/step-00000008`. An audit hook sees what Python opens, renames and
removes. Wrappers see what the hook cannot see: fsync, safetensors, and text that is written in one call. At the
requested points the child sends itself a signal such as SIGKILL, or its disk is full. The product has no code for this.

Children are forked from a process that has imported everything and computed nothing. So a child starts in a fraction
of a second, and no kill can fall into imports.
"""

import errno
import json
import math
import mmap
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gptcore.training import checkpoint, trainer
from gptcore.training.run_directory import RunDirectory

_BOARD_BYTES = 256
WRITING = os.O_WRONLY | os.O_RDWR
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "torch._dynamo"])  # which torch imports with the first optimizer


class Points:
    """The points that this process passes, and what happens at one of them."""

    def __init__(self, root: Path, fates: Mapping[str, str], board: Path) -> None:
        """Open `board`, a file that shows the newest point to other processes, even after this one has died."""
        self.root, self.fates = root.resolve(), dict(fates)
        self.phase = "start"
        self.is_over = False
        self.passed: list[str] = []
        self.times: Counter[str] = Counter()
        self.lock = threading.Lock()
        board.write_bytes(bytes(_BOARD_BYTES))
        with board.open("r+b") as file:
            self.board = mmap.mmap(file.fileno(), _BOARD_BYTES)

    def reach(self, what: str) -> Callable[[], None] | None:
        """Record the point, and return its fate, or None if it has no fate."""
        with self.lock:
            if self.is_over:
                return None
            name = f"{self.phase} {what}"
            self.times[name] += 1
            if self.times[name] > 1:
                name += f" ({self.times[name]})"
            self.passed.append(name)
            self.board[:] = name.encode()[:_BOARD_BYTES].ljust(_BOARD_BYTES, b"\0")
            fate = FATES.get(self.fates.get(name, ""))
            self.is_over = fate is die
            return fate

    def before(self, what: str) -> None:
        """Record that the operation `what` comes next, and apply the fate of that point."""
        if fate := self.reach(f"before {what}"):
            fate()

    def short(self, path: Any) -> str:
        """Return a path relative to the run directory, without what is random in temporary names."""
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        text = text.removeprefix(f"{self.root}/").replace(str(self.root), "the run directory")
        text = re.sub(rf"(\.tmp-.*)-{os.getpid()}$", r"\1-*", text)
        return re.sub(r"\.tmp-[a-z0-9_]{8}(?![^/])", ".tmp-*", text)

    def is_inside(self, path: Any) -> bool:
        """Whether a path, or a bare name from rmtree, belongs to the run directory."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        return text == str(self.root) or text.startswith(f"{self.root}/") or "/" not in text

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record the point of a file operation that Python is about to run."""
        if event == "open":
            path, _, flags = arguments
            if flags & WRITING and self.is_inside(path):
                self.before(f"open of {self.short(path)}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
            if self.is_inside(arguments[0]):
                self.before(f"{event.removeprefix('os.')} of {self.short(arguments[0])}")
        elif event == "os.rename":
            self.before(f"rename to {self.short(arguments[1])}")

    def install(self) -> None:
        """Install the audit hook and the wrappers in this process."""
        sys.addaudithook(self.audit)
        self._operations()
        self._phases()

    def _operations(self) -> None:
        fsync, write_text = os.fsync, Path.write_text

        def syncing(descriptor: int) -> None:
            self.before(f"fsync of {self.short(Path(f'/proc/self/fd/{descriptor}').readlink())}")
            fsync(descriptor)

        def writing_text(path: Path, text: str) -> int:
            if fate := self.reach(f"half-way through writing {path.name}"):
                write_text(path, text[: len(text) // 2])
                fate()
            return write_text(path, text)

        os.fsync, Path.write_text = syncing, writing_text  # type: ignore[assignment]
        for module in (checkpoint, trainer):
            module.save_file = self._saving(module.save_file)

    def _saving(self, save_file: Callable[..., None]) -> Callable[..., None]:
        def saving(tensors: dict[str, Any], path: Path) -> None:
            self.before(f"writing {path.name}")
            if fate := self.reach(f"half-way through writing {path.name}"):
                save_file(tensors, path)
                os.truncate(path, path.stat().st_size // 2)
                fate()
            save_file(tensors, path)

        return saving

    def _phases(self) -> None:
        self._enter(checkpoint, "save", lambda _, state, *__: f"save of update {state.step}")
        self._enter(RunDirectory, "truncate_metrics", lambda *_: "resume")
        self._enter(RunDirectory, "record_pause", lambda *_: "pause")
        self._enter(trainer._Training, "finish", lambda *_: "finish")
        # The trainer calls these two right before and right after it writes the line of an update.
        self._enter(trainer._Training, "must_evaluate", lambda asked: f"update {asked.state.step} before its line")
        self._enter(trainer._Training, "must_pause", lambda asked: f"after update {asked.state.step}")

    def _enter(self, owner: Any, name: str, phase: Callable[..., str]) -> None:
        """Assign the points during `owner.name` to a phase; the start of the call is a point itself."""
        inner = getattr(owner, name)

        def entering(*args: Any, **kwargs: Any) -> Any:
            outside, self.phase = self.phase, phase(*args)
            try:
                if fate := self.reach("begins"):
                    fate()
                return inner(*args, **kwargs)
            finally:
                self.phase = outside

        setattr(owner, name, entering)


def die() -> None:
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_space() -> None:
    """Raise the error of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FATES: dict[str, Callable[[], None]] = {
    "SIGKILL": die,
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
    "ENOSPC": run_out_of_space,
}
"""What can happen at a point."""


def _live(run: Path, fates: Mapping[str, str], log: Path) -> None:
    """Run a trainer in the child, from its first file operation to its end."""
    with log.with_suffix(".log").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    points = Points(run, fates, log.with_suffix(".board"))
    points.install()
    sys.argv = ["gptcore.train", str(run)]
    began = time.monotonic()
    code = trainer.main()
    points.is_over = True
    log.with_suffix(".json").write_text(json.dumps({"passed": points.passed, "seconds": time.monotonic() - began}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class Life:
    """The end of one trainer."""

    code: int
    """Exit code, or the negative number of the signal that killed the trainer."""
    last: str
    """The newest point that the trainer passed."""
    said: str
    """The output of the trainer."""
    passed: Sequence[str] = ()
    """Every point that the trainer passed, if it was not killed."""
    seconds: float = math.nan
    """Run time, if the trainer was not killed."""

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


def live(run: RunDirectory, fates: Mapping[str, str] | None = None) -> Life:
    """Start a trainer with fates at some points (point -> name in FATES), and wait for its end."""
    with _born(run, fates or {}) as (process, log):
        process.join()
        return _life(process, log)


def live_until(run: RunDirectory, seconds: float) -> Life:
    """Start a trainer and kill it `seconds` after its first file operation, unless it has ended by then."""
    with _born(run, {}) as (process, log):
        while process.is_alive() and not _newest(log):
            time.sleep(0.0005)
        process.join(seconds)
        process.kill()
        process.join()
        return _life(process, log)


@contextmanager
def _born(run: RunDirectory, fates: Mapping[str, str]) -> Iterator[tuple[BaseProcess, Path]]:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}  # for the fork server
    log = run.path.with_name(f"{run.path.name}-life")
    for suffix in (".board", ".json"):
        log.with_suffix(suffix).unlink(missing_ok=True)
    process = _FORKS.Process(target=_live, args=(run.path, fates, log))
    process.start()
    try:
        yield process, log
    finally:
        process.kill()
        process.join()
        process.close()


def _life(process: BaseProcess, log: Path) -> Life:
    assert process.exitcode is not None
    record = log.with_suffix(".json")
    whole = json.loads(record.read_text()) if record.exists() else {}
    return Life(process.exitcode, _newest(log), log.with_suffix(".log").read_text(), **whole)


def _newest(log: Path) -> str:
    board = log.with_suffix(".board")
    return board.read_bytes().rstrip(b"\0").decode(errors="replace") if board.exists() else ""

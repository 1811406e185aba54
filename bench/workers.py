"""Worker processes that do one thing per request and report how long it took, in lines of JSON over pipes.

Contenders in separate processes share no allocator, no threads and no peak of memory, and can take turns. A worker ends
when its input ends, so no worker outlives the benchmark. Linux only: memory is read from /proc.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}

Answers = Mapping[str, Callable[..., dict[str, Any]]]


class Worker:
    """The side of the benchmark, which sends the requests."""

    def __init__(self, module: str, spec: dict[str, Any]) -> None:
        """Start `python -m module SPEC` without waiting until it is ready."""
        self.about = f"{module} {json.dumps(spec)}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec)],
            cwd=ROOT,
            env={**os.environ, **_OFFLINE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Return the answer to one request. Raise RuntimeError if the process ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.about} ended with exit code {self._process.wait()} when asked to {do}")
        return dict(json.loads(line))

    def peak_mb(self) -> float:
        """Return the peak of resident memory of the process, in MB."""
        return peak_mb(self.pid)

    def close(self) -> None:
        """End the process, and return when it is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def workers(module: str, specs: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Worker]]:
    """Start one worker for each spec, by name, all at once, and wait until they are ready. End them on exit."""
    started = {name: Worker(module, spec) for name, spec in specs.items()}
    try:
        for worker in started.values():
            worker.ask("ready")
        yield started
    finally:
        for worker in started.values():
            worker.close()


def serve(prepare: Callable[[], Answers]) -> None:
    """Answer requests until the input ends: the whole life of a worker. Output of libraries goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers = prepare()
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        replies.write(json.dumps({} if do == "ready" else answers[do](**request)) + "\n")


def peak_mb(pid: int) -> float:
    """Return VmHWM of a process in MB. The peak of `getrusage` is inherited from the parent across exec."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0

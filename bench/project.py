"""A small project that is retrained for many nights: its text, the changes of each night, and its `gptflow up`.

Everything is done from outside, as people and schedules do it: the command line, Prefect over REST, signals, and the
runner's log, in which each step of a retraining reports its result.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows.retrain.attempts import read_current
from flows.state.root import OPT_OUTS, StateRoot
from flows.state.servers import read_servers

COMMAND = (sys.executable, "-P", "-c", "from flows.cli import main; main()")
"""Like the installed `gptflow`, it imports nothing from the working directory."""
PIPELINE, MODEL, KEEP = "tiny", "gpt-tiny", 3
UNCHANGED = "unchanged"
CHANGES = {"grown": 4, "edited": 3, "lost a document": 1, UNCHANGED: 2}
"""The changes of the text in a night, and how often each happens in ten nights."""
STEPS = tuple("start ingest compare tokenize train evaluate sample plot register gate report".split())
"""The steps of a retraining, in order. `start` is the start of the flow's process; `report` follows the verdict."""
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_PATIENCE_SECONDS = 180.0
_FIRST_DOCUMENTS = 12
_WORDS = (
    "the a model learns from text and writes what comes next while every night new words arrive in many files".split()
)
_SETTINGS = {
    "corpus": {
        "sources": ["text"],
        "tokenizer": "bytes",
        "block_bytes": 256,
        "val_fraction": 0.15,
        "holdout_fraction": 0.15,
    },
    "model": {"recipe": "gpt2", "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 1},
    "train": {
        "max_steps": 300,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "eval_every": 100,
        "checkpoint_steps": 50,
        "threads": 1,
    },
    "sample": {"prompts": ["The model"], "temperatures": [0.0], "max_new_tokens": 20},
    "retrain": {"keep": KEEP},
}


def prose(draw: random.Random, num_sentences: int) -> str:
    """Return made-up English in paragraphs, with some new words, so that older models become out of date."""
    own = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(5)]
    words = [*_WORDS, *own]
    sentences = (" ".join(draw.choices(words, k=draw.randint(5, 15))).capitalize() for _ in range(num_sentences))
    return "".join(sentence + (".\n\n" if draw.random() < 0.2 else ". ") for sentence in sentences)


class Text:
    """The documents of the project, changed by a seeded random generator."""

    def __init__(self, directory: Path, draw: random.Random) -> None:
        self.directory, self.draw, self.count = directory, draw, 0
        directory.mkdir()
        for _ in range(_FIRST_DOCUMENTS):
            self.grow()

    def grow(self) -> None:
        self.count += 1
        (self.directory / f"{self.count:03}.txt").write_text(prose(self.draw, 80))

    def live(self, change: str) -> None:
        """Make the change of one night, a key of CHANGES."""
        documents = sorted(self.directory.iterdir())
        if change == "grown":
            self.grow()
        elif change == "lost a document":
            self.draw.choice(documents).unlink()
        elif change == "edited":
            chosen = self.draw.choice(documents)
            paragraphs = chosen.read_text().split("\n\n")
            paragraphs[self.draw.randrange(len(paragraphs))] = prose(self.draw, 20)
            chosen.write_text("\n\n".join(paragraphs))


class Project:
    """A directory with text and pipelines.yaml, whose `gptflow up` is started, queried, damaged and stopped."""

    def __init__(self, directory: Path, draw: random.Random) -> None:
        self.directory, self.root = directory, StateRoot(directory / "mlruns")
        self.text = Text(directory / "text", draw)
        (directory / "pipelines.yaml").write_text(yaml.safe_dump({"pipelines": {PIPELINE: _SETTINGS}}))
        self.prefect_port, self.mlflow_port = _free_ports()
        self.log, self.runner_log = directory / "up.log", self.root.logs / "runner.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start `gptflow up`, and return when it reports that everything is healthy."""
        command = [*COMMAND, "up", "--prefect-port", str(self.prefect_port), "--mlflow-port", str(self.mlflow_port)]
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(lambda: not self.is_up() or "is healthy" in _tail(self.log, begin), _PATIENCE_SECONDS)
        if not self.is_up():
            raise RuntimeError(f"gptflow up ended while it started:\n{_tail(self.log, begin)}")

    def is_up(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop `gptflow up` as Ctrl-C does."""
        if self.process is not None and self.is_up():
            self.process.terminate()
            self.process.wait(_PATIENCE_SECONDS)

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `gptflow` in the project to its end."""
        return subprocess.run(
            [*COMMAND, *arguments], cwd=self.directory, env=_environment(), capture_output=True, text=True, timeout=600
        )

    def ask(self, path: str, body: object = None) -> Any:
        """Return Prefect's answer to a GET, or to a POST of `body`; retry until the server is up and not busy."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.prefect_port}/api/{path}"
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            request = urllib.request.Request(url, data, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=70) as answer:
                    return json.load(answer)
            except (OSError, ValueError) as error:
                is_refused = isinstance(error, urllib.error.HTTPError) and error.code not in (500, 503)
                if is_refused or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def trigger(self, deployment: str, key: str) -> str:
        """Request a run of `flow/deployment` and return its id. The same key requests the same run."""
        identity = self.ask(f"deployments/name/{deployment}")["id"]
        return str(self.ask(f"deployments/{identity}/create_flow_run", {"idempotency_key": key})["id"])

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def log_size(self) -> int:
        return self.runner_log.stat().st_size

    def step(self, run: str, begin: int) -> str | None:
        """Return the current step of a retraining from the runner's log after `begin`, or None when it is over."""
        said = _tail(self.runner_log, begin).partition(run)[2]  # the end of the previous run comes before its id
        if f"Flow run '{PIPELINE}' - Finished in state" in said:
            return None
        told = re.findall(rf"Flow run '{PIPELINE}' - (\w+): ", said)
        steps = [step for step in told if step in STEPS]
        if not steps:
            return "start"
        if "unfinished training" in said and steps[-1] == "compare":
            return "train"  # a resumed training of an earlier night needs neither ingest nor tokenize
        return STEPS[STEPS.index(steps[-1]) + 1]

    def updates(self) -> int:
        """Return the number of updates of the pipeline's current training."""
        directory = self.root.path / "runs" / PIPELINE
        with suppress(FileNotFoundError):
            return (directory / read_current(directory)["own"] / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def processes(self, kind: str, run: str = "") -> list[psutil.Process]:
        """Return the processes that a kind of kill is for; an empty list if none exists at the moment."""
        assert self.process is not None
        own = psutil.Process(self.process.pid)
        if kind == "up":
            return [own, *own.children(recursive=True)]
        if kind == "flow run":
            return [one for one in own.children(recursive=True) if _flow_run_of(one) == run]
        if kind == "trainer":
            return [one for one in psutil.process_iter() if self._is_trainer(one)]
        servers = read_servers(self.root.path)
        pid, created = servers.processes.get(kind, (0, 0.0)) if servers else (0, 0.0)
        with suppress(psutil.NoSuchProcess):
            if pid and abs(psutil.Process(pid).create_time() - created) < 1:
                return [psutil.Process(pid)]
        return []

    def _is_trainer(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            return "gptcore.train" in command and str(self.root.path / "runs" / PIPELINE) in command
        return False

    def left_over(self) -> list[str]:
        """List the processes that work in the project, whatever their parent is."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                here = str(self.root.path) in command or process.environ().get("GPTFLOW_HOME") == str(self.root.path)
                if here and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {command[:200]}")
        return found


def wait_for(is_true: Callable[[], object], seconds: float, every: float = 0.2) -> bool:
    """Wait until `is_true()`; return whether that happened within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "GPTFLOW_"))}
    return {**kept, **OPT_OUTS, "OMP_NUM_THREADS": "1"}


def _flow_run_of(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("PREFECT__FLOW_RUN_ID") if "prefect.engine" in process.cmdline() else None
    return None


def _tail(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]

"""The soak: many nights of a tiny pipeline under one `gptflow up`, most of them with something killed on the way.

    python -m bench.soak --nights 50 --seed 1 --json soak.json

Every night a run is asked for over the server, after a change of the text or without one. A plan made from the seed
says what is killed and how long after the run's begin: the trainer, the flow run, the runner, one of the servers, the
supervisor, or everything at once. Meanwhile a thread loads the champion about once a second. Retention runs every few
nights. At the end, one more night without a kill must find everything in order; `Soak.problems` lists what is not.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient

from flows.releases import registry
from flows.releases.loading import load
from flows.state import StateRoot
from tests.flows.servers import Up, living, wait_for

MODEL = "gpt-soak"
KEEP = 3
PRUNE_EVERY = 4
KILLS = ("trainer", "flow run", "runner", "MLflow", "Prefect", "supervisor", "everything")
MOST_DELAY = 16.0
"""Seconds from the start of the run's process within which something is killed: about what a run takes."""
TRAINER_SHARE = 0.1
"""A trainer lives for some seconds: it is killed after this share of the delay, from its own start."""
END_SECONDS = 150.0
"""A run that has not ended after this long is left as it is. The last check finds it, unless somebody cleans up."""
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
FILES = 6
WORDS = "night by night new words arrive and a small model reads them all before the sun comes up again".split()
PIPELINE = {
    "corpus": {
        "sources": ["text"],
        "tokenizer": "bytes",
        "block_bytes": 256,
        "val_fraction": 0.15,
        "holdout_fraction": 0.2,
    },
    "model": {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 1},
    "train": {
        "max_steps": 300,
        "batch_size": 8,
        "learning_rate": 0.003,
        "eval_every": 100,
        "checkpoint_steps": 50,
        "threads": 1,
    },
    "sample": {"prompts": ["The model"], "temperatures": [0.0], "max_new_tokens": 10},
    "retrain": {"keep": KEEP},
}


@dataclass(frozen=True)
class Night:
    """What happens in one night, as it was planned."""

    changes: bool
    """Whether the text has changed."""
    kill: str | None
    delay: float
    """Seconds from the run's begin to the kill."""


@dataclass
class Lived:
    """How a night went."""

    night: Night
    where: str = ""
    """The last task that had begun before the kill; empty where nothing was there to be killed."""
    end: str = ""
    """Name of the state that the run ended in."""
    seconds: float = 0.0


@dataclass
class Soak:
    """The figures of a soak, and what was not in order at its end."""

    nights: list[Lived] = field(default_factory=list)
    looks: int = 0
    """How often the champion was loaded."""
    curve: list[tuple[int, int]] = field(default_factory=list)
    """Night, and bytes of what retention governs, each time after retention ran."""
    most_bytes: int = 0
    """The bound that the curve must stay under."""
    databases: int = 0
    """Bytes of MLflow's and Prefect's databases and the logs in the end, which retention does not free."""
    versions: int = 0
    """Ever registered."""
    kept_versions: int = 0
    promotions: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def plan(nights: int, seed: int) -> list[Night]:
    """The nights to live through. The first is quiet; then every kill comes once before any comes again."""
    draw = random.Random(seed)
    kills: list[str | None] = []
    while len(kills) < nights:
        kills += [None, *draw.sample(KILLS, len(KILLS))]
    return [
        # What trains can be killed only where there is something to train on.
        Night(number == 0 or kill == "trainer" or draw.random() < 0.7, kill, draw.uniform(0, MOST_DELAY))
        for number, kill in enumerate(kills[:nights])
    ]


def soak(nights: int, seed: int, directory: Path, say: Callable[[str], None] = print) -> Soak:
    """Lives through the nights in an empty directory and says what was found."""
    began = time.monotonic()
    text = _Text(directory / "text", seed)
    (directory / "pipelines.yaml").write_text(yaml.safe_dump({"pipelines": {"soak": PIPELINE}}))
    up = Up(directory)
    found = Soak()
    watch = _Watch(up.root)
    up.start()
    watch.start()
    try:
        for number, night in enumerate(plan(nights, seed), 1):
            lived = _live(up, text, night)
            found.nights.append(lived)
            say(
                f"{number:>3}  {'change' if night.changes else '-':<7} {night.kill or '-':<11} "
                f"{lived.where or '-':<9} {lived.end:<14} {lived.seconds:>5.0f} s"
            )
            if number == 1:
                found.most_bytes = _governed(up.root)
            if number % PRUNE_EVERY == 0 or number == nights:
                _prune(up)
                found.curve.append((number, _governed(up.root)))
        last = _live(up, text, Night(changes=True, kill=None, delay=0.0))
        if last.end not in ("Promoted", "Kept champion"):
            found.problems.append(f"the quiet night at the end ended as {last.end}")
        _look_back(up, found)
    finally:
        watch.stop()
        before = up.processes() if up.process and up.process.poll() is None else []
        up.stop()
    found.looks = watch.looks
    found.problems += watch.failures
    found.problems += [f"still alive: {process.pid}" for process in living(before)]
    found.seconds = time.monotonic() - began
    return found


class _Text:
    """A directory of text of about the same size all the time."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.draw, self.written = path, random.Random(seed), 0
        path.mkdir()
        for _ in range(FILES):
            self.change()

    def change(self) -> None:
        """A new document; the oldest one goes."""
        self.written += 1
        sentences = (" ".join(self.draw.choices(WORDS, k=9)) + ".\n\n" for _ in range(200))
        (self.path / f"{self.written:04}.txt").write_text("".join(sentences))
        for old in sorted(self.path.iterdir())[:-FILES]:
            old.unlink()


class _Watch(Thread):
    """Loads the champion again and again, as whoever uses it would. Once there is one, there always is."""

    def __init__(self, root: StateRoot) -> None:
        super().__init__(daemon=True)
        self.root, self.looks, self.is_over = root, 0, Event()
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.is_over.wait(1.0):
            try:
                found = registry.champion_of(self.root, MODEL)
                if found is not None:
                    load(self.root, found)
                    self.looks += 1
                elif self.looks:
                    self.failures.append("there was no champion any more")
            except Exception as error:  # whatever it is, it is a finding
                self.failures.append(f"the champion could not be loaded: {error!r}")

    def stop(self) -> None:
        self.is_over.set()
        self.join()


def _live(up: Up, text: _Text, night: Night) -> Lived:
    """One night, from the change of the text until the run has ended and everything answers again."""
    began = time.monotonic()
    lived = Lived(night)
    if night.changes:
        text.change()
    run = str(_patiently(lambda: up.prefect.start("soak")))
    if night.kill is not None:
        _until(lambda: _type(up, run) != "SCHEDULED", END_SECONDS)
        if night.kill == "trainer":
            _until(lambda: _trainers(up) or _type(up, run) in ENDS, END_SECONDS)
        time.sleep(night.delay * (TRAINER_SHARE if night.kill == "trainer" else 1.0))
        lived.where = _kill(up, night.kill, run)
    ended = _until(lambda: _type(up, run) in ENDS, END_SECONDS)
    state = _patiently(lambda: up.prefect.state(run))
    lived.end = str(state["name"]) if ended else f"left {state['name']}"
    lived.seconds = time.monotonic() - began
    return lived


def _kill(up: Up, what: str, run: str) -> str:
    """Sends SIGKILL, and says how far the run had come. Starts `gptflow up` again where that was its end."""
    victims = _victims(up, what)
    where = _task(up, run) if victims else ""
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if what in ("supervisor", "everything"):
        assert up.process is not None
        up.process.wait(30)
        up.start()
    elif what in ("runner", "MLflow", "Prefect"):
        _until(lambda: up.servers().processes[what.lower()][0] not in {one.pid for one in victims}, END_SECONDS)
    return where


def _victims(up: Up, what: str) -> list[psutil.Process]:
    if what == "everything":
        return list(reversed(up.processes()))
    if what == "supervisor":
        return up.processes()[:1]
    if what == "trainer":
        return _trainers(up)
    if what == "flow run":
        return [process for process in up.processes() if _runs(process, "prefect.engine")]
    return [psutil.Process(up.servers().processes[what.lower()][0])]


def _trainers(up: Up) -> list[psutil.Process]:
    return [process for process in up.processes() if _runs(process, "gptcore.train")]


def _runs(process: psutil.Process, module: str) -> bool:
    with suppress(psutil.Error):
        return module in process.cmdline()
    return False


def _type(up: Up, run: str) -> str:
    """The type of the run's state; UNKNOWN while the server is away."""
    with suppress(OSError, AssertionError):
        return str(up.prefect.state(run)["type"])
    return "UNKNOWN"


def _task(up: Up, run: str) -> str:
    """The last task of the run that had begun."""
    asked = {"flow_runs": {"id": {"any_": [run]}}}
    with suppress(OSError, AssertionError):
        tasks = [task for task in up.prefect.ask("task_runs/filter", asked) if task["start_time"]]
        if tasks:
            return str(max(tasks, key=lambda task: task["start_time"])["name"].rpartition("-")[0])
        return "begin"
    return "unknown"


def _patiently(ask: Callable[[], Any]) -> Any:
    """Asks until the server is there to answer."""
    for _ in range(120):
        with suppress(OSError):
            return ask()
        time.sleep(1.0)
    return ask()


def _until(is_true: Callable[[], object], seconds: float) -> bool:
    with suppress(AssertionError):
        wait_for(is_true, seconds)
        return True
    return False


def _prune(up: Up) -> None:
    """Retention, by its deployment."""
    identity = _patiently(lambda: up.prefect.ask("deployments/name/prune/prune"))["id"]
    run = up.prefect.ask(f"deployments/{identity}/create_flow_run", {})["id"]
    _until(lambda: _type(up, run) in ENDS, END_SECONDS)


def _look_back(up: Up, found: Soak) -> None:
    """Whether anything is unfinished, double, or more than retention allows."""
    for run in up.prefect.runs():
        if run["state"]["type"] not in ENDS:
            found.problems.append(f"Prefect run {run['id']} is {run['state']['name']} for ever")
    client = MlflowClient(up.root.tracking_uri)
    runs = list(_every_run(client))
    for run in runs:
        if run.info.status == "RUNNING":
            found.problems.append(f"MLflow run {run.info.run_id} is RUNNING for ever")
    versions = registry.versions(up.root, MODEL)
    attempts = [
        (run.data.tags.get("run_key") or run.data.tags.get("pruned_run_key"), run.data.tags["attempt"]) for run in runs
    ]
    releases = [(version.tags["run_key"], version.tags["attempt"]) for version in versions]
    for what, keys in (("MLflow runs", attempts), ("versions", releases)):
        doubled = [key for key, count in Counter(keys).items() if count > 1]
        found.problems += [f"several {what} have the key and attempt {key}" for key in doubled]
    moves = [key for key in client.get_registered_model(MODEL).tags if key.startswith("move-")]
    found.promotions = len(moves)
    found.versions = max(int(version.version) for version in versions)
    found.kept_versions = len(versions)
    # The first night's files are one version's. The quiet night at the end came after the last retention.
    found.most_bytes = found.most_bytes * 3 // 2 * (KEEP + found.promotions + 1)
    found.problems += [
        f"{size:,} bytes after night {night}, more than {found.most_bytes:,}"
        for night, size in found.curve
        if size > found.most_bytes
    ]
    found.databases = _size(up.root.path) - _governed(up.root)


def _every_run(client: MlflowClient) -> Iterator[Any]:
    for experiment in client.search_experiments():
        yield from client.search_runs([experiment.experiment_id], max_results=10_000)


def _governed(root: StateRoot) -> int:
    """Bytes of what retention may free."""
    return sum(_size(path) for path in (root.artifacts, root.path / "runs", root.corpora, root.tokens))


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            total += 0 if file.is_dir() else file.lstat().st_size
    return total


def table(found: Soak) -> str:
    """The figures, as markdown."""
    killed = Counter(f"{lived.night.kill}" for lived in found.nights if lived.where)
    ends = Counter(lived.end for lived in found.nights)
    where = Counter(lived.where for lived in found.nights if lived.where)
    rows = {
        "nights": f"{len(found.nights)}, {sum(lived.night.changes for lived in found.nights)} of them with new text",
        "kills": f"{sum(killed.values())}: {_counts(killed)}",
        "killed during": _counts(where),
        "runs ended as": _counts(ends),
        "versions registered / kept": f"{found.versions} / {found.kept_versions}",
        "moves of the champion": f"{found.promotions}",
        "loads of the champion": f"{found.looks}",
        "bytes that retention governs, by night": ", ".join(f"{night}: {size:,}" for night, size in found.curve),
        "bound on them": f"{found.most_bytes:,}",
        "databases and logs": f"{found.databases:,} bytes",
        "seconds": f"{found.seconds:,.0f}",
        "problems": "; ".join(found.problems) or "none",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = soak(asked.nights, asked.seed, Path(directory))
    print(table(found))
    if asked.json:
        asked.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()

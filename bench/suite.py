"""Where the time of the tests goes: imports, migrations, servers, trainers, sleeping, and the tests' own work.

    python -m bench.suite -m "not deep" --numprocesses 2 --dist loadfile

runs pytest with these arguments and prints two tables: the causes of the seconds, and processes by kind. If a process
is killed, its time after its imports is counted only with its parent's children.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KINDS = {
    "gptcore.train": "trainer",
    "flows.deployments.ephemeral_server": "Prefect's temporary server",
    "flows.deployments.up_servers prefect": "Prefect server",
    "flows.deployments.up_servers mlflow": "MLflow server",
    "prefect server": "Prefect server",
    "prefect.server": "Prefect server",
    "prefect.engine": "flow run of a runner or worker",
    "prefect worker": "worker",
    "flows.cli": "gptflow, started cold",
    "tests.forks": "what tests fork from",
    "multiprocessing.forkserver": "what tests fork from",
    "exec(eval": "pytest's workers",
    "pytest": "pytest",
    "bench.": "benchmark",
}
"""A part of a command line, and the kind of its process."""
Event = Mapping[str, Any]


def kind_of(command: Iterable[str]) -> str:
    line = " ".join(command)
    return next((kind for part, kind in KINDS.items() if part in line), "other")


def by_processor(events: list[Event]) -> list[tuple[str, int, float, float]]:
    """Return imports and migrations: name, count, processor seconds, elapsed seconds."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        if event["kind"] in ("import", "migration"):
            name = f"import of {event['name']}" if event["kind"] == "import" else "migration of a database"
            for index, value in enumerate((1, event["cpu"], event["wall"])):
                found[name][index] += value
    rows = [(name, int(count), cpu, wall) for name, (count, cpu, wall) in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def by_kind(events: list[Event]) -> list[tuple[str, int, float, float]]:
    """Return processes: kind, count, processor seconds of those that ended by themselves, their seconds of sleep."""
    kinds = {event["pid"]: kind_of(event["command"]) for event in events if event["kind"] == "start"}
    started = Counter(kinds.values())
    cpu: Counter[str] = Counter()
    slept: Counter[str] = Counter()
    for event in events:
        if event["kind"] == "end":
            kind = kinds.get(event["pid"], "forked")
            cpu[kind] += event["cpu"]
            slept[kind] += event["slept"]
    started["forked"] = sum(event["kind"] == "fork" for event in events)
    return sorted(((kind, count, cpu[kind], slept[kind]) for kind, count in started.items()), key=lambda row: -row[2])


def main() -> int:
    """Run pytest and print the tables; return pytest's exit code."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "events.jsonl"
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "traced"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "SUITE_TRACE": str(file), "PYTHONPATH": path}
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment)
        wall = time.monotonic() - began
        events = [json.loads(line) for line in file.read_text().splitlines()]
    print(f"\n{wall:.0f} s\n\n| spent on | times | s of a processor | s |\n|---|---|---|---|")
    for name, count, cpu, passed in by_processor(events):
        print(f"| {name} | {count} | {cpu:.0f} | {passed:.0f} |")
    print("\n| processes | started | s of a processor | asleep, s |\n|---|---|---|---|")
    for name, count, cpu, slept in by_kind(events):
        print(f"| {name} | {count} | {cpu:.0f} | {slept:.0f} |")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

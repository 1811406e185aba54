"""What the pipeline itself costs: `gptflow run` of a tiny pipeline, phase by phase from process start to exit.

    python -m bench.pipeline --rounds 5 --json pipeline.json
    python -m bench.pipeline --tracked quickstart --seconds 180

Each round runs the pipeline three times in a state root of its own: fresh, with changed text, and unchanged, which is
skipped. The phases are measured from outside, without any code in the product. Their sources are the times at which
child processes start, listen and end, the states of the flow run in Prefect's database, the seconds of each step in
`--json`, and the times of the files in the run directory. A phase is the median over the rounds.

`--tracked` measures instead what the flow and its server cost a training: both are suspended and resumed in turn while
one training runs.
"""

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.project import COMMAND, PIPELINE, Project
from flows.state.root import OPT_OUTS

KINDS = ("fresh", "changed", "skipped")
SERVER = "flows.deployments.ephemeral_server"
_LOOK_SECONDS = 0.02
_SETTLING_SECONDS, _WINDOW_SECONDS = 1.0, 6.0
Phases = dict[str, float]
"""Seconds by phase, in order. Their sum is the whole run."""


@dataclass
class Seen:
    """The events of one run that are visible from outside, in seconds since the epoch."""

    began: float
    server_started: float = 0.0
    server_listens: float = 0.0
    trainer_started: float = 0.0
    trainer_ended: float = 0.0
    ended: float = 0.0
    outcome: dict[str, Any] = field(default_factory=dict)


def watched(project: Project, *arguments: str) -> Seen:
    """Run the pipeline to its end, and look at its child processes every 0.02 seconds."""
    output = project.directory / "outcome.json"
    command = [*COMMAND, "run", PIPELINE, "--json", *arguments]
    with output.open("w") as file:
        seen = Seen(time.time())
        process = subprocess.Popen(
            command, cwd=project.directory, env=environment(), stdin=subprocess.DEVNULL, stdout=file
        )
    while process.poll() is None:
        _look(psutil.Process(process.pid), seen)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_SECONDS)
    seen.ended = time.time()
    if process.returncode:
        raise RuntimeError(f"gptflow run ended with exit code {process.returncode}")
    seen.outcome = json.loads(output.read_text())
    return seen


def _look(process: psutil.Process, seen: Seen) -> None:
    now = time.time()
    commands: list[list[str]] = []
    with suppress(psutil.Error):
        commands = [child.cmdline() for child in process.children()]
    server = next((command for command in commands if SERVER in command), None)
    trains = any("gptcore.train" in command for command in commands)
    if server and not seen.server_started:
        seen.server_started = now
    if server and not seen.server_listens and _listens(server[server.index(SERVER) + 1]):
        seen.server_listens = now
    if trains and not seen.trainer_started:
        seen.trainer_started = now
    if seen.trainer_started and not trains and not seen.trainer_ended:
        seen.trainer_ended = now


def _listens(port: str) -> bool:
    with suppress(OSError), closing(socket.create_connection(("127.0.0.1", int(port)), timeout=1)):
        return True
    return False


def environment() -> dict[str, str]:
    """Return this process's environment without variables that redirect a run or keep Python from writing byte code."""
    prefixes = ("PREFECT_", "MLFLOW_", "GPTFLOW_", "PYTHONDONTWRITEBYTECODE")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(prefixes)}, **OPT_OUTS}


def phases(project: Project, seen: Seen) -> Phases:
    """Return the phases from process start to exit. The time between two events belongs to the later one."""
    states = _states(project)
    steps = {name: took for name, took in seen.outcome["seconds"].items() if name not in ("start", "total")}
    flow = states["ended"] - states["running"]
    found = {
        "checks of the input, until Prefect's server is started": seen.server_started - seen.began,
        "until the server listens": seen.server_listens - seen.server_started,
        "until the flow run exists": states["created"] - seen.server_listens,
        "until it runs": states["running"] - states["created"],
    }
    for name, took in steps.items():
        found |= _training(project, seen, took) if name == "train" else {name: took}
    found["between the steps"] = flow - sum(steps.values())
    found["from the flow run's end to exit"] = seen.ended - states["ended"]
    return {**found, "total": seen.ended - seen.began}


def _training(project: Project, seen: Seen, took: float) -> Phases:
    """Divide the step `train` into the trainer's start, updates, other work and end, and the rest of the step."""
    run = Path(seen.outcome["run_directory"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    imported, committed = (run / "lock").stat().st_mtime, (run / "final").stat().st_mtime
    updates = lines[-1]["seconds"]
    return {
        "train: the trainer's imports": imported - seen.trainer_started,
        "train: updates": updates,
        "train: model, evaluations, results": committed - imported - updates,
        "train: the trainer's end": seen.trainer_ended - committed,
        "train: the rest": took - (seen.trainer_ended - seen.trainer_started),
    }


def _states(project: Project) -> dict[str, float]:
    """Return when the newest flow run was created, began to run and ended."""
    database = project.root.prefect / "ephemeral" / "prefect.db"
    query = """SELECT type, timestamp FROM flow_run_state WHERE flow_run_id =
               (SELECT flow_run_id FROM flow_run_state ORDER BY timestamp DESC LIMIT 1)"""
    with closing(sqlite3.connect(database)) as connection:
        times = {kind: datetime.fromisoformat(at).replace(tzinfo=UTC) for kind, at in connection.execute(query)}
    names = {"PENDING": "created", "RUNNING": "running", "COMPLETED": "ended"}
    return {names[kind]: at.timestamp() for kind, at in times.items() if kind in names}


def rounds_of(count: int) -> dict[str, list[Phases]]:
    """Return the phases of each kind of run, round by round."""
    found: dict[str, list[Phases]] = {kind: [] for kind in KINDS}
    for number in range(count):
        with tempfile.TemporaryDirectory() as directory:
            project = Project(Path(directory), random.Random(number))
            for kind in KINDS:
                if kind == "changed":
                    project.text.grow()
                found[kind].append(phases(project, watched(project)))
    return found


def tracked(pipeline: str, seconds: float) -> dict[str, list[float]]:
    """Measure the seconds per update of one training, window by window, with the flow and its server and without them.

    Two trainings one after the other would say less: the speed of a shared machine drifts by more than the difference
    in question. The flow and its server, which follow the training, are therefore suspended and resumed in turn. The
    first second of a window does not count, because they catch up in it. The processor time of both is a share of one
    core.
    """
    found: dict[str, list[float]] = {"alone": [], "under the flow": [], "share of a core": []}
    with tempfile.TemporaryDirectory() as directory:
        environ = {**environment(), "GPTFLOW_HOME": f"{directory}/mlruns"}
        command = [*COMMAND, "run", pipeline, "--set", "train.max_steps=1000000"]
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            metrics = _first_metrics(Path(directory), process)
            followers = _followers(psutil.Process(process.pid))
            windows = list(_windows(followers, seconds))
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    for name, begin, end, share in windows:
        inside = [line["seconds"] for line in lines if begin <= line["time_ms"] / 1000 <= end]
        found[name].append(statistics.mean(after - before for before, after in pairwise(inside)))
        if name == "under the flow":
            found["share of a core"].append(share)
    return found


def _windows(followers: Sequence[psutil.Process], seconds: float) -> Iterator[tuple[str, float, float, float]]:
    """Return the name, begin and end of each window, and the share of a core that the followers took."""
    until = time.time() + seconds
    while time.time() < until:
        for name in ("alone", "under the flow"):
            for each in followers:
                each.suspend() if name == "alone" else each.resume()
            time.sleep(_SETTLING_SECONDS)
            begin, before = time.time(), _cpu_seconds(followers)
            time.sleep(_WINDOW_SECONDS)
            end = time.time()
            yield name, begin, end, (_cpu_seconds(followers) - before) / (end - begin)


def _first_metrics(directory: Path, process: "subprocess.Popen[bytes]") -> Path:
    """Return the training's metrics file after it has been filled for some seconds."""
    while process.poll() is None:
        for path in directory.glob("mlruns/runs/*/*/metrics.jsonl"):
            if path.stat().st_size:
                time.sleep(_WINDOW_SECONDS)
                return path
        time.sleep(_LOOK_SECONDS)
    raise RuntimeError(f"gptflow run ended with exit code {process.returncode}")


def _followers(flow: psutil.Process) -> list[psutil.Process]:
    children = flow.children(recursive=True)
    return [flow, *(child for child in children if "gptcore.train" not in child.cmdline())]


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def tracked_sentence(found: Mapping[str, Sequence[float]]) -> str:
    """Return a sentence with the medians, and the median ratio of the pairs with its standard error."""
    alone, flow = (statistics.median(found[name]) for name in ("alone", "under the flow"))
    ratios = [with_flow / without - 1 for without, with_flow in zip(found["alone"], found["under the flow"])]
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # standard error of a median, for normal deviations
    return (
        f"alone {1000 * alone:.2f} ms an update, under the flow {1000 * flow:.2f} ms; by pairs of windows "
        f"{statistics.median(ratios):+.1%} +- {error:.1%} ({len(ratios)} pairs); the flow and its server take "
        f"{statistics.mean(found['share of a core']):.2%} of a core"
    )


def median(found: Sequence[Phases]) -> Phases:
    """Return the median of each phase over the rounds."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def table(found: Mapping[str, Sequence[Phases]]) -> str:
    """Return the medians as Markdown, one column per kind of run."""
    columns = {kind: median(rounds) for kind, rounds in found.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column if name != "total"))
    lines = [f"| seconds | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in [*names, "total"]:
        cells = (f"{column[name]:.2f}" if name in column else "" for column in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description="What the pipeline itself costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tracked", metavar="PIPELINE", help="what its training loses to those who follow it")
    parser.add_argument("--seconds", type=float, default=180, help="how long a tracked training is looked at")
    parser.add_argument("--json", type=Path, help="where to write every round's numbers")
    given = parser.parse_args()
    found: Mapping[str, Any]
    if given.tracked:
        found = tracked(given.tracked, given.seconds)
        print(tracked_sentence(found))
    else:
        found = rounds_of(given.rounds)
        print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

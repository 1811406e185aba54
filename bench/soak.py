"""The soak: many nights of scheduled retraining under one `gptflow up`, with kills at random moments.

    python -m bench.soak --nights 50 --seed 1 --json soak.json

Every night the text grows, is edited, loses a document or stays as it is, and the pipeline is retrained. On some nights
retention runs as well. On most nights something is killed with SIGKILL: the trainer, the flow run, the runner, a
server, or everything at once. After a kill of everything, `gptflow up` is restarted; other recovery is left to the next
night. The last night has no kill, and then soak_checks.py lists violations. The exit code is 1 if there are any.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from bench.project import CHANGES, ENDS, MODEL, PIPELINE, STEPS, UNCHANGED, Project, wait_for
from bench.soak_checks import (
    ChampionWatch,
    bytes_of,
    databases_bound,
    doubles,
    files_bound,
    files_bytes,
    orphans_in_mlflow,
    orphans_in_prefect,
    too_much,
    unlike_twin,
)
from flows.registry import versions as registry
from flows.registry.champion import complete_log, read_moves
from flows.retrain.attempts import read_current
from flows.state.root import OPT_OUTS

KINDS = ("trainer", "flow run", "runner", "mlflow", "prefect", "up")
"""What is killed; `up` is `gptflow up` with all its processes."""
MORTAL = ("flow run", "runner", "prefect", "up")
"""Kills that end a retraining. It recovers from the others by itself."""
SPANS = {"start": 9.0, "plot": 3.0, "register": 1.0, "gate": 1.2, "prune": 0.3}
"""A kill comes within so many seconds after the start of a step, or at its end if that is earlier. In training, updates
are counted instead. In all other steps the kill comes at once."""
UPDATES = 200
"""A kill in training comes within so many updates: before the end, which a fast machine reaches soon."""
PRUNE = "prune"
NOTHING = "nothing"
PRUNE_EVERY = 4
MOST_TWINS = 2
_END_SECONDS = 300.0


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    kind: str
    step: str
    """The planned step of the flow, or PRUNE. The kill may be late and come in a later step."""
    share: float
    """The position in the step's span, from 0 to 1."""


@dataclass(frozen=True)
class Night:
    """The plan of a night."""

    number: int
    change: str
    kill: Kill | None
    prunes: bool


@dataclass
class Lived:
    """The events of a night."""

    number: int
    change: str
    outcome: str = ""
    seconds: float = 0.0
    """From the trigger to the end of the retraining, with a restart and without retention."""
    kill: str | None = None
    fell: str | None = None
    """The step in which the kill came; NOTHING if the run was over."""
    bytes: int = 0
    files_bytes: int = 0
    """Bytes without databases and logs."""


@dataclass
class Soak:
    """The results of a soak."""

    nights: int
    seed: int
    lived: list[Lived] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    killed_in_training: set[str] = field(default_factory=set)
    """The names of run directories whose training was killed."""
    twins: list[str] = field(default_factory=list)
    """The run directories that were trained again without a kill, and compared."""
    versions: int = 0
    promotions: int = 0
    looks: int = 0
    busy_looks: int = 0
    files_bound: int = 0
    databases_bound: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """Return the results for JSON, with a description of the machine."""
        machine = {"processors": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
        return {**asdict(self), "killed_in_training": sorted(self.killed_in_training), "machine": machine}


def planned(nights: int, seed: int, kill_share: float) -> Iterator[Night]:
    """Plan the nights, one after the other. Kinds of kill come from a shuffled deck, so each is as frequent."""
    draw = random.Random(seed)
    deck: list[str] = []
    for number in range(1, nights + 1):
        (change,) = draw.choices(list(CHANGES), weights=list(CHANGES.values()))
        prunes, kill = number % PRUNE_EVERY == 0, None
        if draw.random() < kill_share:
            deck = deck or draw.sample(KINDS, len(KINDS))
            kill = _drawn(_dealt(deck, change), change, prunes, draw)
        yield Night(number, change, kill, prunes)


def _dealt(deck: list[str], change: str) -> str:
    """Take the next kind from the deck. The trainer stays in the deck on a night without training."""
    is_absent = change == UNCHANGED and deck[-1] == "trainer" and len(deck) > 1
    return deck.pop(-2 if is_absent else -1)


def _drawn(kind: str, change: str, prunes: bool, draw: random.Random) -> Kill:
    step = "train" if kind == "trainer" else draw.choice(STEPS)
    if change == UNCHANGED and kind != "trainer":
        step = "start"  # the run ends before the later steps
    if prunes and kind != "trainer" and draw.random() < 0.25:
        step = PRUNE
    return Kill(kind, step, draw.random())


def soak(directory: Path, nights: int, seed: int, kill_share: float = 0.75, minutes: float = math.inf) -> Soak:
    """Run the nights, or as many as fit into `minutes`, in a new project in `directory`, and check everything."""
    began = time.monotonic()
    done = Soak(nights, seed)
    project = Project(directory, random.Random(seed))
    project.start()
    watch = ChampionWatch(project.root)
    watch.start()
    try:
        for night in planned(nights, seed, kill_share):
            if time.monotonic() - began > minutes * 60:
                break
            _live(project, night, done)
        done.nights = len(done.lived)
        _live(project, Night(done.nights + 1, "grown", None, prunes=True), done)
        watch.stop()
        _judge(project, watch, done)
    finally:
        watch.done.set()
        project.stop()
    done.violations += [f"still there after the stop: {process}" for process in project.left_over()]
    done.seconds = round(time.monotonic() - began, 1)
    return done


def _live(project: Project, night: Night, done: Soak) -> None:
    """Run one night: the text changes, the pipeline is retrained, retention runs, and something may be killed."""
    lived = Lived(night.number, night.change, kill=night.kill.kind if night.kill else None)
    done.lived.append(lived)
    project.text.live(night.change)
    in_prune = night.kill is not None and night.kill.step == PRUNE
    kill = None if in_prune else night.kill
    began = time.monotonic()
    lived.outcome = _run(project, f"retrain/{PIPELINE}", f"night {night.number}", kill, lived, done)
    lived.seconds = round(time.monotonic() - began, 1)
    if night.prunes:
        _compare_twin(project, done, MOST_TWINS)
        kill = night.kill if in_prune else None
        _run(project, "prune/prune", f"prune {night.number}", kill, lived, done)
    lived.bytes = bytes_of(project.root.path)
    lived.files_bytes = files_bytes(project.root)
    print(_line(lived), flush=True)


def _compare_twin(project: Project, done: Soak, most: int) -> None:
    """Compare a version that was killed in training with the same training without a kill, before retention runs."""
    if len(done.twins) < most:
        name, violations = unlike_twin(project, done.killed_in_training - set(done.twins))
        done.twins += [name] if name else []
        done.violations += violations


def _run(project: Project, deployment: str, key: str, kill: Kill | None, lived: Lived, done: Soak) -> str:
    """Trigger a run, kill what is planned, and return the verdict with which it ended, or the name of its state."""
    begin = project.log_size()
    run = project.trigger(deployment, key)
    if kill is not None:
        lived.fell = _strike(project, kill, run, begin, done)
    if not wait_for(lambda: _has_ended(project, run, done), _END_SECONDS, every=0.5):
        done.violations.append(f"{key}: {deployment} is {project.state(run)['name']} after {_END_SECONDS:.0f} s")
    state = project.state(run)
    is_excused = kill is not None and kill.kind in MORTAL and lived.fell != NOTHING
    if state["type"] != "COMPLETED" and not is_excused:
        done.violations.append(f"{key}: {deployment} ended as {state['name']}: {state.get('message')}")
    verdict, colon, _ = str(state.get("message")).partition(": ")
    return verdict if colon and state["type"] == "COMPLETED" else str(state["name"])


def _has_ended(project: Project, run: str, done: Soak) -> bool:
    if not project.is_up():
        done.violations.append("gptflow up ended by itself")
        project.start()
    return project.state(run)["type"] in ENDS


def _strike(project: Project, kill: Kill, run: str, begin: int, done: Soak) -> str:
    """Kill at the planned moment. Return the step in which the kill came."""
    is_prune = kill.step == PRUNE
    victims = _victims_at_the_moment(project, kill, run, begin)
    fell = PRUNE if is_prune else project.step(run, begin)
    is_over = fell is None or (is_prune and project.state(run)["type"] in ENDS)
    struck = [process for process in victims if _killed(process)]
    if fell == "train" and struck and kill.kind != "mlflow":
        done.killed_in_training.add(read_current(project.root.path / "runs" / PIPELINE).get("own", ""))
    if kill.kind == "up":
        assert project.process is not None
        project.process.wait()
        project.start()
    return NOTHING if is_over or not struck else str(fell)


def _victims_at_the_moment(project: Project, kill: Kill, run: str, begin: int) -> list[psutil.Process]:
    """Wait for the planned moment or the end of its step; return the processes to kill."""
    if kill.step == PRUNE:
        wait_for(lambda: project.state(run)["type"] not in ("SCHEDULED", "PENDING"), _END_SECONDS, every=0.1)
    else:
        wait_for(lambda: _has_come(project.step(run, begin), kill.step), _END_SECONDS, every=0.05)
    due = time.monotonic() + kill.share * SPANS.get(kill.step, 0.0)
    if kill.kind == "trainer":  # search before the moment: a fast machine soon ends the training
        wait_for(lambda: project.processes(kill.kind) or project.step(run, begin) != "train", _END_SECONDS, every=0.05)
    victims = project.processes(kill.kind) if kill.kind == "trainer" else []

    def is_due() -> bool:
        if kill.step == "train":
            return project.updates() >= kill.share * UPDATES or project.step(run, begin) != "train"
        return time.monotonic() >= due or (kill.step != PRUNE and project.step(run, begin) != kill.step)

    wait_for(is_due, _END_SECONDS, every=0.02)
    if kill.kind != "trainer":  # a flow run may not have started, and a dead server may be restarting
        wait_for(lambda: project.processes(kill.kind, run) or project.state(run)["type"] in ENDS, 60, every=0.1)
        victims = project.processes(kill.kind, run)
    return victims


def _killed(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        process.kill()
        return True
    return False


def _has_come(step: str | None, wanted: str) -> bool:
    return step is None or STEPS.index(step) >= STEPS.index(wanted)


def _judge(project: Project, watch: ChampionWatch, done: Soak) -> None:
    """Check for violations while everything is still up."""
    root = project.root
    complete_log(root, MODEL)
    last = done.lived[-1]
    if last.outcome not in ("promoted", "rejected"):
        done.violations.append(f"the last night, which nobody disturbed, ended as {last.outcome}")
    done.violations += orphans_in_prefect(project) + orphans_in_mlflow(root) + doubles(root)
    done.violations += too_much(root, done.nights) + watch.failures
    _compare_twin(project, done, MOST_TWINS + 1)
    if done.killed_in_training and not done.twins:
        done.violations.append("no version that was killed in training is left to be compared with a twin")
    done.versions = max(int(version.version) for version in registry.list_versions(root, MODEL))
    done.promotions = sum(move.kind == "promoted" for move in read_moves(root, MODEL))
    done.looks, done.busy_looks = watch.looks, watch.busy
    done.files_bound, done.databases_bound = files_bound(root), databases_bound(done.nights)


def _line(lived: Lived) -> str:
    struck = f"{lived.kill} killed in {lived.fell}" if lived.kill else ""
    size = f"{lived.bytes / 1e6:6.1f} MB"
    return f"{lived.number:3}  {lived.change:<15}  {lived.outcome:<13}  {lived.seconds:6.1f} s  {size}  {struck}"


def summary(done: Soak) -> str:
    """Return the table that is printed at the end."""
    outcomes = Counter(lived.outcome for lived in done.lived)
    struck = [lived for lived in done.lived if lived.kill]
    hit = [lived for lived in struck if lived.fell != NOTHING]
    seconds, last = sorted(lived.seconds for lived in done.lived), done.lived[-1]
    rows = {
        "nights": f"{done.nights}, and one in peace",
        "outcomes": _counts(outcomes),
        "kills": f"{len(hit)}; {len(struck) - len(hit)} more fell into nothing",
        "kills by kind": _counts(Counter(str(lived.kill) for lived in hit)),
        "kills by step": _counts(Counter(str(lived.fell) for lived in hit)),
        "versions": f"{done.versions} made, {done.promotions} promoted",
        "twins": f"{len(done.twins)} of {len(done.killed_in_training)} trainings that were killed, compared",
        "champion": f"{done.looks} looks, {done.busy_looks} of them at a busy database",
        "files": f"{last.files_bytes:,} bytes, bound {done.files_bound:,}",
        "databases": f"{last.bytes - last.files_bytes:,} bytes with logs, bound {done.databases_bound:,}",
        "night": f"median {seconds[len(seconds) // 2]} s, longest {seconds[-1]} s",
        "total": f"{done.seconds:,.0f} s",
        "violations": str(len(done.violations)),
    }
    table = "\n".join(f"{name:<14} {value}" for name, value in rows.items())
    return "\n".join([table, *(f"VIOLATION {violation}" for violation in done.violations)])


def _counts(counter: "Counter[str]") -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak of the command line; return the exit code. A project with violations is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-share", type=float, default=0.75, help="of the nights on which something is killed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further night after that")
    parser.add_argument("--json", type=Path, help="where everything that was found is written")
    asked = parser.parse_args(arguments)
    os.environ.update(OPT_OUTS)
    directory = Path(tempfile.mkdtemp(prefix="gptflow-soak-"))
    done = soak(directory, asked.nights, asked.seed, asked.kill_share, asked.minutes)
    print(summary(done))
    if done.violations:
        print(f"the project is left in {directory}")
    else:
        shutil.rmtree(directory)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(done.as_dict(), indent=1) + "\n")
    return 1 if done.violations else 0


if __name__ == "__main__":
    sys.exit(main())

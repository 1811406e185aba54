"""Kill a process between any two writes of a release: a registration, a promotion or a rollback.

`python -m tests.faults.release_points` has imported everything and has no database open. Each line of JSON on its
standard input is a request. For each request it forks a child that runs the requested actions with the real functions,
and answers with the child's exit code. If the request names a crash point, the child kills itself there with SIGKILL.
A crash point is the moment before a transaction is committed, or before a file inside the state root is created,
renamed or removed.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow.pyfunc.model
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import torch  # noqa: F401  (imported once here, like MLflow, instead of by each child)
from mlflow import MlflowClient
from mlflow.utils.requirements_utils import _init_modules_to_packages_map
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import configure_mappers

from flows.registry import champion
from flows.registry import register as release
from flows.registry import versions as registry
from flows.registry.loading import load
from flows.state.root import OPT_OUTS, StateRoot
from gptcore.manifest import sha256_of, sha256_of_file
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import get_tokenizer
from gptcore.training.run_directory import RunDirectory
from tests.fixtures import TinyRegistry

MODEL = "gpt-tiny"
PASSING = ("/.tmp/", "uploading", "mlflow.db")
"""Files that may be left over: those that retention removes, and MLflow's own half of a small upload."""
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class Points:
    """Record every crash point by name, and die at the requested one."""

    def __init__(self, root: StateRoot, kill_at: int | None, notes: Path) -> None:
        self.root, self.kill_at, self.notes = f"{root.path}/", kill_at, notes.open("w")
        self.count = 0
        self.written: set[int] = set()
        """Connections whose transaction has changed something."""
        event.listen(Engine, "before_cursor_execute", self.on_statement)
        event.listen(Engine, "commit", self.on_commit)
        sys.addaudithook(self.on_event)

    def reached(self, name: str) -> None:
        self.notes.write(f"{name}\n")
        self.notes.flush()
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def on_statement(self, connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE"):
            self.written.add(id(connection))

    def on_commit(self, connection: Connection) -> None:
        if id(connection) in self.written:
            self.written.discard(id(connection))
            self.reached(_store_method(sys._getframe()))

    def on_event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in FILE_EVENTS or (name == "open" and not _writes(arguments)):
            return None
        for path in (os.fsdecode(one) for one in arguments if isinstance(one, str | bytes)):
            if path.startswith(self.root) and "/mlflow.db" not in path and "/locks" not in path:
                return self.reached(f"{name.removeprefix('os.')} {_without_ids(path.removeprefix(self.root))}")
        return None


def _store_method(frame: Any) -> str:
    """Return the name of the outermost function of MLflow's store on the stack."""
    found = "?"
    while frame is not None:
        if frame.f_code.co_filename.endswith("sqlalchemy_store.py"):
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _without_ids(path: str) -> str:
    path = re.sub(r"m-[0-9a-f]{32}", "MODEL", re.sub(r"/[0-9a-f]{32}/", "/RUN/", path))
    return re.sub(r"uploading\..*", "uploading", re.sub(r"\.tmp-[^/]*", ".tmp", path))


# State roots before the kill.


def empty(root: StateRoot) -> None:
    """Create MLflow's empty database. The tests copy it, because creating the tables takes seconds."""
    MlflowClient(root.tracking_uri).search_experiments()


def new(root: StateRoot) -> None:
    """Prepare a finished training whose MLflow run is open and that is not registered yet."""
    tiny = TinyRegistry(root)
    key = sha256_of(1)
    _, tokens_sha256 = tiny.text("one")
    tiny.run_directory(1, key, tokens_sha256, seed=1)
    run = tiny.client.create_run(tiny.experiment, tags={"run_key": key, "attempt": "1", "pipeline": "tiny"})
    tiny.client.delete_registered_model(MODEL)
    (root.path / "facts.json").write_text(json.dumps({"key": key, "mlflow_run_id": run.info.run_id}))


def registered(root: StateRoot) -> None:
    """Make version 1 the champion, and register version 2."""
    tiny = TinyRegistry(root)
    tiny.register()
    champion.promote(root, MODEL, "1", "night 1", champion.GATE, over=None)
    tiny.register()


def promoted(root: StateRoot) -> None:
    """Make version 1 the champion, then version 2."""
    registered(root)
    champion.promote(root, MODEL, "2", "night 2", champion.GATE, over="1")


def moved_outside(root: StateRoot) -> None:
    """Set the champion's alias in MLflow itself, as a user can."""
    registered(root)
    MlflowClient(root.tracking_uri).set_registered_model_alias(MODEL, registry.CHAMPION, "2")


# Actions that are killed.


def register(root: StateRoot) -> None:
    facts = json.loads((root.path / "facts.json").read_text())
    run = RunDirectory(root.run_directory("tiny", facts["key"], 1))
    origin = {"pipeline": "tiny", "weights_sha256": sha256_of_file(run.weights)}
    candidate = release.Candidate(MODEL, facts["key"], 1, facts["mlflow_run_id"], origin)
    tokens = cast(Tokens, SimpleNamespace(load_tokenizer=lambda: get_tokenizer("bytes")))
    version = release.register(root, run, tokens, candidate)
    champion.promote(root, MODEL, version, "the first", champion.GATE, over=None)


def promote(root: StateRoot) -> None:
    champion.promote(root, MODEL, "2", "better", champion.GATE, over="1")


def rollback(root: StateRoot) -> None:
    champion.rollback(root, MODEL, "writes nonsense", "ann")


def settle(root: StateRoot) -> None:
    champion.complete_log(root, MODEL)


# Looks afterwards.


def look(root: StateRoot) -> None:
    """Load the champion and report its version, or null if there is no champion."""
    found = registry.find_champion(root, MODEL)
    if found is not None:
        load(root, found)
    _tell(root, None if found is None else str(found.version))


def look_at_everything(root: StateRoot) -> None:
    """Report the contents of the registry, the runs and the artifacts."""
    client = MlflowClient(root.tracking_uri)
    model = client.get_registered_model(MODEL)
    experiments = [one.experiment_id for one in client.search_experiments()]
    files = sorted(_without_ids(str(path.relative_to(root.path))) for path in root.path.rglob("*") if path.is_file())
    versions = registry.list_versions(root, MODEL)
    champion.complete_log(root, MODEL)
    _tell(
        root,
        {
            "versions": [[str(one.version), one.tags.get("run_key"), one.tags.get("withdrawn")] for one in versions],
            "aliases": {alias: str(version) for alias, version in sorted(model.aliases.items())},
            "moves": [
                [one.source, one.target, one.kind, one.reason, one.by, one.is_done]
                for one in champion.read_moves(root, MODEL)
            ],
            "runs": [run.info.status for run in client.search_runs(experiments)],
            "models": [str(one.status) for one in client.search_logged_models(experiments)],
            "files": [path for path in files if not any(part in path for part in PASSING)],
        },
    )


def _tell(root: StateRoot, value: Any) -> None:
    with root.path.with_name("looked").open("a") as file:
        file.write(json.dumps(value) + "\n")


def _child(asked: dict[str, Any]) -> None:
    root = StateRoot(Path(asked["root"]))
    os.environ["MLFLOW_TRACKING_URI"] = root.tracking_uri
    mlflow.set_tracking_uri(root.tracking_uri)
    actions: list[Callable[[StateRoot], None]] = [globals()[name] for name in asked["do"]]
    if asked["notes"]:
        Points(root, asked["kill_at"], Path(asked["notes"]))
    for action in actions:
        action(root)


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    configure_mappers()
    _init_modules_to_packages_map()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            code = 1
            try:
                _child(json.loads(line))
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


class Forker:
    """The parent's side of the process that forks."""

    def __init__(self, directory: Path) -> None:
        self.root = StateRoot(directory / "mlruns")
        self.notes, self.database = directory / "notes", directory / "mlflow.db"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        self.log = directory / "forker.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.release_points"],
            env={**kept, **OPT_OUTS, "OMP_NUM_THREADS": "1", "TMPDIR": str(directory), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def do(self, *actions: str, notes: bool = False, kill_at: int | None = None) -> int:
        """Run actions in a child, in turn; return its exit code, which is negative if a signal ended it."""
        asked = {"do": actions, "root": str(self.root.path), "notes": str(self.notes) if notes else ""}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({**asked, "kill_at": kill_at}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return int(answer)

    def points(self) -> list[str]:
        """Return the crash points that the last child with `notes` reached."""
        return self.notes.read_text().splitlines()

    def looked(self) -> list[Any]:
        """Return the reports of all looks since the last call."""
        path = self.root.path.with_name("looked")
        lines = path.read_text().splitlines()
        path.unlink()
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    main()

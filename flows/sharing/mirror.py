"""What another machine needs to go on with a pipeline, kept in the object store while it is made.

    corpora/<id>/  tokens/<id>/                  for ever, as here: gate and comparison read them
    runs/<pipeline>/current.json                 which run directories the pipeline works on
    runs/<pipeline>/<run>/config.json            after start.safetensors, so that it stands for both
    runs/<pipeline>/<run>/checkpoints/step-*/    the newest one, and metrics.jsonl up to it or a little further
    runs/<pipeline>/<run>/final/                 until the version has its verdict; then the run is gone from there

A thread pushes while the model trains, which never waits for it; only the registration waits until everything that the
version names is there. Whoever begins a run of the pipeline, on whatever machine, first brings what is newer there.
Without an object store nothing here does anything.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from flows import attempt
from flows.attempt import CURRENT, Attempt
from flows.pipelines import Pipeline
from flows.sharing import advisory
from flows.sharing.store import Store
from flows.state import StateRoot
from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.errors import GPTCoreError, SourceUnavailable
from gptcore.learning.rundir import RunDirectory
from gptcore.manifest import MANIFEST
from gptcore.sections import parse

_POLL_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 30.0
_SETTLE_SECONDS = 600.0
_HURRIED_SECONDS = 5.0
_RUN = re.compile(r"[0-9a-f]{16}-[0-9]+")
_log = logging.getLogger(__name__)


def bring(root: StateRoot, pipeline: Pipeline, sources_overridden: bool = False) -> str | None:
    """Brings the training that the pipeline works on, if the store has more of it than this machine.

    Returns the run's name if something was brought. The pipeline's lock must be held. Raises StoreAway or StoreRefuses,
    and CheckpointError if what is there is damaged.
    """
    if (store := root.store) is None:
        return None
    above = f"runs/{pipeline.name}"
    name = _current(store, above).get(attempt.kind(sources_overridden), "")
    if not _RUN.fullmatch(name):
        return None
    run, there = RunDirectory(root.path / above / name), f"{above}/{name}"
    config = _config(store, there)
    if config is None or attempt.is_judged(root, pipeline, config.run_key, name, sources_overridden):
        return None
    brought = _bring_run(root, store, run, there, config)
    attempt.note(run.path, sources_overridden)
    return name if brought else None


def forget(root: StateRoot, found: Attempt) -> None:
    """Removes from the store the run of a version that has its verdict. What cannot be removed now, `prune` removes."""
    if (store := root.store) is not None:
        with suppress(SourceUnavailable):
            store.remove(_relative(root, found.run.path))


def in_use(store: Store) -> tuple[set[str], set[str]]:
    """The run directories that pipelines work on, on whatever machine, as they are named in the store; their tokens."""
    runs, tokens = set(), set()
    for key in store.keys("runs/"):
        if key.endswith(f"/{CURRENT}"):
            above = key.removesuffix(f"/{CURRENT}")
            for name in filter(_RUN.fullmatch, _current(store, above).values()):
                runs.add(f"{above}/{name}")
                if (config := _config(store, f"{above}/{name}")) is not None:
                    tokens.add(config.tokens_sha256[:16])
    return runs, tokens


def runs(store: Store) -> set[str]:
    """Every run directory that has something in the store."""
    found = (key.split("/") for key in store.keys("runs/"))
    return {"/".join(parts[:3]) for parts in found if len(parts) > 3}


def corpus_of(store: Store, tokens: str) -> str:
    """The name of the snapshot that token files were made from; empty where that is unknown."""
    found = store.read(f"tokens/{tokens}/{MANIFEST}")
    about = _parsed(found.body).get("about") if found else None
    return str(about.get("corpus_sha256", ""))[:16] if isinstance(about, dict) else ""


class Following:
    """While this context lasts, a thread pushes what the training leaves. The store may come and go."""

    def __init__(self, root: StateRoot, found: Attempt, sources_overridden: bool) -> None:
        self.root, self.found, self.kind = root, found, attempt.kind(sources_overridden)
        self.store = root.store
        self.run, self.there = found.run, _relative(root, found.run.path)
        self.allowed = advisory.guard()
        self.has_begun = False
        self.pushed: set[str] = set()
        self.error: GPTCoreError | None = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="run directory to the store", daemon=True)

    def __enter__(self) -> "Following":
        if self.store is not None:
            self.thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.ending.set()
        if self.thread.is_alive():
            self.thread.join(_HURRIED_SECONDS)

    def settle(self) -> None:
        """Returns when everything is in the store that the version will name. Raises what keeps it from getting there.

        A lost lock comes first: who is cut off from the store may be cut off from the database too.
        """
        if self.store is None:
            return
        self.ending.set()
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(1.0)
            advisory.ensure_not_lost()
        try:
            self.push()
        except SourceUnavailable:
            advisory.ensure_held()
            raise

    def _follow(self) -> None:
        pause = _POLL_SECONDS
        while True:
            is_last = self.ending.is_set()
            pause = _POLL_SECONDS if self._is_pushed() else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if is_last or self.error is not None:
                return
            self.ending.wait(pause)

    def _is_pushed(self) -> bool:
        try:
            self.push()
        except (SourceUnavailable, OSError) as error:
            _log.warning("the object store does not take %s for now: %s", self.run.path.name, error)
            return False
        except GPTCoreError as error:  # it will not take it later either; `settle` raises it
            _log.warning("the object store does not take %s: %s", self.run.path.name, error)
            self.error = error
            return False
        except RuntimeError:  # the interpreter ends, and takes boto3's threads from this one
            if not self.ending.is_set():
                raise
            return False
        return True

    def push(self) -> None:
        """Pushes whatever is new. Raises StoreAway, StoreRefuses or LockLost."""
        assert self.store is not None, "only followed where there is one"
        if not self.has_begun:
            self._begin(self.store)
        if manifest.is_committed(self.run.final):
            self._push(self.store, self.run.final)
            return
        newest = max(self.run.checkpoints.glob("step-*"), default=None)
        if newest is not None and self._push(self.store, newest):
            above = _relative(self.root, newest.parent)
            for name in self.store.names(above):
                if name < newest.name:
                    self.store.remove(f"{above}/{name}")

    def _begin(self, store: Store) -> None:
        for directory in (self.found.snapshot.path, self.found.tokens.path):
            store.push(directory, _relative(self.root, directory), self.allowed)
        if self.run.start.exists():
            store.upload(self.run.start, f"{self.there}/{self.run.start.name}")
        store.put(f"{self.there}/config.json", (self.run.path / "config.json").read_bytes())
        key = f"{_relative(self.root, self.run.path.parent)}/{CURRENT}"
        before = store.read(key)
        body = {**_parsed(before.body if before else b"{}"), self.kind: self.run.path.name}
        self.allowed()
        store.write(key, json.dumps(body).encode() + b"\n", before)
        self.has_begun = True

    def _push(self, store: Store, directory: Path) -> bool:
        """Whether the directory was not there before."""
        if directory.name in self.pushed:
            return False
        with _kept(self.root, directory) as kept:  # the trainer may remove it meanwhile
            if self.run.metrics.exists():
                store.upload(self.run.metrics, f"{self.there}/{self.run.metrics.name}")
            store.push(kept, _relative(self.root, directory), self.allowed)
        self.pushed.add(directory.name)
        return True


def _bring_run(root: StateRoot, store: Store, run: RunDirectory, there: str, config: RunConfig) -> bool:
    if run.result() is not None:
        return False
    steps = [int(name.removeprefix("step-")) for name in store.names(f"{there}/checkpoints") if "step-" in name]
    newest, is_finished = max(steps, default=0), "final" in store.names(there)
    if not is_finished and newest <= run.saved_step() and (run.path / "config.json").exists():
        return False
    tokens = root.token_files(config.tokens_sha256)
    root.corpus(manifest.about(tokens)["corpus_sha256"])
    start = None
    with manifest.staging(root.mirror) as staged:
        if config.start is not None:
            start = staged / run.start.name
            store.download(f"{there}/{start.name}", start)
        run.prepare(config, start)
        if f"{there}/{run.metrics.name}" in store.keys(f"{there}/{run.metrics.name}"):
            store.download(f"{there}/{run.metrics.name}", staged / run.metrics.name)
            (staged / run.metrics.name).replace(run.metrics)
    if is_finished:
        return store.pull(f"{there}/final", run.final)
    if newest:
        name = f"step-{newest:08d}"
        store.pull(f"{there}/checkpoints/{name}", run.checkpoints / name)
    return True


@contextmanager
def _kept(root: StateRoot, directory: Path) -> Iterator[Path]:
    """The directory's files under another name, as long as this lasts, whoever removes them under their own."""
    with manifest.staging(root.mirror) as staged:
        for name in (MANIFEST, *manifest.names(directory)):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(directory / name, staged / name)
        yield staged


def _config(store: Store, there: str) -> RunConfig | None:
    found = store.read(f"{there}/config.json")
    return None if found is None else parse(RunConfig, _parsed(found.body), f"{store.url}: {there}/config.json")


def _current(store: Store, above: str) -> dict[str, str]:
    found = store.read(f"{above}/{CURRENT}")
    return {kind: name for kind, name in _parsed(found.body if found else b"{}").items() if isinstance(name, str)}


def _parsed(body: bytes) -> dict[str, object]:
    with suppress(ValueError):
        found = json.loads(body)
        if isinstance(found, dict):
            return found
    return {}


def _relative(root: StateRoot, path: Path) -> str:
    return path.relative_to(root.path).as_posix()

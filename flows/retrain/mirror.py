"""The mirror: a copy in the object store of everything that another machine needs to resume a pipeline's training.

    corpora/<id>/  tokens/<id>/                  kept like the local ones: gate and comparison read them
    runs/<pipeline>/current.json                 the run directories that the pipeline works on
    runs/<pipeline>/<run>/config.json            uploaded after start.safetensors: if it exists, so does the start
    runs/<pipeline>/<run>/checkpoints/step-*/    the newest checkpoint, and metrics.jsonl up to it or a little further
    runs/<pipeline>/<run>/final/                 until the version has its verdict; then the run is removed

A thread uploads while the model trains, and the training never waits for it. Only the registration waits until the
store has everything that the version names. A new run of the pipeline, on any machine, first downloads newer state from
the store. Without an object store, all functions here do nothing.
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

from flows.config.pipelines import Pipeline
from flows.retrain import attempts
from flows.retrain.attempts import CURRENT, Attempt
from flows.state import postgres_lock
from flows.state.object_store import Store
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.errors import GPTCoreError, SourceUnavailable
from gptcore.manifest import MANIFEST
from gptcore.records import parse_record, read_bytes
from gptcore.sections import parse_recorded
from gptcore.training.run_directory import RunDirectory

_POLL_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 30.0
_FINISH_SECONDS = 600.0
_EXIT_SECONDS = 5.0
_RUN = re.compile(r"[0-9a-f]{16}-[0-9]+")
_log = logging.getLogger(__name__)


def download_training(root: StateRoot, pipeline: Pipeline, sources_overridden: bool = False) -> str | None:
    """Download the training that the pipeline works on, if the store has a newer state of it than this machine.

    Return the run's name if something was downloaded, else None. The pipeline's lock must be held. Raises
    StoreUnreachable or StoreRefused, and CheckpointError if the stored training is damaged.
    """
    if (store := root.store) is None:
        return None
    parent = f"runs/{pipeline.name}"
    name = _read_current(store, parent).get(attempts.current_key(sources_overridden), "")
    if not _RUN.fullmatch(name):
        return None
    run, key = RunDirectory(root.path / parent / name), f"{parent}/{name}"
    config = _read_config(store, key)
    if config is None or attempts.is_judged(root, pipeline, config.run_key, name, sources_overridden):
        return None
    is_newer = _download_run(root, store, run, key, config)
    attempts.write_current(run.path, sources_overridden)
    return name if is_newer else None


def remove_training(root: StateRoot, attempt: Attempt) -> None:
    """Remove the run of a version that has its verdict from the store. If that fails, `prune` removes it later."""
    if (store := root.store) is not None:
        with suppress(SourceUnavailable):
            store.remove(_store_key(root, attempt.run.path))


def find_in_use(store: Store) -> tuple[set[str], set[str]]:
    """Return the keys of the run directories that pipelines of any machine work on, and the names of their tokens."""
    runs, tokens = set(), set()
    for key in store.list_keys("runs/"):
        if key.endswith(f"/{CURRENT}"):
            parent = key.removesuffix(f"/{CURRENT}")
            for name in filter(_RUN.fullmatch, _read_current(store, parent).values()):
                runs.add(f"{parent}/{name}")
                if (config := _read_config(store, f"{parent}/{name}")) is not None:
                    tokens.add(config.tokens_sha256[:16])
    return runs, tokens


def list_runs(store: Store) -> set[str]:
    """Return the keys of all run directories that have files in the store."""
    split_keys = (key.split("/") for key in store.list_keys("runs/"))
    return {"/".join(parts[:3]) for parts in split_keys if len(parts) > 3}


def find_corpus(store: Store, tokens: str) -> str:
    """Return the name of the snapshot that token files were made from. Empty if that is unknown."""
    stored = store.read(f"tokens/{tokens}/{MANIFEST}")
    about = _parse(stored.body).get("about") if stored else None
    return str(about.get("corpus_sha256", ""))[:16] if isinstance(about, dict) else ""


class BackgroundUpload:
    """A context in which a thread uploads what the training writes. It retries while the store is unreachable."""

    def __init__(self, root: StateRoot, attempt: Attempt, sources_overridden: bool) -> None:
        self.root, self.attempt, self.kind = root, attempt, attempts.current_key(sources_overridden)
        self.store = root.store
        self.run, self.key = attempt.run, _store_key(root, attempt.run.path)
        self.check_lock = postgres_lock.make_lock_check()
        self.has_started = False
        self.pushed: set[str] = set()
        self.error: GPTCoreError | None = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="run directory to the store", daemon=True)

    def __enter__(self) -> "BackgroundUpload":
        if self.store is not None:
            self.thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.ending.set()
        if self.thread.is_alive():
            self.thread.join(_EXIT_SECONDS)

    def finish(self) -> None:
        """Wait until the store has everything that the version will name. Raises the error that prevents that.

        If the lock is lost, raises LockLost first: a machine without the store may have lost the database too.
        """
        if self.store is None:
            return
        self.ending.set()
        deadline = time.monotonic() + _FINISH_SECONDS
        while self.thread.is_alive() and time.monotonic() < deadline:
            self.thread.join(1.0)
            postgres_lock.ensure_not_lost()
        try:
            self.push()
        except SourceUnavailable:
            postgres_lock.ensure_held()
            raise

    def _run(self) -> None:
        pause = _POLL_SECONDS
        while True:
            is_last = self.ending.is_set()
            pause = _POLL_SECONDS if self._try_push() else min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if is_last or self.error is not None:
                return
            self.ending.wait(pause)

    def _try_push(self) -> bool:
        """Push, and return whether that worked. Keep an error that a retry cannot fix for `finish`."""
        try:
            self.push()
        except (SourceUnavailable, OSError) as error:
            _log.warning("the object store does not take %s for now: %s", self.run.path.name, error)
            return False
        except GPTCoreError as error:  # a retry will not help; `finish` raises it
            _log.warning("the object store does not take %s: %s", self.run.path.name, error)
            self.error = error
            return False
        except RuntimeError:  # the interpreter is shutting down, and this thread cannot use boto3's threads any more
            if not self.ending.is_set():
                raise
            return False
        return True

    def push(self) -> None:
        """Upload what is new. Raises StoreUnreachable, StoreRefused or LockLost."""
        assert self.store is not None, "the thread only starts if there is a store"
        if not self.has_started:
            self._start(self.store)
        if manifest.is_committed(self.run.final):
            self._push_directory(self.store, self.run.final)
            return
        newest = max(self.run.checkpoints.glob("step-*"), default=None)
        if newest is not None and self._push_directory(self.store, newest):
            parent = _store_key(self.root, newest.parent)
            for name in self.store.list_directories(parent):
                if name < newest.name:
                    self.store.remove(f"{parent}/{name}")

    def _start(self, store: Store) -> None:
        """Upload snapshot, tokens, start and config.json, and record the run directory in the store's current.json."""
        for directory in (self.attempt.snapshot.path, self.attempt.tokens.path):
            store.push(directory, _store_key(self.root, directory), self.check_lock)
        if self.run.start.exists():
            store.upload(self.run.start, f"{self.key}/{self.run.start.name}")
        store.put(f"{self.key}/config.json", read_bytes(self.run.path / "config.json"))
        key = f"{_store_key(self.root, self.run.path.parent)}/{CURRENT}"
        before = store.read(key)
        body = {**_parse(before.body if before else b"{}"), self.kind: self.run.path.name}
        self.check_lock()
        store.write(key, json.dumps(body).encode() + b"\n", before)
        self.has_started = True

    def _push_directory(self, store: Store, directory: Path) -> bool:
        """Upload metrics.jsonl and a directory. Return False if the directory was uploaded before."""
        if directory.name in self.pushed:
            return False
        with _link_files(self.root, directory) as linked:  # the trainer may remove the directory meanwhile
            if self.run.metrics.exists():
                store.upload(self.run.metrics, f"{self.key}/{self.run.metrics.name}")
            store.push(linked, _store_key(self.root, directory), self.check_lock)
        self.pushed.add(directory.name)
        return True


def _download_run(root: StateRoot, store: Store, run: RunDirectory, key: str, config: RunConfig) -> bool:
    """Download a run directory from `key` if the store has a newer state of it. Return whether it has."""
    if run.read_result() is not None:
        return False
    steps = [
        int(name.removeprefix("step-")) for name in store.list_directories(f"{key}/checkpoints") if "step-" in name
    ]
    newest, is_finished = max(steps, default=0), "final" in store.list_directories(key)
    if not is_finished and newest <= run.saved_step() and (run.path / "config.json").exists():
        return False
    tokens = root.fetch_tokens(config.tokens_sha256)
    root.fetch_corpus(manifest.read_about(tokens)["corpus_sha256"])
    start = None
    with manifest.stage(root.mirror) as staged:
        if config.start is not None:
            start = staged / run.start.name
            store.download(f"{key}/{start.name}", start)
        run.prepare(config, start)
        if f"{key}/{run.metrics.name}" in store.list_keys(f"{key}/{run.metrics.name}"):
            store.download(f"{key}/{run.metrics.name}", staged / run.metrics.name)
            (staged / run.metrics.name).replace(run.metrics)
    if is_finished:
        return store.pull(f"{key}/final", run.final)
    if newest:
        name = f"step-{newest:08d}"
        store.pull(f"{key}/checkpoints/{name}", run.checkpoints / name)
    return True


@contextmanager
def _link_files(root: StateRoot, directory: Path) -> Iterator[Path]:
    """Yield a directory of hard links to the files, which exists inside this context even if the files are removed."""
    with manifest.stage(root.mirror) as staged:
        for name in (MANIFEST, *manifest.list_files(directory)):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(directory / name, staged / name)
        yield staged


def _read_config(store: Store, key: str) -> RunConfig | None:
    """Return a stored run's config.json, None if it is missing. Raises ConfigError."""
    stored = store.read(f"{key}/config.json")
    return None if stored is None else parse_recorded(RunConfig, _parse(stored.body), f"{store.url}: {key}/config.json")


def _read_current(store: Store, parent: str) -> dict[str, str]:
    """Return a pipeline's current.json in the store. Empty if it is missing."""
    stored = store.read(f"{parent}/{CURRENT}")
    return {kind: name for kind, name in _parse(stored.body if stored else b"{}").items() if isinstance(name, str)}


def _parse(body: bytes) -> dict[str, object]:
    """Return a JSON object. Empty if the text is not one."""
    return parse_record(body, dict[str, object]) or {}


def _store_key(root: StateRoot, path: Path) -> str:
    """Return the key of a file or directory of the state root: its relative path."""
    return path.relative_to(root.path).as_posix()

"""Retention: find files of the state root that are no longer needed, and delete them.

Of every model that pipelines.yaml names, these versions stay:

- the newest ones, the champion, and every version that a rollback may go back to
- versions with an alias
- versions that a kept one was made from or is a copy of
- versions that no pipeline trained here

Retention deletes all files of a dropped version: its run directory, the artifacts of the model and those of the MLflow
run. The run's params and metrics stay. Then it deletes abandoned trainings, and the snapshots and token files that no
kept version or training names.

A pipeline's lock is held only while directories are renamed, so that no run of the pipeline is skipped. Their files are
deleted afterwards. A version is removed from the registry before its files. So if the process is killed in between, all
kept versions are complete. A tag of the MLflow run records that its files are still to be deleted, and the next call
deletes them.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.registry import artifacts
from flows.registry.champion import hold_champion
from flows.registry.moves import trace_champions
from flows.registry.tags import VersionTags
from flows.registry.versions import RegistryError, list_models, list_registered, list_versions, uri_of
from flows.retrain import mirror
from flows.retrain.attempts import read_current
from flows.state import postgres_lock
from flows.state.locks import try_lock
from flows.state.object_store import Store
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.errors import CheckpointError, ConfigError
from gptcore.training.run_directory import RunDirectory

_PRUNED = "pruned"
"""Tag of an MLflow run whose version was dropped. First "intent", then "done"."""
_PRUNED_KEY = "pruned_run_key"
"""Tag that holds the dropped run's key. Under another name than `run_key`, so that a new training ignores the run."""

Versions = list[ModelVersion]


@dataclass
class Freed:
    """What a call deleted or, in a dry run, would delete."""

    versions: list[str] = field(default_factory=list)
    """URIs of the dropped versions."""
    paths: dict[str, int] = field(default_factory=dict)
    """Size of each directory in bytes."""
    busy: list[str] = field(default_factory=list)
    """Running pipelines. While any pipeline runs, snapshots and token files stay."""

    @property
    def bytes(self) -> int:
        """Total size in bytes."""
        return sum(self.paths.values())

    def lines(self) -> list[str]:
        """Return one line of text for each version and each directory."""
        return [
            *(f"{'version':>15}  {uri}" for uri in self.versions),
            *(f"{n:>15,}  {p}" for p, n in self.paths.items()),
        ]

    def summary(self, dry_run: bool) -> str:
        """Return a sentence with the numbers of versions, directories and bytes."""
        would = "would be " if dry_run else ""
        stay = f"; while {', '.join(self.busy)} runs, snapshots and token files stay" if self.busy else ""
        return f"{len(self.versions)} versions, {len(self.paths)} directories, {self.bytes:,} bytes {would}freed{stay}"


def prune(root: StateRoot, keep: Mapping[str, int], dry_run: bool = False) -> Freed:
    """Delete what is no longer needed. `keep` is the number of newest versions to keep, for each registered model.

    Raises RegistryError if MLflow does not answer. The next call then continues.
    """
    try:
        return _Pruning(root, keep, dry_run).run()
    except MlflowException as error:
        raise RegistryError(f"the registry at {root.tracking_address} does not answer: {error}") from None


class _Pruning:
    """One call of `prune`: its parameters, and what it has deleted so far."""

    def __init__(self, root: StateRoot, keep: Mapping[str, int], dry_run: bool) -> None:
        self.root, self.keep, self.dry_run = root, keep, dry_run
        self.client = MlflowClient(root.tracking_uri)
        self.freed = Freed()
        self.renamed: dict[Path, Path] = {}
        """The present path of each path that `free` was called with."""
        self.tokens_of_configs: dict[tuple[Path, int], str] = {}
        """Name of the token directory, by path and time of a run directory's config.json."""

    def run(self) -> Freed:
        """Delete what is no longer needed, or list it in a dry run. Champions cannot change meanwhile."""
        store = self.root.store
        runs_before = store.list_times("runs/") if store is not None else {}
        with ExitStack() as held:
            models = set(list_models(self.root))
            pruned = sorted(models & self.keep.keys())
            reachable = {
                name: set(trace_champions(held.enter_context(hold_champion(self.root, name)))) for name in pruned
            }
            every = list_versions(self.root)
            kept, dropped = self.select(every, reachable)
            for version in dropped:
                self.drop(version)
        for run in self.find_runs_to_free(kept, dropped):
            self.free_run(run)
        self.free_abandoned(every)
        self.free_shared(kept, runs_before)
        self.sweep()
        return self.freed

    def select(self, every: Versions, reachable: Mapping[str, set[str | None]]) -> tuple[Versions, Versions]:
        """Return the versions to keep, and those to drop."""
        aliased = {(name, str(number)) for name in reachable for number in self.find_aliased(name)}
        kept: Versions = []
        rest: Versions = []
        left = dict(self.keep)
        for version in sorted(every, key=lambda version: -int(version.version)):
            name, number = version.name, str(version.version)
            tags = VersionTags.from_tags(version.tags)
            is_ours = name in reachable and tags.run_key is not None and tags.verdict is not None
            is_new = left.get(name, 0) > 0
            left[name] = left.get(name, 0) - 1
            stays = not is_ours or is_new or number in reachable[name] or (name, number) in aliased
            (kept if stays else rest).append(version)
        return self.add_origins(kept, rest)

    def add_origins(self, kept: Versions, rest: Versions) -> tuple[Versions, Versions]:
        """Move to `kept` the versions that a kept one was made from or shares an MLflow run with."""
        starts = set(self.find_starts())
        while True:
            runs = {version.run_id for version in kept}
            named = starts | {uri for v in kept for uri in (v.source, VersionTags.from_tags(v.tags).started_from)}
            is_needed = [version.run_id in runs or uri_of(version) in named for version in rest]
            if not any(is_needed):
                return kept, rest
            kept = kept + [version for version, needed in zip(rest, is_needed) if needed]
            rest = [version for version, needed in zip(rest, is_needed) if not needed]

    def find_aliased(self, name: str) -> set[str]:
        """Return the versions of a model that have an alias."""
        return {str(number) for model in list_registered(self.root, name) for number in model.aliases.values()}

    def drop(self, version: ModelVersion) -> None:
        """Record on the version's MLflow run that its files are to be deleted, then delete the version."""
        self.freed.versions.append(uri_of(version))
        if self.dry_run:
            return
        key, run_id = VersionTags.from_tags(version.tags).run_key, version.run_id or ""
        with suppress(MlflowException):  # somebody has deleted the run; delete its version anyway
            self.client.set_tag(run_id, _PRUNED_KEY, key)
            self.client.set_tag(run_id, _PRUNED, "intent")
            self.client.delete_tag(run_id, "run_key")
        self.client.delete_model_version(version.name, str(version.version))

    def find_runs_to_free(self, kept: Versions, dropped: Versions) -> list[Run]:
        """Return the MLflow runs of versions that this call, or an earlier call that was killed, has dropped."""
        runs = [self.find_run(version) for version in dropped]
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        runs += self.client.search_runs(experiments, f"tags.{_PRUNED} = 'intent'")
        needed = {version.run_id for version in kept}
        return list({run.info.run_id: run for run in runs if run and run.info.run_id not in needed}.values())

    def find_run(self, version: ModelVersion) -> Run | None:
        """Return the MLflow run that made the version. None if somebody has deleted the run."""
        with suppress(MlflowException):
            return self.client.get_run(version.run_id or "")
        return None

    def free_run(self, run: Run) -> None:
        """Delete the run directory, the logged models and the artifacts of an MLflow run."""
        key = run.data.tags.get(_PRUNED_KEY) or run.data.tags["run_key"]
        is_restarted = self.is_restarted(run, key)
        for directory in (self.root.path / "runs").glob(f"*/{key[:16]}-{run.data.tags['attempt']}"):
            with try_lock(directory / "lock") as is_free:
                if not is_free:
                    return  # a process uses it; the next call tries again
                if not is_restarted:
                    self.free(directory)
        self.delete_freed()
        for output in run.outputs.model_outputs if run.outputs else ():
            with suppress(MlflowException):  # deleted by a call that was killed
                self.free_artifacts(self.client.get_logged_model(output.model_id).artifact_location)
                if not self.dry_run:
                    self.client.delete_logged_model(output.model_id)
        self.free_artifacts(run.info.artifact_uri)
        if not self.dry_run:
            with suppress(MlflowException):  # somebody has deleted the run
                self.client.set_tag(run.info.run_id, _PRUNED, "done")

    def free_abandoned(self, every: Versions) -> None:
        """Delete the run directories of trainings that were never registered and that no pipeline works on any more."""
        tags = [VersionTags.from_tags(version.tags) for version in every]
        registered = {((own.run_key or "")[:16], str(own.attempt)) for own in tags}
        for directory in sorted((self.root.path / "runs").glob("*/*-*/")):
            key, _, attempt = directory.name.rpartition("-")
            if (key, attempt) in registered or not (directory / "config.json").exists():
                continue
            with self.root.try_lock(self.root.lock_path(directory.parent.name)) as is_free:
                if is_free and directory.name not in read_current(directory.parent).values():
                    self.free(directory)
            self.delete_freed()

    def find_starts(self) -> Iterator[str]:
        """Yield the URI of the version that each unfinished training of a pipeline started from."""
        for pipeline in (self.root.path / "runs").glob("*/"):
            for name in read_current(pipeline).values():
                with suppress(ConfigError):
                    if (start := RunDirectory(pipeline / name).read_config().start) is not None:
                        yield start.uri

    def is_restarted(self, run: Run, key: str) -> bool:
        """Whether the same training was started again after its version was dropped."""
        runs = self.client.search_runs([run.info.experiment_id], f"tags.run_key = '{key}'")
        return any(other.info.run_id != run.info.run_id for other in runs)

    def free_artifacts(self, uri: str) -> None:
        """Delete artifacts, and their parent directory if it is empty afterwards."""
        path = None if artifacts.is_remote(uri) else artifacts.local_path(self.root, uri)
        if path is None and not artifacts.is_remote(uri):
            return
        self.freed.paths[str(path or uri)] = _measure_size(path) if path else 0
        if self.dry_run:
            return
        artifacts.free(self.root, uri)
        if path is not None:
            with suppress(OSError):
                path.parent.rmdir()

    def free_shared(self, kept: Versions, runs_before: Mapping[str, datetime]) -> None:
        """Delete snapshots and token files that no kept version or run directory names, unless a pipeline runs.

        `runs_before` lists the trainings in the object store when this call began.
        """
        self.find_tokens_in_use()  # reads every config.json, so that only new ones are left to read under the locks
        store, tokens, corpora = self.root.store, *self.find_needed(kept)
        unpublished = self.list_unused_in_store(store, tokens, corpora) if store is not None else []
        with ExitStack() as locked:
            for path in self.list_locks():
                if not locked.enter_context(self.root.try_lock(path)):
                    self.freed.busy.append(path.stem)
            if self.freed.busy:
                return
            tokens, corpora = self.find_needed(kept)
            for parent, needed in ((self.root.tokens, tokens), (self.root.corpora, corpora)):
                for directory in sorted(parent.iterdir()) if parent.exists() else ():
                    if directory.name not in needed and manifest.is_committed(directory):
                        self.free(directory)
            is_unchanged = store is not None and store.list_times("runs/") == runs_before  # else the next call does it
            unpublished = [name for name in unpublished if Path(name).name not in tokens | corpora]
            if store is not None and is_unchanged and not self.dry_run:
                store.unpublish(unpublished)
        self.delete_freed()
        if store is not None and is_unchanged:
            self.freed.paths |= {f"{store.url}/state/{name}": 0 for name in unpublished}
            if not self.dry_run:
                for name in unpublished:
                    store.remove(name)
                store.sweep()

    def find_needed(self, kept: Versions) -> tuple[set[str], set[str]]:
        """Return the names of the token directories and of the snapshots that versions and run directories name."""
        tags = [VersionTags.from_tags(version.tags) for version in kept]
        tokens = {(own.tokens_sha256 or "")[:16] for own in tags} | self.find_tokens_in_use()
        corpora = {(own.corpus_sha256 or "")[:16] for own in tags}
        return tokens, corpora | {sha256 for name in tokens if (sha256 := self.find_corpus(name)) is not None}

    def list_locks(self) -> list[Path]:
        """Return the lock paths of all pipelines, including those that run only on other machines."""
        directory, shared = self.root.path / "locks", self.root.database
        elsewhere = postgres_lock.list_locks(shared) if shared else ()
        names = {name for name in elsewhere if name.endswith(".lock")} - {"mlflow.lock"}
        return sorted({*directory.glob("*.lock"), *(directory / name for name in names)})

    def list_unused_in_store(self, store: Store, tokens: set[str], corpora: set[str]) -> list[str]:
        """Return the directories in the object store that neither this state root nor trainings elsewhere need."""
        runs, used_tokens = mirror.find_in_use(store)
        corpora = corpora | {mirror.find_corpus(store, name) for name in used_tokens}
        unused = [f"tokens/{name}" for name in store.list_directories("tokens") if name not in tokens | used_tokens]
        unused += [f"corpora/{name}" for name in store.list_directories("corpora") if name not in corpora]
        return unused + sorted(mirror.list_runs(store) - runs)

    def find_tokens_in_use(self) -> set[str]:
        """Return the token directories that run directories name, except run directories that a dry run lists."""
        in_use = set()
        for path in (self.root.path / "runs").glob("*/*/config.json"):
            if str(path.parent) not in self.freed.paths and not path.parent.name.startswith(manifest.TEMPORARY):
                with suppress(ConfigError, FileNotFoundError):
                    key = (path, path.stat().st_mtime_ns)
                    if key not in self.tokens_of_configs:
                        self.tokens_of_configs[key] = RunDirectory(path.parent).read_config().tokens_sha256[:16]
                    in_use.add(self.tokens_of_configs[key])
        return in_use

    def find_corpus(self, tokens: str) -> str | None:
        """Return the name of the snapshot that a token directory was made from. None if the directory is incomplete."""
        with suppress(CheckpointError):
            return manifest.read_about(self.root.tokens / tokens)["corpus_sha256"][:16]
        return None

    def sweep(self) -> None:
        """Delete incomplete directories that killed processes left."""
        runs = self.root.path / "runs"
        own = (self.root.imports, self.root.tokens, self.root.corpora, self.root.mirror)
        for parent in (*own, *runs.glob("*/"), *runs.glob("*/*/")):
            for leftover in manifest.list_stale(parent):
                self.free(leftover)
        self.delete_freed()

    def free(self, path: Path) -> None:
        """Rename a directory, so that no process finds it any more. `delete_freed` deletes its files."""
        is_renamed = not self.dry_run and path.is_dir() and not path.name.startswith(manifest.TEMPORARY)
        self.renamed[path] = manifest.set_aside(path) if is_renamed else path
        self.freed.paths[str(path)] = 0

    def delete_freed(self) -> None:
        """Measure what `free` has renamed, and delete it. Call this without a lock, because many files take minutes.

        If the process is killed meanwhile, the next sweep deletes the rest.
        """
        for path, present in self.renamed.items():
            self.freed.paths[str(path)] = _measure_size(present)
            if self.dry_run:
                continue
            if present.is_file():
                present.unlink(missing_ok=True)
            else:
                shutil.rmtree(present, ignore_errors=True)
        self.renamed.clear()


def _measure_size(path: Path) -> int:
    """Return the size of a file, or of all files below a directory, in bytes.

    Files that disappear meanwhile do not count: a run that begins sweeps up the same leftovers.
    """
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.lstat().st_size
    return size

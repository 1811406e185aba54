"""Retention: which files of the state root nobody needs any more, and freeing them.

Of every model that pipelines.yaml names, the newest versions stay; so do the champion, what a rollback may reach, every
version with an alias, every version that a kept one was made from or is a copy of, and versions that no pipeline here
trained. The files of a dropped version go together: its run directory, the model's artifacts and the MLflow run's; the
run's params and metrics stay. Then go trainings that were begun and left, and the snapshots and token files that
nothing kept names.

A version leaves the registry first and its files follow, so a process killed in between leaves every kept thing whole.
The MLflow run remembers what is still to be freed: the next call goes on.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.attempt import current
from flows.lock import taken
from flows.releases import artifacts
from flows.releases.champion import unmoved
from flows.releases.moves import chain
from flows.releases.registry import RegistryError
from flows.sharing import advisory, mirror
from flows.sharing.store import Store
from flows.state import StateRoot
from gptcore import manifest
from gptcore.errors import CheckpointError, ConfigError
from gptcore.learning.rundir import RunDirectory

STARTED_FROM = "started_from"
"""Tag of a version: the URI of the version whose weights its training started from."""
_PRUNED = "pruned"
"""Tag of an MLflow run whose version was dropped: intent, then done."""
_PRUNED_KEY = "pruned_run_key"
"""Its run key, under a name by which a new training of the same key does not find it."""

Versions = list[ModelVersion]


@dataclass
class Freed:
    """What was freed or, in a dry run, would be."""

    versions: list[str] = field(default_factory=list)
    """URIs of the dropped versions."""
    paths: dict[str, int] = field(default_factory=dict)
    """Bytes of each directory."""
    busy: list[str] = field(default_factory=list)
    """Pipelines that are running: while one is, snapshots and token files stay."""

    @property
    def bytes(self) -> int:
        """Of all that was freed."""
        return sum(self.paths.values())

    def lines(self) -> list[str]:
        """One line per version and per directory."""
        return [
            *(f"{'version':>15}  {uri}" for uri in self.versions),
            *(f"{n:>15,}  {p}" for p, n in self.paths.items()),
        ]

    def summary(self, dry_run: bool) -> str:
        """A sentence."""
        would = "would be " if dry_run else ""
        stay = f"; while {', '.join(self.busy)} runs, snapshots and token files stay" if self.busy else ""
        return f"{len(self.versions)} versions, {len(self.paths)} directories, {self.bytes:,} bytes {would}freed{stay}"


def prune(root: StateRoot, keep: Mapping[str, int], dry_run: bool = False) -> Freed:
    """Frees what nobody needs. `keep` says for each registered model how many of its newest versions stay.

    Raises RegistryError if MLflow does not answer; the next call goes on.
    """
    try:
        return _Pruning(root, keep, dry_run).run()
    except MlflowException as error:
        raise RegistryError(f"the registry at {root.tracking_address} does not answer: {error}") from None


class _Pruning:
    """One pass of retention."""

    def __init__(self, root: StateRoot, keep: Mapping[str, int], dry_run: bool) -> None:
        self.root, self.keep, self.dry_run = root, keep, dry_run
        self.client = MlflowClient(root.tracking_uri)
        self.freed = Freed()

    def run(self) -> Freed:
        """Frees all that nothing needs, or in a dry run says what would be. Champions do not move meanwhile."""
        with ExitStack() as unmoving:
            models = {model.name for model in _all(self.client.search_registered_models)}
            pruned = sorted(models & self.keep.keys())
            reachable = {name: set(chain(unmoving.enter_context(unmoved(self.root, name)))) for name in pruned}
            every = _all(self.client.search_model_versions)
            kept, dropped = self.sorted_out(every, reachable)
            for version in dropped:
                self.drop(version)
        for run in self.unfinished_business(kept, dropped):
            self.free_run(run)
        self.free_abandoned(every)
        self.free_shared(kept)
        self.sweep()
        return self.freed

    def sorted_out(self, every: Versions, reachable: Mapping[str, set[str | None]]) -> tuple[Versions, Versions]:
        """The versions that stay, and those that go."""
        aliased = {(name, str(number)) for name in reachable for number in self.aliases(name)}
        kept: Versions = []
        rest: Versions = []
        left = dict(self.keep)
        for version in sorted(every, key=lambda version: -int(version.version)):
            name, number = version.name, str(version.version)
            is_ours = name in reachable and {"run_key", "verdict"} <= version.tags.keys()
            is_new = left.get(name, 0) > 0
            left[name] = left.get(name, 0) - 1
            stays = not is_ours or is_new or number in reachable[name] or (name, number) in aliased
            (kept if stays else rest).append(version)
        return self.with_origins(kept, rest)

    def with_origins(self, kept: Versions, rest: Versions) -> tuple[Versions, Versions]:
        """Moves to the kept ones whatever they were made from or share an MLflow run with."""
        begun = set(self.starts_of_trainings())
        while True:
            runs = {version.run_id for version in kept}
            named = begun | {uri for v in kept for uri in (v.source, v.tags.get(STARTED_FROM))}
            needed = [v for v in rest if v.run_id in runs or f"models:/{v.name}/{v.version}" in named]
            if not needed:
                return kept, rest
            kept = kept + needed
            rest = [version for version in rest if version not in needed]

    def aliases(self, name: str) -> set[str]:
        """The versions of a model that some alias names."""
        return {str(number) for number in self.client.get_registered_model(name).aliases.values()}

    def drop(self, version: ModelVersion) -> None:
        """Takes a version out of the registry, and notes on its MLflow run that the files are to follow."""
        self.freed.versions.append(f"models:/{version.name}/{version.version}")
        if self.dry_run:
            return
        key, run_id = version.tags["run_key"], version.run_id or ""
        with suppress(MlflowException):  # somebody has deleted the run: its version goes nevertheless
            self.client.set_tag(run_id, _PRUNED_KEY, key)
            self.client.set_tag(run_id, _PRUNED, "intent")
            self.client.delete_tag(run_id, "run_key")
        self.client.delete_model_version(version.name, str(version.version))

    def unfinished_business(self, kept: Versions, dropped: Versions) -> list[Run]:
        """The MLflow runs of dropped versions, of this call and of earlier ones that were killed."""
        found = [self.run_of(version) for version in dropped]
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found += self.client.search_runs(experiments, f"tags.{_PRUNED} = 'intent'")
        needed = {version.run_id for version in kept}
        return list({run.info.run_id: run for run in found if run and run.info.run_id not in needed}.values())

    def run_of(self, version: ModelVersion) -> Run | None:
        """The MLflow run that made the version; None if somebody has deleted it."""
        with suppress(MlflowException):
            return self.client.get_run(version.run_id or "")
        return None

    def free_run(self, run: Run) -> None:
        """Frees the run directory, the logged models and the artifacts of an MLflow run."""
        key = run.data.tags.get(_PRUNED_KEY) or run.data.tags["run_key"]
        for directory in (self.root.path / "runs").glob(f"*/{key[:16]}-{run.data.tags['attempt']}"):
            with taken(directory / "lock") as is_free:
                if not is_free:
                    return  # until the next call
                if not self.is_begun_anew(run, key):
                    self.free(directory)
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
        """Frees the trainings that were begun and never registered, and that no pipeline works on any more."""
        registered = {(v.tags.get("run_key", "")[:16], v.tags.get("attempt")) for v in every}
        for directory in sorted((self.root.path / "runs").glob("*/*-*/")):
            key, _, attempt = directory.name.rpartition("-")
            if (key, attempt) in registered or not (directory / "config.json").exists():
                continue
            with self.root.taken(self.root.lock(directory.parent.name)) as is_free:
                if is_free and directory.name not in current(directory.parent).values():
                    self.free(directory)

    def starts_of_trainings(self) -> Iterator[str]:
        """The versions that the trainings which pipelines work on started from."""
        for pipeline in (self.root.path / "runs").glob("*/"):
            for name in current(pipeline).values():
                with suppress(ConfigError):
                    if (start := RunDirectory(pipeline / name).config().start) is not None:
                        yield start.uri

    def is_begun_anew(self, run: Run, key: str) -> bool:
        """Whether the same training has been started again since its version was dropped."""
        found = self.client.search_runs([run.info.experiment_id], f"tags.run_key = '{key}'")
        return any(other.info.run_id != run.info.run_id for other in found)

    def free_artifacts(self, uri: str) -> None:
        """Removes artifacts, and the directory around them if nothing is left in it."""
        path = None if artifacts.is_remote(uri) else artifacts.local_path(self.root, uri)
        if path is None and not artifacts.is_remote(uri):
            return
        self.freed.paths[str(path or uri)] = _size(path) if path else 0
        if self.dry_run:
            return
        artifacts.free(self.root, uri)
        if path is not None:
            with suppress(OSError):
                path.parent.rmdir()

    def free_shared(self, kept: Versions) -> None:
        """Frees snapshots and token files that no kept version and no run directory names, unless a pipeline runs."""
        with ExitStack() as standing_still:
            for path in self.locks():
                if not standing_still.enter_context(self.root.taken(path)):
                    self.freed.busy.append(path.stem)
            if self.freed.busy:
                return
            tokens = {version.tags.get("tokens_sha256", "")[:16] for version in kept}
            corpora = {version.tags.get("corpus_sha256", "")[:16] for version in kept}
            tokens |= set(self.tokens_of_run_directories())
            corpora |= {sha256 for name in tokens if (sha256 := self.corpus_of(name)) is not None}
            for parent, needed in ((self.root.tokens, tokens), (self.root.corpora, corpora)):
                for directory in sorted(parent.iterdir()) if parent.exists() else ():
                    if directory.name not in needed and manifest.is_committed(directory):
                        self.free(directory)
            if (store := self.root.store) is not None:
                self.free_mirrored(store, tokens, corpora)

    def locks(self) -> list[Path]:
        """The locks of all pipelines, also of those that only run on other machines."""
        above, shared = self.root.path / "locks", self.root.database
        elsewhere = advisory.known(shared) if shared else ()
        names = {name for name in elsewhere if name.endswith(".lock")} - {"mlflow.lock"}
        return sorted({*above.glob("*.lock"), *(above / name for name in names)})

    def free_mirrored(self, store: Store, tokens: set[str], corpora: set[str]) -> None:
        """Frees the same in the object store, but not what trainings need that other machines began."""
        runs, begun = mirror.in_use(store)
        corpora = corpora | {mirror.corpus_of(store, name) for name in begun}
        doomed = [f"tokens/{name}" for name in store.names("tokens") if name not in tokens | begun]
        doomed += [f"corpora/{name}" for name in store.names("corpora") if name not in corpora]
        doomed += sorted(mirror.runs(store) - runs)
        for directory in doomed:
            self.freed.paths[f"{store.url}/state/{directory}"] = 0
            if not self.dry_run:
                store.remove(directory)
        if not self.dry_run:
            store.sweep()

    def tokens_of_run_directories(self) -> Iterator[str]:
        """The token files that run directories name, finished or not, except for those freed in a dry run."""
        for path in (self.root.path / "runs").glob("*/*/config.json"):
            if str(path.parent) not in self.freed.paths and not path.parent.name.startswith(manifest.TEMPORARY):
                with suppress(ConfigError):
                    yield RunDirectory(path.parent).config().tokens_sha256[:16]

    def corpus_of(self, tokens: str) -> str | None:
        """Name of the snapshot that a directory of token files was made from; None if it is not there whole."""
        with suppress(CheckpointError):
            return manifest.about(self.root.tokens / tokens)["corpus_sha256"][:16]
        return None

    def sweep(self) -> None:
        """Frees what killed processes left half-made."""
        runs = self.root.path / "runs"
        own = (self.root.imports, self.root.tokens, self.root.corpora, self.root.mirror)
        for parent in (*own, *runs.glob("*/"), *runs.glob("*/*/")):
            for leftover in manifest.stale(parent):
                self.free(leftover)

    def free(self, path: Path) -> None:
        """Removes a directory, such that it is whole or gone under its own name at every instant."""
        self.freed.paths[str(path)] = _size(path)
        if self.dry_run:
            return
        if path.is_file():
            path.unlink()
        elif path.name.startswith(manifest.TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)
        else:
            manifest.remove(path)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _all(search: Any) -> list[Any]:
    """Every page of a search."""
    page = search()
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found

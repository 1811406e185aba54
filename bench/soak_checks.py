"""What must hold during and after a soak. Each check returns violations as sentences, or an empty list."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

from mlflow import MlflowClient
from mlflow.entities import Run

from bench.project import KEEP, MODEL, Project, wait_for
from flows.registry import loading
from flows.registry import versions as registry
from flows.registry.champion import read_moves
from flows.registry.moves import trace_champions
from flows.state.root import StateRoot
from flows.tracking.metrics import LOGGED

VERSION_BYTES = 5_000_000
"""The largest size of one version's files: run directory, artifacts, snapshot and tokens."""
DATABASE_BYTES = 15_000_000
DATABASE_NIGHT_BYTES = 1_250_000
"""The size of databases and logs at the start, and their growth per night. Retention does not free them: MLflow keeps
all metrics, and Prefect keeps all decision cards, and events for a week. The bounds are a quarter above the measured
sizes, so only a change for the worse exceeds them."""
_OPEN = ["RUNNING", "PENDING", "CANCELLING"]


class ChampionWatch(Thread):
    """Resolves and loads the champion every second, and records failures."""

    def __init__(self, root: StateRoot) -> None:
        super().__init__(daemon=True)
        self.root, self.done = root, Event()
        self.looks = self.busy = 0
        self.seen: set[str] = set()
        """Versions that were champion when it looked."""
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.looks += 1
            try:
                self.look()
            except Exception as error:
                if "database is locked" in str(error):
                    self.busy += 1
                else:
                    self.failures.append(f"look {self.looks} at the champion: {type(error).__name__}: {error}")

    def look(self) -> None:
        champion = registry.find_champion(self.root, MODEL)
        if champion is not None:
            loading.load(self.root, champion)
            self.seen.add(str(champion.version))
        elif self.seen:
            self.failures.append(f"look {self.looks}: there is no champion any more")

    def stop(self) -> None:
        self.done.set()
        self.join()


def orphans_in_prefect(project: Project) -> list[str]:
    """List flow runs that Prefect reports as running although nothing runs."""
    asked = {"flow_runs": {"state": {"type": {"any_": _OPEN}}}}
    wait_for(lambda: not project.ask("flow_runs/filter", asked), 30)
    found = project.ask("flow_runs/filter", asked)
    return [f"Prefect calls {run['name']} ({run['id']}) {run['state']['name']}" for run in found]


def orphans_in_mlflow(root: StateRoot) -> list[str]:
    """List runs that MLflow reports as running although nothing runs."""
    return [f"MLflow run {run.info.run_id} is RUNNING" for run in _runs(root) if run.info.status == "RUNNING"]


def doubles(root: StateRoot) -> list[str]:
    """List trainings with two versions or two MLflow runs, and metrics with two points at one step."""
    versions = Counter((one.tags["run_key"], one.tags["attempt"]) for one in registry.list_versions(root, MODEL))
    runs = Counter((run.data.tags["run_key"], run.data.tags["attempt"]) for run in _runs(root) if _is_kept(run))
    found = [f"{count} versions of {key[0][:16]}-{key[1]}" for key, count in versions.items() if count > 1]
    found += [f"{count} MLflow runs of {key[0][:16]}-{key[1]}" for key, count in runs.items() if count > 1]
    return [*found, *(double for run in _runs(root) for double in _doubled_points(root, run))]


def _doubled_points(root: StateRoot, run: Run) -> Iterator[str]:
    client = MlflowClient(root.tracking_uri)
    for key in LOGGED:
        steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, key))
        if doubled := [step for step, count in steps.items() if count > 1]:
            yield f"MLflow run {run.info.run_id} has {key} twice at steps {doubled[:5]}"


def too_much(root: StateRoot, nights: int) -> list[str]:
    """List versions and bytes that retention should have freed, and databases that grow faster than before."""
    kept, reachable = len(registry.list_versions(root, MODEL)), len(trace_champions(read_moves(root, MODEL)))
    found = {
        "registered versions": (kept, KEEP + reachable + 1),
        "bytes of what retention frees": (files_bytes(root), files_bound(root)),
        "bytes of databases and logs": (bytes_of(root.path) - files_bytes(root), databases_bound(nights)),
    }
    return [f"{size:,} {what}, at most {most:,} should be" for what, (size, most) in found.items() if size > most]


def files_bytes(root: StateRoot) -> int:
    """Return the size of the files of versions and trainings."""
    return sum(map(bytes_of, (root.artifacts, root.corpora, root.tokens, root.path / "runs")))


def files_bound(root: StateRoot) -> int:
    """Return the largest allowed size of these files after a prune, for any number of nights."""
    return (KEEP + len(trace_champions(read_moves(root, MODEL))) + 1) * VERSION_BYTES


def databases_bound(nights: int) -> int:
    """Return the largest allowed size of databases and logs."""
    return DATABASE_BYTES + nights * DATABASE_NIGHT_BYTES


def unlike_twin(project: Project, killed: set[str]) -> tuple[str | None, list[str]]:
    """Train the newest version of the run directories `killed` again, without a kill.

    Return the name of its run directory, and the violations.
    """
    versions = sorted(registry.list_versions(project.root, MODEL), key=lambda version: -int(version.version))
    for version in versions:
        name = f"{version.tags['run_key'][:16]}-{version.tags['attempt']}"
        if name in killed and "verdict" in version.tags:
            done = project.command("reproduce", registry.uri_of(version))
            said = f"version {version.version}, killed in training, has no equal twin: {done.stdout}{done.stderr}"
            return name, [said] if done.returncode else []
    return None, []


def bytes_of(path: Path) -> int:
    """Return the size of all files in a directory. Files may disappear while they are counted."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.lstat().st_size if not file.is_dir() else 0
        except FileNotFoundError:
            continue
    return total


def _runs(root: StateRoot) -> list[Run]:
    client = MlflowClient(root.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=5000))


def _is_kept(run: Run) -> bool:
    return "run_key" in run.data.tags

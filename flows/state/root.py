"""The state root: the directory with everything that the project remembers, and its layout.

    mlflow.db    artifacts/   MLflow's runs, registry and files (databases.py)
    mlflow.lock               held while mlflow.db is made, migrated or moved; mlflow-schema-*.db are older copies
    downloads/                files from http and https addresses
    corpora/     tokens/      committed snapshots and token files, shared by all pipelines
    runs/                     run directories, <pipeline>/<run key>-<attempt>
    imports/                  models from elsewhere while they are prepared
    mirror/                   directories on their way to or from the object store
    locks/                    one lock per pipeline, held by its run
    watch/                    the state of each pipeline's sources when they were last compared
    prefect/     logs/        the homes of Prefect's servers, and the logs of servers and libraries
    successes/                the time of each pipeline's last success
    up.lock      up.json      held by `gptflow up`, and the addresses of its servers
    backends.json             the database and the object store that hold the state instead of local files, if any
    state.json                the format and the path of the state root, which may be moved (relocate.py)

The state root is `GPTFLOW_HOME`, else `mlruns/` beside pipelines.yaml. With a database and an object store
(backends.py), these hold the runs, the registry and its files, for several machines; unfinished work is still here.
This module imports neither Prefect nor MLflow.
"""

import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.state import backends, databases, locks, relocate
from flows.state.backends import Backends
from flows.state.databases import SQLiteDatabase
from flows.state.lock_holder import Holder, Overlap
from flows.state.postgres import PostgresDatabase
from flows.state.servers import find_running_servers
from gptcore.errors import CheckpointError, GPTCoreError

if TYPE_CHECKING:
    from flows.state.object_store import Store

OPT_OUTS = {
    # The word "true": MLflow ignores "1".
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables that turn off the telemetry of the libraries, so that nothing leaves the machine unasked."""


@dataclass(frozen=True)
class StateRoot:
    """The paths inside the state root, its locks, and the servers that hold the state."""

    path: Path

    @property
    def project(self) -> Path:
        """The directory that documents are named relative to, and that relative sources start at.

        It contains the state root, so it is that of pipelines.yaml unless GPTFLOW_HOME is set. Whatever starts a run,
        from any working directory, gives the same names to the documents.
        """
        return self.path.parent

    @property
    def corpora(self) -> Path:
        """Committed corpus snapshots, shared by all pipelines."""
        return self.path / "corpora"

    @property
    def tokens(self) -> Path:
        """Committed token directories, shared by all pipelines."""
        return self.path / "tokens"

    @property
    def imports(self) -> Path:
        """Models from elsewhere while they are prepared: unfinished directories only."""
        return self.path / "imports"

    @property
    def mirror(self) -> Path:
        """Directories on their way to or from the object store: unfinished ones only."""
        return self.path / "mirror"

    @property
    def artifacts(self) -> Path:
        """MLflow's files, by experiment."""
        return self.path / "artifacts"

    @property
    def logs(self) -> Path:
        """The logs of libraries and servers."""
        return self.path / "logs"

    @property
    def prefect(self) -> Path:
        """Home of the Prefect server of `gptflow up`; temporary servers live in `ephemeral` inside it."""
        return self.path / "prefect"

    @property
    def backends(self) -> Backends:
        """The servers that hold the state, if any. Raises ConfigError."""
        return backends.read_backends(self.path)

    @property
    def database(self) -> PostgresDatabase | None:
        """The PostgreSQL database of the state, if it has one."""
        return self.backends.database

    @property
    def tracking_uri(self) -> str:
        """A user's MLFLOW_TRACKING_URI, else the state's database, else the SQLite database in the state root.

        MLFLOW_BACKEND_STORE_URI, which configures MLflow's own server, counts too if it names a PostgreSQL. Raises
        ConfigError.
        """
        database = self.database
        backend = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
        if given := os.environ.get("MLFLOW_TRACKING_URI") or (backend if backend.startswith("postgres") else None):
            return given
        return database.tracking_uri if database else databases.mlflow_database(self.path).url

    @property
    def mlflow_database(self) -> SQLiteDatabase | None:
        """MLflow's SQLite database in the state root; None if a server holds the registry instead."""
        database = databases.mlflow_database(self.path)
        return database if self.tracking_uri == database.url else None

    @property
    def tracking_address(self) -> str:
        """The tracking URI for messages: without the password and without the driver's options."""
        if self.mlflow_database is not None:
            return f"sqlite:///{self.path / 'mlflow.db'}"
        parts = urlsplit(self.tracking_uri)
        if parts.password is None:
            return self.tracking_uri.partition("?")[0]
        _, _, address = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{parts.username}:***@{address}", query="").geturl()

    def artifact_location(self, experiment: str) -> str | None:
        """Return the place for a new experiment's files; None if a user's tracking server decides."""
        if (store := self.backends.artifacts) is not None:
            return f"{store}/artifacts/{experiment}"
        if self.tracking_uri.startswith("http"):
            return None
        return to_artifact_uri(self.artifacts / experiment)

    def find_mlflow_ui(self) -> str | None:
        """Return the URL of MLflow's UI: a user's tracking server, else that of `gptflow up` while it is up."""
        if self.tracking_uri.startswith("http"):
            return self.tracking_uri.rstrip("/")
        servers = find_running_servers(self.path)
        return servers.mlflow if servers else None

    @property
    def store(self) -> "Store | None":
        """The object store that mirrors complete directories of the state root, if there is one."""
        if (url := self.backends.artifacts) is None:
            return None
        from flows.state.object_store import Store

        return Store(url)

    def fetch_corpus(self, sha256: str) -> Path:
        """Return the directory of the snapshot with this hash, downloaded if only the object store has it.

        The directory does not exist if the snapshot is in neither place. Raises StoreUnreachable and StoreRefused.
        """
        return self._fetch(self.corpora / sha256[:16])

    def fetch_tokens(self, sha256: str) -> Path:
        """Return the token directory with this hash, as `fetch_corpus` does for a snapshot."""
        return self._fetch(self.tokens / sha256[:16])

    def _fetch(self, directory: Path) -> Path:
        if not directory.exists() and (store := self.store) is not None:
            with suppress(CheckpointError):  # a damaged directory in the store counts as missing
                store.pull(directory.relative_to(self.path).as_posix(), directory)
        return directory

    def run_directory(self, pipeline: str, run_key: str, attempt: int) -> Path:
        """Return the run directory of attempt number `attempt` (from 1) at `run_key`."""
        return self.path / "runs" / pipeline / f"{run_key[:16]}-{attempt}"

    def lock_path(self, pipeline: str) -> Path:
        """Return the lock that a run of the pipeline holds from begin to end."""
        return self.path / "locks" / f"{pipeline}.lock"

    def hold(self, path: Path, flow_run: str = "", overlap: Overlap = "skip") -> AbstractContextManager[Holder | None]:
        """Hold a lock of the state, on every machine that shares it, as `locks.hold` does."""
        return locks.hold(path, flow_run, overlap, self.database)

    def try_lock(self, path: Path) -> AbstractContextManager[bool]:
        """Take a lock if it is free on every machine that shares the state, as `locks.try_lock` does."""
        return locks.try_lock(path, self.database)

    def prepare(self) -> "StateRoot":
        """Make the state root ready for this process: it can be written, and its paths are right after a move.

        Also moves passwords out of the URLs in the environment (`backends.export_passwords`). Raises GPTCoreError with
        the path and the reason (see `relocate.update_location`), DatabaseBroken, and ConfigError.
        """
        backends.export_passwords()
        try:
            for directory in (self.logs, self.prefect / "ephemeral"):
                directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"gptflow")
                file.flush()
        except OSError as error:
            raise GPTCoreError(
                f"the state root {self.path} cannot be written: {error.strerror}. "
                "Free space, fix its permissions, or set GPTFLOW_HOME to another directory."
            ) from None
        if self.mlflow_database is not None:
            self.mlflow_database.check()
        relocate.update_location(self.path)
        return self

    def prepare_registry(self) -> None:
        """Create MLflow's tables, or migrate them to the installed MLflow, unless they are complete.

        Call this before using MLflow. Raises DatabaseBroken.
        """
        if (database := self.mlflow_database) is not None:
            database.prepare()
        elif self.database is not None and self.tracking_uri == self.database.tracking_uri:
            databases.mlflow_tables(self.database).prepare()

    def find_prefect_database(self, environment: Mapping[str, str]) -> SQLiteDatabase | None:
        """Return the SQLite database of a Prefect server with this environment; None if it is not in the state root."""
        home = Path(environment.get("PREFECT_HOME", ""))
        is_own = home in (self.prefect, self.prefect / "ephemeral") and not databases.is_prefect_elsewhere(environment)
        return databases.prefect_database(home) if is_own else None

    @property
    def id(self) -> str:
        """The identity of this state, which a move does not change. Only after `prepare`."""
        state = relocate.read_state(self.path)
        assert state is not None, "prepare() writes state.json"
        return state.id

    @property
    def tag(self) -> str:
        """The tag of this state's deployments and their runs on a Prefect server. Only after `prepare`."""
        return f"home:{self.id}"

    def set_environment(self) -> None:
        """Set the environment that Prefect, MLflow and every child process read. A user's own values win.

        Prefect's server is that of `gptflow up` while it answers, else a temporary one. Raises ConfigError, and
        DatabaseUnreachable, DatabaseRefused, StoreUnreachable or StoreRefused if a server of the state cannot be used.
        """
        os.environ["GPTFLOW_HOME"] = str(self.path)
        backends.export_passwords()
        servers = self.backends
        if servers.database is not None:
            servers.database.prepare()
        if (store := self.store) is not None and backends.read_saved_artifacts(self.path) != store.url:
            store.check()
        backends.save_backends(self.path, servers)
        for name, value in {**OPT_OUTS, **servers.variables(), **self._own_variables()}.items():
            os.environ.setdefault(name, value)

    def _own_variables(self) -> dict[str, str]:
        variables = {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PREFECT_HOME": str(self.prefect / "ephemeral"),
            # MLflow's server would start nine processes for jobs of its GenAI features: 1.7 GB, 25 s of processor time.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # If tqdm is installed, MLflow would print a progress bar among gptflow's own lines.
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            # Prefect deletes runs, with their logs and cards, after 90 days. By default it keeps them forever.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            # There are no database time-outs: on SQLite, Prefect 3.8 overrides them with 60 seconds. It answers 503
            # under load if a read transaction turns to writing while another one writes, which SQLite refuses at once;
            # clients retry.
        }
        if (running := find_running_servers(self.path)) is not None:
            variables["PREFECT_API_URL"] = running.prefect_api
        return variables


def to_artifact_uri(path: Path) -> str:
    """Return a local path as MLflow reads it. MLflow would decode the `%20` in a path, so such a path becomes a URI."""
    return path.as_uri() if "%" in str(path) else str(path)


def state_root(pipelines_file: Path | None = None) -> StateRoot:
    """Return the state root: GPTFLOW_HOME, else `mlruns/` beside `pipelines_file`, or in the working directory."""
    home = os.environ.get("GPTFLOW_HOME")
    base = pipelines_file.parent if pipelines_file else Path.cwd()
    return StateRoot(Path(home).expanduser().resolve() if home else base.resolve() / "mlruns")

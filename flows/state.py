"""The state root: where everything that the project remembers lies on disk.

    mlflow.db    artifacts/   MLflow's runs, registry and files
    corpora/     tokens/      committed snapshots and token files, shared by all pipelines
    runs/                     run directories, <pipeline>/<run key>-<attempt>
    imports/    mirror/       where models from elsewhere are prepared, and what an object store takes or gives
    locks/                    one lock per pipeline, held by its run
    watch/                    what the last looks at each pipeline's sources saw
    prefect/     logs/        the homes of Prefect's servers, and what servers and libraries said
    successes/                when each pipeline last succeeded
    up.lock      up.json      held by `gptflow up`, and where its servers are
    backends.json             which database and object store hold the state instead of files here, if any
    state.json                which format this is, and where it lies: it may be moved (relocate.py)

It is `GPTFLOW_HOME`, else `mlruns/` beside pipelines.yaml. With a database and an object store (sharing/backends.py)
the runs, the registry and their files lie there, for several machines; what is made on the way still lies here. Nothing
here imports Prefect or MLflow.
"""

import os
import tempfile
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows import lock, relocate
from flows.lock import Holder, Overlap
from flows.service.servers import running_servers
from flows.sharing import backends
from flows.sharing.backends import Backends
from flows.sharing.database import Database
from gptcore.errors import CheckpointError, GPTCoreError

if TYPE_CHECKING:
    from flows.sharing.store import Store

OPT_OUTS = {
    # The word "true": MLflow ignores "1".
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Nothing leaves the machine unasked: the libraries' own telemetry is off."""


@dataclass(frozen=True)
class StateRoot:
    """Paths inside the state root."""

    path: Path

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
        """Where models from elsewhere are prepared: half-made directories only."""
        return self.path / "imports"

    @property
    def mirror(self) -> Path:
        """What is on its way to or from the object store: half-made directories only."""
        return self.path / "mirror"

    @property
    def artifacts(self) -> Path:
        """MLflow's files, by experiment."""
        return self.path / "artifacts"

    @property
    def logs(self) -> Path:
        """What libraries and servers said."""
        return self.path / "logs"

    @property
    def prefect(self) -> Path:
        """Home of the Prefect server of `gptflow up`; temporary servers live in `ephemeral` inside it."""
        return self.path / "prefect"

    @property
    def backends(self) -> Backends:
        """The servers that the state lies on, if any. Raises ConfigError."""
        return backends.backends_of(self.path)

    @property
    def database(self) -> Database | None:
        """The PostgreSQL database of the state, if it has one."""
        return self.backends.database

    @property
    def tracking_uri(self) -> str:
        """A user's MLFLOW_TRACKING_URI, else the state's database, else the SQLite database in the state root.

        MLFLOW_BACKEND_STORE_URI, with which people start MLflow's own server, says the same of a PostgreSQL.
        """
        there = self.database  # also takes the password out of the variables
        backend = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
        if given := os.environ.get("MLFLOW_TRACKING_URI") or (backend if backend.startswith("postgres") else None):
            return given
        return there.tracking_uri if there else f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def tracking_address(self) -> str:
        """The tracking URI as people may read it: without a password, and without what a driver is told."""
        parts = urlsplit(self.tracking_uri)
        if parts.password is None:
            return self.tracking_uri.partition("?")[0]
        _, _, place = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{parts.username}:***@{place}", query="").geturl()

    def artifact_location(self, experiment: str) -> str | None:
        """Where a new experiment's files go; None where a user's tracking server decides."""
        if (store := self.backends.artifacts) is not None:
            return f"{store}/artifacts/{experiment}"
        return None if self.tracking_uri.startswith("http") else str(self.artifacts / experiment)

    def mlflow_ui(self) -> str | None:
        """URL of MLflow's UI, if there is one: a user's tracking server, else that of `gptflow up` while it is up."""
        if self.tracking_uri.startswith("http"):
            return self.tracking_uri.rstrip("/")
        servers = running_servers(self.path)
        return servers.mlflow if servers else None

    @property
    def store(self) -> "Store | None":
        """The object store that mirrors what is complete here, if there is one."""
        if (url := self.backends.artifacts) is None:
            return None
        from flows.sharing.store import Store

        return Store(url)

    def corpus(self, sha256: str) -> Path:
        """Where the snapshot of this hash lies, or would lie; brought from the object store if only that has it."""
        return self._here(self.corpora / sha256[:16])

    def token_files(self, sha256: str) -> Path:
        """As `corpus`, for a token directory."""
        return self._here(self.tokens / sha256[:16])

    def _here(self, directory: Path) -> Path:
        if not directory.exists() and (store := self.store) is not None:
            with suppress(CheckpointError):  # damaged there: as if it were gone
                store.pull(directory.relative_to(self.path).as_posix(), directory)
        return directory

    def run_directory(self, pipeline: str, run_key: str, attempt: int) -> Path:
        """Where attempt number `attempt` (from 1) at `run_key` is trained."""
        return self.path / "runs" / pipeline / f"{run_key[:16]}-{attempt}"

    def lock(self, pipeline: str) -> Path:
        """What a run of the pipeline holds from begin to end."""
        return self.path / "locks" / f"{pipeline}.lock"

    def hold(self, path: Path, flow_run: str = "", overlap: Overlap = "skip") -> AbstractContextManager[Holder | None]:
        """Holds a lock of the state, on every machine that shares it. As `lock.hold`."""
        return lock.hold(path, flow_run, overlap, self.database)

    def taken(self, path: Path) -> AbstractContextManager[bool]:
        """As `lock.taken`, on every machine that shares the state."""
        return lock.taken(path, self.database)

    def create(self) -> "StateRoot":
        """Makes sure that the state root can be written, and knows where it lies.

        Raises GPTCoreError with the path and the reason, and what `relocate.settle` raises.
        """
        try:
            for directory in (self.logs, self.prefect / "ephemeral"):
                directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"gptflow")
                file.flush()
        except OSError as error:
            raise GPTCoreError(
                f"the state root {self.path} cannot be written: {error.strerror}. "
                "Free space, mend its permissions, or set GPTFLOW_HOME to another directory."
            ) from None
        relocate.settle(self.path)
        return self

    @property
    def id(self) -> str:
        """Names this state wherever it lies. Only after `create`."""
        state = relocate.read(self.path)
        assert state is not None, "create() writes it"
        return state.id

    @property
    def tag(self) -> str:
        """Marks on a Prefect server what belongs to this state: its deployments and their runs. Only after `create`."""
        return f"home:{self.id}"

    def enter(self) -> None:
        """Sets the environment that Prefect, MLflow and every child process read. A user's own values win.

        Prefect is the one of `gptflow up` while it answers, else a temporary server. Raises DatabaseAway or
        DatabaseRefuses if the state's database is not there.
        """
        os.environ["GPTFLOW_HOME"] = str(self.path)
        elsewhere = self.backends
        if elsewhere.database is not None:
            elsewhere.database.prepare()
        if (store := self.store) is not None and backends.artifacts_of(self.path) != store.url:
            store.check()
        backends.remember(self.path, elsewhere)
        own = {
            **OPT_OUTS,
            **elsewhere.variables(),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PREFECT_HOME": str(self.prefect / "ephemeral"),
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # it has one where tqdm is installed, among our own lines
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            # Prefect forgets runs, with their logs and cards, after 90 days; by its own default it keeps them for ever.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            # No database time-outs: on SQLite, Prefect 3.8 overrides them with 60 seconds. Its 503 under load is a read
            # transaction that turns to writing while another one writes, which SQLite refuses at once; clients retry.
        }
        if (servers := running_servers(self.path)) is not None:
            own["PREFECT_API_URL"] = servers.prefect_api
        for name, value in own.items():
            os.environ.setdefault(name, value)


def state_root(pipelines_file: Path | None = None) -> StateRoot:
    """This process's state root: GPTFLOW_HOME, else `mlruns/` beside `pipelines_file`, or in the working directory."""
    home = os.environ.get("GPTFLOW_HOME")
    base = pipelines_file.parent if pipelines_file else Path.cwd()
    return StateRoot(Path(home).expanduser().resolve() if home else base.resolve() / "mlruns")

"""The state root: where everything that the project remembers lies on disk.

    mlflow.db    artifacts/   MLflow's runs, registry and files
    corpora/     tokens/      committed snapshots and token files, shared by all pipelines
    runs/                     run directories, <pipeline>/<run key>-<attempt>
    imports/                  where models from elsewhere are prepared
    locks/                    one lock per pipeline, held by its run
    watch/                    what the last looks at each pipeline's sources saw
    prefect/     logs/        the homes of Prefect's servers, and what servers and libraries said
    successes/                when each pipeline last succeeded
    up.lock      up.json      held by `gptflow up`, and where its servers are
    state.json                which format this is, and where it lies: it may be moved (relocate.py)

It is `GPTFLOW_HOME`, else `mlruns/` beside pipelines.yaml. Nothing here imports Prefect or MLflow.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flows import relocate
from flows.service.servers import running_servers
from gptcore.errors import GPTCoreError

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
    def tracking_uri(self) -> str:
        """A user's MLFLOW_TRACKING_URI, else the SQLite database in the state root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    def mlflow_ui(self) -> str | None:
        """URL of MLflow's UI, if there is one: a user's tracking server, else that of `gptflow up` while it is up."""
        if self.tracking_uri.startswith("http"):
            return self.tracking_uri.rstrip("/")
        servers = running_servers(self.path)
        return servers.mlflow if servers else None

    def run_directory(self, pipeline: str, run_key: str, attempt: int) -> Path:
        """Where attempt number `attempt` (from 1) at `run_key` is trained."""
        return self.path / "runs" / pipeline / f"{run_key[:16]}-{attempt}"

    def lock(self, pipeline: str) -> Path:
        """What a run of the pipeline holds from begin to end."""
        return self.path / "locks" / f"{pipeline}.lock"

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

        Prefect is the one of `gptflow up` while it answers, else a temporary server.
        """
        os.environ["GPTFLOW_HOME"] = str(self.path)
        own = {
            **OPT_OUTS,
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

"""The state root: where everything that the project remembers lies on disk.

    mlflow.db    artifacts/   MLflow's runs, registry and files
    corpora/     tokens/      committed snapshots and token files, shared by all pipelines
    runs/                     run directories, <pipeline>/<run key>-<attempt>
    prefect/     logs/        the home of Prefect's servers, and what libraries said

It is `GPTFLOW_HOME`, else `mlruns/` beside pipelines.yaml. Nothing here imports Prefect or MLflow.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gptcore.errors import GPTCoreError

OPT_OUTS = {
    # The word "true": MLflow ignores "1".
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
"""Nothing leaves the machine unasked: the libraries' own telemetry is off."""


@dataclass(frozen=True)
class StateRoot:
    """Paths inside the state root."""

    path: Path

    @property
    def corpora(self) -> Path:
        return self.path / "corpora"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tracking_uri(self) -> str:
        """A user's MLFLOW_TRACKING_URI, else the SQLite database in the state root."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    def run_directory(self, pipeline: str, run_key: str, attempt: int) -> Path:
        """Where attempt number `attempt` (from 1) at `run_key` is trained."""
        return self.path / "runs" / pipeline / f"{run_key[:16]}-{attempt}"

    def create(self) -> "StateRoot":
        """Makes sure that the state root can be written. Raises GPTCoreError with the path and the reason."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"gptflow")
                file.flush()
        except OSError as error:
            raise GPTCoreError(
                f"the state root {self.path} cannot be written: {error.strerror}. "
                "Free space, mend its permissions, or set GPTFLOW_HOME to another directory."
            ) from None
        return self

    def enter(self) -> None:
        """Sets the environment that Prefect, MLflow and every child process read. A user's own values win."""
        os.environ["GPTFLOW_HOME"] = str(self.path)
        own = {
            **OPT_OUTS,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PREFECT_HOME": str(self.path / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        for name, value in own.items():
            os.environ.setdefault(name, value)


def state_root(pipelines_file: Path | None = None) -> StateRoot:
    """This process's state root: GPTFLOW_HOME, else `mlruns/` beside `pipelines_file`, or in the working directory."""
    home = os.environ.get("GPTFLOW_HOME")
    base = pipelines_file.parent if pipelines_file else Path.cwd()
    return StateRoot(Path(home).expanduser().resolve() if home else base.resolve() / "mlruns")

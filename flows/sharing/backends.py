"""Servers that the state lies on instead of local files: a database and an object store.

They are named by `GPTFLOW_DATABASE` and `GPTFLOW_ARTIFACTS`, by what MLflow documents for the same, or by options of
`gptflow up`. The state root remembers them, without any password, so that every later command finds the same state:

    backends.json   {"database": "postgresql://USER@HOST:PORT/NAME", "artifacts": "s3://BUCKET/PREFIX"}
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flows.sharing import database
from flows.sharing.database import Database
from gptcore.errors import ConfigError

ARTIFACTS = "GPTFLOW_ARTIFACTS"
LOCAL = "local"
"""Said instead of an address: local files, whatever is remembered."""
_DATABASES_OF_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI")
_ARTIFACTS_OF_MLFLOW = ("MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_ARTIFACTS_DESTINATION")
_FILE = "backends.json"


@dataclass(frozen=True)
class Backends:
    """Where the state lies; None means local files."""

    database: Database | None = None
    artifacts: str | None = None
    """s3://BUCKET/PREFIX, without a slash at its end."""

    def variables(self) -> dict[str, str]:
        """What tells another process of them."""
        said = {database.VARIABLE: self.database.url if self.database else None, ARTIFACTS: self.artifacts}
        return {name: value for name, value in said.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.database.url if self.database else None, self.artifacts))) or "local files"


def backends_of(home: Path) -> Backends:
    """Those of the state root at `home`: what the environment says, else what it remembers. Raises ConfigError.

    From here on no variable of ours or MLflow's has a password in a URL of PostgreSQL.
    """
    for variable in (database.VARIABLE, *_DATABASES_OF_MLFLOW):
        if (given := os.environ.get(variable, "")).startswith("postgres"):
            os.environ[variable] = database.without_password(given, variable)
    url = _said(database.VARIABLE, _DATABASES_OF_MLFLOW, "postgres") or (None, _remembered(home, "database"))
    store = _said(ARTIFACTS, _ARTIFACTS_OF_MLFLOW, "s3:") or (None, _remembered(home, "artifacts"))
    return Backends(
        database.parse(url[1], url[0] or _FILE) if url[1] else None,
        _store(store[1], store[0] or _FILE) if store[1] else None,
    )


def ask(told_database: str | None, told_artifacts: str | None) -> None:
    """Sets the variables as options of the command line say. Raises ConfigError, also for a password in one."""
    if told_database is not None:
        if told_database != LOCAL and database.without_password(told_database, "--database") != told_database:
            raise ConfigError(
                "--database has a password in it, which everybody on this machine can read while the command runs. "
                f"Give the address without it, and the password as PGPASSWORD or in ~/.pgpass; {database.VARIABLE} may "
                "have it too."
            )
        os.environ[database.VARIABLE] = told_database
    if told_artifacts is not None:
        os.environ[ARTIFACTS] = told_artifacts


def artifacts_of(home: Path) -> str | None:
    """The object store that the state root remembers."""
    return _remembered(home, "artifacts")


def remember(home: Path, backends: Backends) -> None:
    """Writes down where the state of `home` lies, at once or not at all."""
    path = home / _FILE
    body = {"database": backends.database and backends.database.url, "artifacts": backends.artifacts}
    if body == {key: _remembered(home, key) for key in body}:
        return
    temporary = path.with_name(f".tmp-{_FILE}-{os.getpid()}")
    temporary.write_text(json.dumps(body) + "\n")
    temporary.replace(path)


def _said(own: str, of_mlflow: tuple[str, ...], beginning: str) -> tuple[str, str | None] | None:
    """The variable that says it, and what; None where none does."""
    if given := os.environ.get(own):
        return own, None if given == LOCAL else given
    for variable in of_mlflow:
        if (given := os.environ.get(variable, "")).startswith(beginning):
            return variable, given
    return None


def _remembered(home: Path, key: str) -> str | None:
    with suppress(FileNotFoundError, ValueError):
        found = json.loads((home / _FILE).read_text())
        if isinstance(found, dict) and isinstance(value := found.get(key), str):
            return value
    return None


def _store(text: str, told_by: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "s3" or not parts.netloc or parts.query or "@" in parts.netloc:
        # It is not repeated: there may be a key in it.
        raise ConfigError(f"{told_by} names no object store: write s3://BUCKET/PREFIX, or {LOCAL}.")
    return text.rstrip("/")

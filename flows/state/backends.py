"""The servers that hold the state instead of local files: a database and an object store.

The user names them by `GPTFLOW_DATABASE` and `GPTFLOW_ARTIFACTS`, by the variables that MLflow documents for the same
purpose, or by options of `gptflow up`. The state root saves them, without any password, so that every later command
finds the same state:

    backends.json   {"database": "postgresql://USER@HOST:PORT/NAME", "artifacts": "s3://BUCKET/PREFIX"}

How to talk to them is in postgres.py and object_store.py.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flows.state import postgres
from flows.state.postgres import PostgresDatabase
from gptcore.errors import ConfigError
from gptcore.manifest import write_atomically
from gptcore.records import read_record

ARTIFACTS = "GPTFLOW_ARTIFACTS"
LOCAL = "local"
"""The value, in place of an address, that selects local files even if the state root has saved an address."""
_DATABASES_OF_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI")
_ARTIFACTS_OF_MLFLOW = ("MLFLOW_DEFAULT_ARTIFACT_ROOT", "MLFLOW_ARTIFACTS_DESTINATION")
_FILE = "backends.json"
_Saved = dict[str, str | None]


@dataclass(frozen=True)
class Backends:
    """The servers that hold the state; None means local files."""

    database: PostgresDatabase | None = None
    artifacts: str | None = None
    """s3://BUCKET/PREFIX, without a slash at its end."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables that name these servers to another process."""
        values = {postgres.VARIABLE: self.database.url if self.database else None, ARTIFACTS: self.artifacts}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.database.url if self.database else None, self.artifacts))) or "local files"


@dataclass(frozen=True)
class _Address:
    """The address of a server, None for local files, and the variable or file that holds it."""

    url: str | None
    source: str


def read_backends(home: Path) -> Backends:
    """Read which servers hold the state root at `home`: from the environment, else from what it has saved.

    Raises ConfigError if an address cannot be used.
    """
    database = _read_variables(postgres.VARIABLE, _DATABASES_OF_MLFLOW, "postgres")
    artifacts = _read_variables(ARTIFACTS, _ARTIFACTS_OF_MLFLOW, "s3:")
    if (database is None or artifacts is None) and _is_damaged(home / _FILE):
        raise ConfigError(
            f"{home / _FILE} is damaged, so it is unknown which servers hold the state. Set {postgres.VARIABLE} and "
            f"{ARTIFACTS} to their addresses, or to `{LOCAL}` for files in the state root: the file is then written "
            "again."
        )
    database, artifacts = database or _read_saved(home, "database"), artifacts or _read_saved(home, "artifacts")
    return Backends(
        postgres.parse(database.url, database.source) if database.url else None,
        _check_store_url(artifacts.url, artifacts.source) if artifacts.url else None,
    )


def export_passwords() -> None:
    """Move the passwords of servers from the URLs in the environment to variables of their own.

    The database's password goes to PGPASSWORD, and its TLS options go to PGSSLMODE and PGSSLROOTCERT. After this, no
    variable of gptflow, MLflow or Prefect has a password in a URL, because cards, messages and logs show URLs.
    Libraries and child processes read the other variables. Raises ConfigError if a URL cannot be used, or if two
    passwords of the database differ.
    """
    if (login := _take_login("PREFECT_API_URL")) is not None:
        os.environ.setdefault("PREFECT_API_AUTH_STRING", ":".join(login))
    if (login := _take_login("MLFLOW_TRACKING_URI")) is not None:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", login[0])
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", login[1])
    for variable in (postgres.VARIABLE, *_DATABASES_OF_MLFLOW):
        if (url := os.environ.get(variable, "")).startswith("postgres"):
            os.environ[variable] = postgres.export_password(url, variable)
    chosen = _read_variables(postgres.VARIABLE, _DATABASES_OF_MLFLOW, "postgres")
    if chosen is not None and chosen.url:
        postgres.export_tls_options(chosen.url, chosen.source)


def _take_login(variable: str) -> tuple[str, str] | None:
    """Remove user and password from the web address in an environment variable, and return them. None without them."""
    address = os.environ.get(variable, "")
    scheme, _, rest = address.partition("://")
    user, at, _ = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if not at or not scheme.startswith("http"):
        return None
    os.environ[variable] = f"{scheme}://{rest[len(user) + 1 :]}"
    name, _, password = user.partition(":")
    return unquote(name), unquote(password)


def apply_options(database: str | None, artifacts: str | None) -> None:
    """Set the environment variables from the options `--database` and `--artifacts`; None leaves a variable alone.

    Raises ConfigError if the database's address has a password in it.
    """
    if database is not None:
        if database != LOCAL and postgres.has_password(database, "--database"):
            raise ConfigError(
                "--database has a password in it, which everybody on this machine can read while the command runs. "
                "Give the address without the password, and set the password as PGPASSWORD or in ~/.pgpass; "
                f"{postgres.VARIABLE} may contain it too."
            )
        os.environ[postgres.VARIABLE] = database
    if artifacts is not None:
        os.environ[ARTIFACTS] = artifacts


def read_saved_artifacts(home: Path) -> str | None:
    """Return the address of the object store that the state root has saved."""
    return _read_saved(home, "artifacts").url


def save_backends(home: Path, backends: Backends) -> None:
    """Write to the state root at `home` which servers hold it, if that has changed."""
    body = {"database": backends.database and backends.database.url, "artifacts": backends.artifacts}
    if _is_damaged(home / _FILE) or body != {key: _read_saved(home, key).url for key in body}:
        write_atomically(home / _FILE, json.dumps(body) + "\n")


def _read_variables(own: str, of_mlflow: tuple[str, ...], scheme: str) -> _Address | None:
    """Return the address that a variable holds; None if no variable holds one.

    A variable of MLflow counts only if its address begins with `scheme`.
    """
    if url := os.environ.get(own):
        return _Address(None if url == LOCAL else url, own)
    for variable in of_mlflow:
        if (url := os.environ.get(variable, "")).startswith(scheme):
            return _Address(url, variable)
    return None


def _read_saved(home: Path, key: str) -> _Address:
    return _Address((read_record(home / _FILE, _Saved) or {}).get(key), _FILE)


def _is_damaged(path: Path) -> bool:
    return read_record(path, _Saved) is None and path.exists()


def _check_store_url(url: str, source: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc or parts.query or "@" in parts.netloc:
        # The message does not repeat the URL, which may contain a key.
        raise ConfigError(f"{source} does not name an object store. Write s3://BUCKET/PREFIX, or {LOCAL}.")
    return url.rstrip("/")

"""Empty, migrated databases of MLflow and Prefect, created once because the migrations take seconds.

They are kept in pytest's cache, named by the versions that created them, so that the next run of the tests reuses them.
"""

import fcntl
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

_MAKE_PREFECTS = (
    "import asyncio; from prefect.server.database import provide_database_interface;"
    "asyncio.run(provide_database_interface().create_db())"
)


def name() -> str:
    """Return a directory name with the versions of the packages that create the databases."""
    return "databases-" + "-".join(version(package) for package in ("mlflow", "prefect", "alembic", "sqlalchemy"))


def make(directory: Path, environment: dict[str, str]) -> None:
    """Create mlflow.db and prefect.db in the directory unless they exist. Other workers wait for the lock meanwhile."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "whole").exists():
            return
        for left in directory.glob("*.db*"):
            left.unlink()
        url = f"sqlite+aiosqlite:///{directory / 'prefect.db'}"
        home = {"PREFECT_HOME": str(directory), "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        prefect = subprocess.Popen([sys.executable, "-c", _MAKE_PREFECTS], env={**environment, **home})
        MlflowClient(f"sqlite:///{directory / 'mlflow.db'}").search_experiments()
        assert prefect.wait(120) == 0
        (directory / "whole").touch()


def commit_without_waiting() -> None:
    """Let MLflow's SQLite databases in this process leave writing to the system: the machine will not lose power."""

    @event.listens_for(Engine, "connect")
    def configure(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("pragma synchronous = off")


def give(root: Path, databases: Path) -> None:
    """Copy both databases to the places where an unused state root would create its own."""
    for file, home in (
        ("mlflow.db", root),
        ("prefect.db", root / "prefect"),
        ("prefect.db", root / "prefect/ephemeral"),
    ):
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(databases / file, home)

"""The databases of MLflow and Prefect as they are in the beginning, made once: their migrations take seconds.

They are kept in pytest's cache by the versions that made them, so that a second run of the tests finds them there.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MAKE_PREFECTS = (
    "import asyncio; from prefect.server.database import provide_database_interface;"
    "asyncio.run(provide_database_interface().create_db())"
)


def name() -> str:
    """A directory name that says which versions made what is in it."""
    return "databases-" + "-".join(version(package) for package in ("mlflow", "prefect", "alembic", "sqlalchemy"))


def make(directory: Path, environment: dict[str, str]) -> None:
    """Makes mlflow.db and prefect.db in the directory, unless they are there. Other workers wait meanwhile."""
    from mlflow import MlflowClient

    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "whole").exists():
            return
        for left in directory.glob("*.db*"):
            left.unlink()
        own = {"PREFECT_HOME": str(directory), "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"{_url(directory)}"}
        prefect = subprocess.Popen([sys.executable, "-c", MAKE_PREFECTS], env={**environment, **own})
        MlflowClient(f"sqlite:///{directory / 'mlflow.db'}").search_experiments()
        assert prefect.wait(120) == 0
        (directory / "whole").touch()


def _url(directory: Path) -> str:
    return f"sqlite+aiosqlite:///{directory / 'prefect.db'}"


def give(root: Path, databases: Path) -> None:
    """Lets a state root that is yet to be used begin with databases that are migrated already."""
    for file, home in (
        ("mlflow.db", root),
        *(("prefect.db", root / place) for place in ("prefect", "prefect/ephemeral")),
    ):
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(databases / file, home)
        os.utime(home / file)

"""The databases of MLflow and Prefect: how they are created, migrated and checked.

MLflow and Prefect create their tables by a hundred migrations. These take seconds and are not one transaction, so a
kill in between would leave a SQLite database that neither can use or repair. Therefore:

- A new database is made under a temporary name in the same directory, and renamed when it is complete.
- A database of an older schema is migrated as a copy, which then replaces it in one transaction of SQLite. The database
  as it was stays beside it: mlflow-schema-<revision>.db.
- A lock beside the database (mlflow.lock, prefect.lock) lets one process at a time create or migrate it.
- A database that cannot be used is named in an error, with the fix. It is never replaced if it may have had contents.

The check of a complete database takes milliseconds and imports neither MLflow nor Prefect. Both record the revision of
their schema in the table alembic_version, and keep one file per revision in their packages. As a program,
`python -m flows.state.databases prefect DIRECTORY` prepares one database.

On PostgreSQL all of MLflow's migrations are one transaction, which a kill undoes. Each of Prefect's is a transaction of
its own, but about ten of them commit half-way, such as those that create an index concurrently. A kill there leaves
tables that Prefect can migrate no further. They are created again if they have no rows of a user (PostgresTables).
"""

import fcntl
import os
import re
import shutil
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flows.state.postgres import PREFECT_URL, PostgresDatabase
from gptcore.errors import GPTCoreError
from gptcore.manifest import TEMPORARY, flush
from gptcore.records import open_lock

MIGRATED = "migrated"
"""The line on stderr that names a migrated database and its copy begins with this word."""
_PATIENCE_SECONDS = 20.0
_POLL_SECONDS = 0.5
_COPIES = 2
"""Number of copies with older schemas that are kept beside a database."""
_COMPANIONS = ("-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database in use."""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGE = ("file is not a database", "database disk image is malformed", "attempt to write a readonly database")
"""How SQLite describes a database that cannot be used, which waiting does not change."""


_VARIABLES_OF_PREFECT = tuple(
    f"PREFECT_{group}_DATABASE_{key}" for group in ("SERVER", "API") for key in ("CONNECTION_URL", "DRIVER", "NAME")
)


class DatabaseBroken(GPTCoreError):
    """A database of the state cannot be used: damaged, read-only, half migrated, of a newer schema, or another file."""


class Condition(Enum):
    """What a database file holds."""

    MISSING = auto()
    EMPTY = auto()
    """No rows of a user: 0 bytes, or unfinished because an earlier release was killed while it created the tables."""
    OLD = auto()
    """Rows in an older schema than the installed package uses."""
    BUSY = auto()
    """Another process writes to it, so it cannot be read now."""
    WHOLE = auto()
    """Complete: it has the schema of the installed package."""


@dataclass(frozen=True)
class Schema:
    """The tables of a package, and how the package creates and migrates them."""

    package: str
    migrations: str
    """The directory in the package with one file per revision."""
    rows: Mapping[str, int]
    """Tables with a user's rows, and how many rows each has in a new database."""
    driver: str
    """The driver of SQLite in the package's URLs; empty for the default."""
    upgrade: Callable[[str], None]
    """Create the tables in the database with this URL if it is empty, else migrate them."""

    def compare(self, revision: str) -> int | None:
        """Return 0 for the revision of the installed package, -1 for an earlier one, None for an unknown one."""
        spec = find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations, self.package
        directory = Path(spec.submodule_search_locations[0], self.migrations)
        texts = [text for path in directory.glob("*.py") if revision.encode() in (text := path.read_bytes())]
        name = re.escape(revision.encode())
        if not any(re.search(rb"^revision\b.*['\"]%s['\"]" % name, text, re.M) for text in texts):
            return None
        return -1 if any(re.search(rb"^down_revision\b.*['\"]%s['\"]" % name, text, re.M) for text in texts) else 0


def _upgrade_mlflow(url: str) -> None:
    from mlflow.db import upgrade

    assert upgrade.callback is not None
    upgrade.callback(url)  # `mlflow db upgrade`


def _upgrade_prefect(url: str) -> None:
    import asyncio

    from prefect.server.database import provide_database_interface
    from prefect.server.database.dependencies import temporary_database_config
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

    # Prefect remembers the first URL that it meets, and a server in this process would keep to the temporary file.
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}), temporary_database_config(None):
        asyncio.run(provide_database_interface().create_db())


_MLFLOW = Schema(
    "mlflow",
    "store/db_migrations/versions",
    {"experiments": 1, "runs": 0, "registered_models": 0},
    "",
    _upgrade_mlflow,
)
_PREFECT = Schema(
    "prefect",
    "server/database/_migrations/versions/sqlite",
    {"flow_run": 0, "deployment": 0, "block_document": 0, "automation": 0, "variable": 0},
    "aiosqlite",
    _upgrade_prefect,
)


_PREFECT_ON_POSTGRES = replace(_PREFECT, migrations="server/database/_migrations/versions/postgresql")


def sqlite_url(path: Path, driver: str = "") -> str:
    """Return SQLAlchemy's URL of a SQLite file, for the named driver.

    SQLAlchemy takes the path literally, up to a `?`, and has no way to quote one. So a path with a `?` becomes a URI of
    SQLite, in which the path is quoted. The URL then has a driver, because MLflow creates the parent directories of a
    path that it cuts out of a URL that begins with `sqlite:///`.
    """
    if "?" in str(path):
        return f"sqlite+{driver or 'pysqlite'}:///file:{quote(str(path))}?uri=true"
    return f"sqlite{driver and f'+{driver}'}:///{path}"


def is_damage(error: BaseException) -> bool:
    """Whether the message of MLflow's or SQLAlchemy's error says that a SQLite database is damaged or read-only."""
    return any(phrase in str(error) for phrase in _DAMAGE)


@dataclass(frozen=True)
class SQLiteDatabase:
    """The database of MLflow or Prefect in a SQLite file."""

    path: Path
    schema: Schema
    files: Path | None = None
    """A directory with files that the database describes. An empty database beside them has lost its rows."""

    @property
    def url(self) -> str:
        """SQLAlchemy's URL of the database, with the driver that its package uses."""
        return sqlite_url(self.path, self.schema.driver)

    def check(self) -> Condition:
        """Return the database's condition. Raises DatabaseBroken with the fix if it cannot be used."""
        try:
            status = self.path.stat()
        except OSError as error:
            if self.path.is_symlink():  # perhaps to a disk that is not mounted: a new database would replace the link
                raise DatabaseBroken(
                    f"the database {self.path} is a link to {self.path.readlink()}, which cannot be opened: "
                    f"{error.strerror}. Mount its disk, or remove the link to begin with an empty database."
                ) from None
            if not isinstance(error, FileNotFoundError):
                raise
            return Condition.MISSING
        if not stat.S_ISREG(status.st_mode):
            raise DatabaseBroken(f"{self.path} is not a file, so it cannot be a database. Move it away.")
        if not os.access(self.path, os.R_OK | os.W_OK):
            raise DatabaseBroken(
                f"the database {self.path} is read-only for this user, or not readable. Correct its permissions, or "
                "set GPTFLOW_HOME to another directory."
            )
        try:
            with closing(_connect(self.path, seconds=0.0)) as connection:
                return self._classify(connection)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in _BUSY:
                return Condition.BUSY
            raise self.describe_damage(str(error)) from None

    def prepare(self) -> None:
        """Create the database, or migrate it to the installed package's schema, unless it is complete.

        Raises DatabaseBroken if it cannot be used, or has an older schema and cannot be migrated.
        """
        if self.check() is Condition.WHOLE:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            for left in self.path.parent.glob(f"{TEMPORARY}{self.path.name}-*"):  # a killed process left it
                left.unlink(missing_ok=True)
            condition = self.check()
            if condition in (Condition.MISSING, Condition.EMPTY):
                self._create()
            elif condition is Condition.OLD:
                self._migrate()

    def describe_damage(self, reason: str) -> DatabaseBroken:
        """Return the error for a database that SQLite or its package cannot use."""
        return DatabaseBroken(f"the database {self.path} cannot be used: {reason}. {self._advise()}")

    def _classify(self, connection: sqlite3.Connection) -> Condition:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        revision = None
        if "alembic_version" in tables:
            (revision,) = connection.execute("select version_num from alembic_version").fetchone() or (None,)
        order = self.schema.compare(str(revision)) if revision else -1
        if order == 0:
            return Condition.WHOLE
        if order is None:
            newer = _describe_newer(str(revision), self.schema.package)
            raise DatabaseBroken(f"the database {self.path} {newer} {self._advise()}")
        if any(_count(connection, table) > rows for table, rows in self.schema.rows.items() if table in tables):
            return Condition.OLD
        if tables - {"alembic_version"} and not tables & self.schema.rows.keys():
            raise self.describe_damage(f"it has none of {self.schema.package}'s tables")
        if self.files is not None and self.files.is_dir() and any(self.files.iterdir()):
            raise self.describe_damage(f"it is empty, but {self.files} has files")
        return Condition.EMPTY

    def _advise(self) -> str:
        copies = self._list_copies()
        backup = f"the copy {copies[-1]}" if copies else "a backup"
        return f"Restore it from {backup}, or move it away to begin with an empty one."

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open_lock(self.path.with_suffix(".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create(self) -> None:
        with self._stage() as staged:
            self.schema.upgrade(sqlite_url(staged, self.schema.driver))
            _finish(staged)
            self._remove_companions(self.path)  # an unfinished journal would be applied to the new database
            staged.replace(self.path)
            flush(self.path.parent)

    def _migrate(self) -> None:
        """Migrate a copy, and replace the database by it. No other process can write to the database meanwhile."""
        try:
            with closing(_connect(self.path, _PATIENCE_SECONDS)) as database, self._stage() as staged:
                database.execute("pragma locking_mode = exclusive")  # the lock outlives the transaction
                database.execute("begin exclusive")
                (revision,) = database.execute("select version_num from alembic_version").fetchone()
                database.execute("commit")
                _copy(database, staged)
                _finish(staged)
                kept = self._keep_copy(staged, revision)
                self.schema.upgrade(sqlite_url(staged, self.schema.driver))
                _finish(staged)
                with closing(_connect(staged, 0.0)) as migrated:
                    migrated.backup(database)
            print(f"{MIGRATED} {self.path}; the database as it was is {kept}", file=sys.stderr)
        except Exception as error:
            reason, package = str(error).strip().partition("\n")[0], self.schema.package
            if isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF in _BUSY:
                reason = "another process uses it"
            raise DatabaseBroken(
                f"the database {self.path} has an older schema than {package} {_version(package)}, and could not be "
                f"migrated: {reason}. It is unchanged. Stop what uses it and run the same command again, or install "
                f"the earlier release of {package}."
            ) from error

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        staged = self.path.with_name(f"{TEMPORARY}{self.path.name}-{os.getpid()}")
        try:
            yield staged
        finally:
            staged.unlink(missing_ok=True)
            self._remove_companions(staged)

    def _remove_companions(self, path: Path) -> None:
        for suffix in _COMPANIONS:
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def _keep_copy(self, staged: Path, revision: str) -> Path:
        kept = self.path.with_name(f"{self.path.stem}-schema-{revision}{self.path.suffix}")
        temporary = staged.with_name(f"{staged.name}-copy")
        shutil.copyfile(staged, temporary)
        flush(temporary)
        temporary.replace(kept)
        flush(kept.parent)
        for old in self._list_copies()[:-_COPIES]:
            old.unlink(missing_ok=True)
        return kept

    def _list_copies(self) -> list[Path]:
        """List the kept copies, oldest first."""
        copies = self.path.parent.glob(f"{self.path.stem}-schema-*{self.path.suffix}")
        return sorted(copies, key=lambda path: path.stat().st_mtime)


def mlflow_database(root: Path) -> SQLiteDatabase:
    """Return MLflow's database in the state root."""
    return SQLiteDatabase(root / "mlflow.db", _MLFLOW, root / "artifacts")


def prefect_database(home: Path) -> SQLiteDatabase:
    """Return the database of the Prefect server with this home directory."""
    return SQLiteDatabase(home / "prefect.db", _PREFECT)


@dataclass(frozen=True)
class PostgresTables:
    """The tables of MLflow or Prefect on PostgreSQL, in the schema of the package's name."""

    database: PostgresDatabase
    schema: Schema
    url: str
    """The package's own URL of the database."""

    def is_whole(self, cursor: Any) -> bool:
        """Whether the tables have the installed package's schema. Raises DatabaseBroken for a newer one."""
        package = self.schema.package
        cursor.execute("select to_regclass(%s) is not null", (f"{package}.alembic_version",))
        if not cursor.fetchone()[0]:
            return False
        cursor.execute(f"select version_num from {package}.alembic_version")
        (revision,) = cursor.fetchone() or (None,)
        if revision is None:
            return False
        if (order := self.schema.compare(revision)) is None:
            raise DatabaseBroken(f"the database {self.database.url} {_describe_newer(revision, package)}")
        return order == 0

    def prepare(self) -> None:
        """Create or migrate the tables, unless they are complete. Only one process on any machine does so at a time.

        Creates half-made tables again if they have no rows. Raises DatabaseBroken if the tables cannot be created or
        migrated.
        """
        with self.database.open_cursor() as cursor:
            while not self.is_whole(cursor):
                # The lock is not awaited in the server: a migration that builds an index waits for all statements.
                cursor.execute(f"select pg_try_advisory_lock(hashtextextended('gptflow {self.schema.package}', 0))")
                if cursor.fetchone()[0]:
                    if not self.is_whole(cursor):
                        self._upgrade(cursor)
                    return
                time.sleep(_POLL_SECONDS)

    def _upgrade(self, cursor: Any) -> None:
        package = self.schema.package
        try:
            try:
                self.schema.upgrade(self.url)
            except Exception:
                if self._has_rows(cursor):
                    raise
                # One statement, so one transaction: without the privilege to create a schema, it stays.
                cursor.execute(f"drop schema {package} cascade; create schema {package}")
                self.schema.upgrade(self.url)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise DatabaseBroken(
                f"the tables of {package} in the database {self.database.url} could not be created or migrated to "
                f"{package} {_version(package)}: {reason}. Run the same command again. If it fails again, restore a "
                f"backup of the schema {package}, or install the earlier release of {package}."
            ) from error

    def _has_rows(self, cursor: Any) -> bool:
        for table, rows in self.schema.rows.items():
            name = f"{self.schema.package}.{table}"
            cursor.execute("select to_regclass(%s) is not null", (name,))
            if cursor.fetchone()[0]:
                cursor.execute(f"select count(*) from (select 1 from {name} limit 2) as found")
                if cursor.fetchone()[0] > rows:
                    return True
        return False


def mlflow_tables(database: PostgresDatabase) -> PostgresTables:
    """Return MLflow's tables on PostgreSQL."""
    return PostgresTables(database, _MLFLOW, database.tracking_uri)


def prefect_tables(database: PostgresDatabase) -> PostgresTables:
    """Return Prefect's tables on PostgreSQL. Its server needs `PostgresDatabase.prefect_environment`."""
    return PostgresTables(database, _PREFECT_ON_POSTGRES, database.prefect_environment[PREFECT_URL])


def is_prefect_elsewhere(environment: Mapping[str, str]) -> bool:
    """Whether the environment gives Prefect's server another database than the one in its home directory."""
    return any(environment.get(name) for name in _VARIABLES_OF_PREFECT)


def main(package: str, place: str) -> None:
    """Prepare the package's database in a directory or at a PostgreSQL URL. An error has no traceback."""
    makers = {"mlflow": (mlflow_database, mlflow_tables), "prefect": (prefect_database, prefect_tables)}
    in_directory, on_postgres = makers[package]
    try:
        (on_postgres(PostgresDatabase(place)) if "://" in place else in_directory(Path(place))).prepare()
    except GPTCoreError as error:
        sys.exit(f"error: {error}")


def _connect(path: Path, seconds: float) -> sqlite3.Connection:
    """Open an existing database without implicit transactions. Wait up to `seconds` for locks of other processes."""
    uri = f"file:{quote(str(path))}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)


def _version(package: str) -> str:
    from importlib.metadata import version  # 15 ms, for error messages only

    return version(package)


def _describe_newer(revision: str, package: str) -> str:
    return (
        f"has the schema {revision}, which {package} {_version(package)} does not know: a newer {package} made it. "
        f"Install that release of {package} again."
    )


def _count(connection: sqlite3.Connection, table: str) -> int:
    (number,) = connection.execute(f"select count(*) from (select 1 from {table} limit 2)").fetchone()
    return int(number)


def _copy(connection: sqlite3.Connection, path: Path) -> None:
    with closing(sqlite3.connect(path)) as copy:
        connection.backup(copy)


def _finish(path: Path) -> None:
    """Make the database one file, without a write-ahead log beside it, and force it to disk."""
    with closing(_connect(path, 0.0)) as connection:
        connection.execute("pragma journal_mode = delete")
    flush(path)


if __name__ == "__main__":
    main(*sys.argv[1:])

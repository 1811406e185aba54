"""PostgreSQL, if several machines share the state's database: `GPTFLOW_DATABASE`, or `up --database`.

MLflow, Prefect and gptflow have a schema each, because two of them have a table of the same name:

    mlflow     runs, registry                  prefect    the server of `gptflow up`
    gptflow    `holders`: the holder of each lock between machines (postgres_lock.py)

A `PostgresDatabase` never has a password in its URL. backends.py exports it as PGPASSWORD, which all drivers and
child processes read, so no command line, log or error message contains it. The driver is imported at the first
connection.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from gptcore.errors import ConfigError, GPTCoreError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

VARIABLE = "GPTFLOW_DATABASE"
PREFECT_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
"""The variable with the URL of Prefect's database."""
SCHEMAS = ("gptflow", "mlflow", "prefect")
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+asyncpg")
_AS_VARIABLES = {"sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT"}
"""Options of a URL (behind its `?`) that both drivers read from these variables."""
_CONNECT_SECONDS = 10
_MLFLOW_PATIENCE = {  # MLflow notices a lost server within half a minute, not after the system's quarter of an hour
    "connect_timeout": _CONNECT_SECONDS,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_HOLDERS = """
    create table if not exists gptflow.holders
    (name text primary key, host text not null, pid integer not null, since text not null, flow_run text not null)
"""
_EXTENSION = "pg_trgm"
_prepared: set[str] = set()


class DatabaseUnreachable(GPTCoreError):
    """PostgreSQL does not answer."""


class DatabaseRefused(GPTCoreError):
    """PostgreSQL refuses the connection, or lacks a privilege or an extension that gptflow needs."""

    exit_code = 2


@dataclass(frozen=True)
class PostgresDatabase:
    """The address of a database, without its password."""

    url: str
    """postgresql://USER@HOST:PORT/NAME."""

    @property
    def tracking_uri(self) -> str:
        """MLflow's URL: with its own schema, and with connections that notice a lost server."""
        options = {"options": "-csearch_path=mlflow", **_MLFLOW_PATIENCE}
        return f"{self.url}?{'&'.join(f'{key}={quote(str(value))}' for key, value in options.items())}"

    @property
    def prefect_environment(self) -> dict[str, str]:
        """The variables that let Prefect's server use the database."""
        return {
            PREFECT_URL: self.url.replace("postgresql://", "postgresql+asyncpg://", 1),
            "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH": "prefect, public",
        }

    def connect(self, **options: Any) -> "Connection":
        """Open a connection in autocommit mode. Raises DatabaseUnreachable or DatabaseRefused, with the fix."""
        psycopg2 = _driver()
        try:
            connection = psycopg2.connect(self.url, **{"connect_timeout": _CONNECT_SECONDS, **options})
        except psycopg2.OperationalError as error:
            raise _translate_error(self, str(error)) from None
        connection.autocommit = True
        return connection

    @contextmanager
    def open_cursor(self) -> Iterator[Any]:
        """Open a connection and yield its cursor. Raises DatabaseUnreachable or DatabaseRefused."""
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            try:
                yield cursor
            except _driver().Error as error:
                raise _translate_error(self, str(error)) from None

    def prepare(self) -> None:
        """Check that the database answers, and create the missing schemas.

        Raises DatabaseUnreachable or DatabaseRefused.
        """
        if self.url in _prepared:
            return
        with self.open_cursor() as cursor:
            # The connection holds this lock until it is closed.
            cursor.execute("select pg_advisory_lock(hashtextextended('gptflow schemas', 0))")
            cursor.execute("select to_regclass('gptflow.holders') is not null")
            if not cursor.fetchone()[0]:
                self._create_schemas(cursor)
        _prepared.add(self.url)

    def _create_schemas(self, cursor: Any) -> None:
        cursor.execute("select 1 from pg_available_extensions where name = %s", (_EXTENSION,))
        if cursor.fetchone() is None:
            raise DatabaseRefused(
                f"the database server of {self.url} lacks the extension {_EXTENSION}, which Prefect needs. Install "
                "PostgreSQL's contrib modules on that server."
            )
        for schema in SCHEMAS:  # `create schema if not exists` needs the privilege even if the schema exists
            cursor.execute("select to_regnamespace(%s) is null", (schema,))
            if cursor.fetchone()[0]:
                cursor.execute(f"create schema {schema}")
        cursor.execute(_HOLDERS)


def parse(url: str, source: str) -> PostgresDatabase:
    """Return the database that the URL names, without its password and options.

    `source` is the variable, option or file that holds the URL. Raises ConfigError, without repeating the URL.
    """
    parts = _split(url, source)
    user = f"{quote(unquote(parts.username), safe='')}@" if parts.username else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return PostgresDatabase(f"postgresql://{user}{host}:{parts.port or 5432}/{parts.path.lstrip('/')}")


def has_password(url: str, source: str) -> bool:
    """Whether there is a password in the URL. Raises ConfigError, as `parse`."""
    return _split(url, source).password is not None


def export_password(url: str, source: str) -> str:
    """Set PGPASSWORD to the password in the URL, and return the URL without the password.

    Raises ConfigError if PGPASSWORD has another value already.
    """
    parts = _split(url, source)
    if parts.password is None:
        return url
    password = unquote(parts.password)
    if os.environ.setdefault("PGPASSWORD", password) != password:
        raise ConfigError(
            f"{source} has another password than PGPASSWORD. Remove the password from the URL; for several databases "
            "with different passwords, write them into ~/.pgpass."
        )
    user, _, address = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}@{address}").geturl()


def export_tls_options(url: str, source: str) -> None:
    """Set PGSSLMODE and PGSSLROOTCERT to the URL's options, unless they have a value already."""
    for key, value in parse_qsl(_split(url, source).query):
        if key in _AS_VARIABLES:
            os.environ.setdefault(_AS_VARIABLES[key], value)


def _split(url: str, source: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in _SCHEMES and parts.hostname and (parts.port or 1) and parts.path.lstrip("/")
    except ValueError:
        is_valid = None
    if not is_valid or "/" in parts.path.lstrip("/"):
        # The message does not repeat the URL, which may contain a password.
        raise ConfigError(
            f"{source} does not name a database. Write postgresql://USER@HOST/NAME, and set the password as PGPASSWORD."
        )
    return parts


def _driver() -> Any:
    try:
        import psycopg2
    except ImportError:
        raise DatabaseRefused("PostgreSQL needs a driver: pip install 'gptflow[postgres]'") from None
    return psycopg2


def _translate_error(database: PostgresDatabase, message: str) -> GPTCoreError:
    """Return the driver's error as one of this module's errors, with the fix."""
    message = message.strip().partition("\n")[0]
    fixes = {
        "password": "Set PGPASSWORD, or write the password into ~/.pgpass.",
        "pg_hba.conf": "Let pg_hba.conf of the database server accept this user from this machine.",
        "does not exist": "Create it with `createdb` or `createuser`, or in the console of the server's provider.",
        "permission denied": "Grant the user CREATE on the database, or create the schemas "
        f"{', '.join(SCHEMAS)} with this user as their owner.",
    }
    for phrase, fix in fixes.items():
        if phrase in message:
            return DatabaseRefused(f"the database {database.url} refuses: {message}. {fix}")
    return DatabaseUnreachable(
        f"the database {database.url} does not answer: {message}. Start it, or fix the address. Complete work is safe."
    )

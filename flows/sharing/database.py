"""PostgreSQL, where the state's database is one that several machines share: `GPTFLOW_DATABASE`, or `up --database`.

MLflow, Prefect and gptflow have a schema each, because two of them have a table of the same name:

    mlflow     runs, registry                  prefect    the server of `gptflow up`
    gptflow    `holders`: who holds which lock between machines (advisory.py)

A password never stands in a URL here: it is taken out when the URL is read and handed on as PGPASSWORD, which all
drivers and child processes read, so no command line, log or error has it. Nothing here imports a driver before it is
needed.
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
SCHEMAS = ("gptflow", "mlflow", "prefect")
_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+asyncpg")
_AS_VARIABLES = {"sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT"}
"""What may follow the `?` of a URL: both drivers read it from these variables."""
_CONNECT_SECONDS = 10
_MLFLOW_PATIENCE = {  # a peer that is gone is noticed within half a minute, not after the system's quarter of an hour
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


class DatabaseAway(GPTCoreError):
    """PostgreSQL does not answer."""


class DatabaseRefuses(GPTCoreError):
    """PostgreSQL does not let us in, or lacks what is needed."""

    exit_code = 2


@dataclass(frozen=True)
class Database:
    """Where the database is; never the password."""

    url: str
    """postgresql://USER@HOST:PORT/NAME."""

    @property
    def tracking_uri(self) -> str:
        """MLflow's: its own schema, and connections that notice when the other end is gone."""
        options = {"options": "-csearch_path=mlflow", **_MLFLOW_PATIENCE}
        return f"{self.url}?{'&'.join(f'{key}={quote(str(value))}' for key, value in options.items())}"

    @property
    def for_prefect(self) -> dict[str, str]:
        """The variables that let Prefect's server use it."""
        return {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.url.replace("postgresql://", "postgresql+asyncpg://", 1),
            "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH": "prefect, public",
        }

    def connect(self, **options: Any) -> "Connection":
        """A connection in autocommit mode. Raises DatabaseAway or DatabaseRefuses, with the cure."""
        psycopg2 = _driver()
        try:
            connection = psycopg2.connect(self.url, **{"connect_timeout": _CONNECT_SECONDS, **options})
        except psycopg2.OperationalError as error:
            raise _explained(self, str(error)) from None
        connection.autocommit = True
        return connection

    @contextmanager
    def asked(self) -> Iterator[Any]:
        """A cursor of a connection of its own. Raises DatabaseAway or DatabaseRefuses."""
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            try:
                yield cursor
            except _driver().Error as error:
                raise _explained(self, str(error)) from None

    def prepare(self) -> None:
        """Makes sure that it answers and has our schemas. Raises DatabaseAway or DatabaseRefuses."""
        if self.url in _prepared:
            return
        with self.asked() as cursor:
            cursor.execute("select pg_advisory_lock(hashtextextended('gptflow schemas', 0))")  # until it is closed
            cursor.execute("select to_regclass('gptflow.holders') is not null")
            if not cursor.fetchone()[0]:
                self._make(cursor)
        _prepared.add(self.url)

    def _make(self, cursor: Any) -> None:
        cursor.execute("select 1 from pg_available_extensions where name = %s", (_EXTENSION,))
        if cursor.fetchone() is None:
            raise DatabaseRefuses(
                f"the database server of {self.url} has no extension {_EXTENSION}, which Prefect needs. Install "
                "PostgreSQL's contrib modules there."
            )
        for schema in SCHEMAS:  # the right to create one is asked for even where it is there
            cursor.execute("select to_regnamespace(%s) is null", (schema,))
            if cursor.fetchone()[0]:
                cursor.execute(f"create schema {schema}")
        cursor.execute(_HOLDERS)


def parse(text: str, told_by: str) -> Database:
    """The database of a URL that `told_by` gives. Raises ConfigError, without repeating the URL."""
    parts = _split(text, told_by)
    for key, value in parse_qsl(parts.query):
        if key in _AS_VARIABLES:
            os.environ.setdefault(_AS_VARIABLES[key], value)
    user = f"{quote(unquote(parts.username), safe='')}@" if parts.username else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return Database(f"postgresql://{user}{host}:{parts.port or 5432}/{parts.path.lstrip('/')}")


def without_password(text: str, told_by: str) -> str:
    """The URL without its password, which is handed on as PGPASSWORD. Raises ConfigError if that is another one."""
    parts = _split(text, told_by)
    if parts.password is None:
        return text
    password = unquote(parts.password)
    if os.environ.setdefault("PGPASSWORD", password) != password:
        raise ConfigError(
            f"{told_by} has another password than PGPASSWORD. Take it out of the URL; for several databases with "
            "different passwords write them into ~/.pgpass instead."
        )
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}@{place}").geturl()


def _split(text: str, told_by: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        is_right = parts.scheme in _SCHEMES and parts.hostname and (parts.port or 1) and parts.path.lstrip("/")
    except ValueError:
        is_right = None
    if not is_right or "/" in parts.path.lstrip("/"):
        # It is not repeated: there may be a password in it.
        raise ConfigError(
            f"{told_by} is no database: write postgresql://USER@HOST/NAME, and the password as PGPASSWORD."
        )
    return parts


def _driver() -> Any:
    try:
        import psycopg2
    except ImportError:
        raise DatabaseRefuses("PostgreSQL needs a driver: pip install 'gptflow[postgres]'") from None
    return psycopg2


def _explained(database: Database, said: str) -> GPTCoreError:
    said = said.strip().partition("\n")[0]
    where = f"the database {database.url}"
    refusals = {
        "password": "Set PGPASSWORD, or write it into ~/.pgpass.",
        "pg_hba.conf": "Let pg_hba.conf of the database server accept this user from this machine.",
        "does not exist": "Create it: `createdb`, `createuser`, or the console of who runs the server.",
        "permission denied": "Grant the user CREATE on the database, or create the schemas "
        f"{', '.join(SCHEMAS)} for it as their owner.",
    }
    for sign, cure in refusals.items():
        if sign in said:
            return DatabaseRefuses(f"{where} refuses: {said}. {cure}")
    return DatabaseAway(f"{where} does not answer: {said}. Start it, or mend the address. Nothing complete is lost.")

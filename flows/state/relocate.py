"""state.json: the state root's format, its identity and its path; and what follows if it has been moved.

MLflow keeps absolute paths in its database. So a state root records its own path, and the first command at another path
rewrites those paths: a moved or copied state answers every query, and nothing in a copy points to the original. The new
path is recorded before the database is changed, and the old path is deleted from the record afterwards. After a kill in
between, the next command repeats the rewrite, even if the state root was moved again. This module does not import
MLflow.

Other absolute paths stay as they are, because nothing is looked up by them: the sources of a corpus, which are outside
the state root, and the paths in reports, logs and MLmodel files, which tell people about the past.
"""

import fcntl
import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from flows.state import locks
from gptcore.errors import GPTCoreError
from gptcore.manifest import write_atomically
from gptcore.records import open_lock, parse_record, read_bytes

FORMAT = 1
"""The format that this release reads and writes. A state root without state.json is older, with the same layout."""
_FILE = "state.json"
_DATABASE = "mlflow.db"
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
    ("workspaces", "default_artifact_root"),
    ("workspaces", "trace_archival_location"),
)
"""Columns of MLflow's database that hold a path or a file URI."""
_JSON_LOCATIONS = (("datasets", "dataset_source"),)
"""Columns that hold JSON with paths in it."""
_OURS = """
    select distinct experiments.name, experiments.artifact_location from experiments
    join runs using (experiment_id) join tags using (run_uuid) where tags.key = 'run_key'
"""


@dataclass(frozen=True)
class StateRecord:
    """The content of state.json."""

    format: int
    id: str
    """The identity of the state, wherever it is: Prefect's deployments carry it. A copy beside its original gets its
    own."""
    path: str
    formerly: tuple[str, ...] = ()
    """Earlier paths that MLflow's database may still contain."""


@dataclass(frozen=True)
class _Format:
    """What every release can read of state.json."""

    format: int


def update_location(home: Path) -> None:
    """Record that the state root is at `home`, and rewrite the paths in its database if it was moved.

    `home` must be an existing directory. Raises GPTCoreError for a newer format, for a damaged state.json or database,
    and for a moved state root that is in use.
    """
    if read_state(home) is not None and not is_moved(home):
        return
    with open_lock(home / "mlflow.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = _plan_state(home, read_state(home))
        if state.formerly:
            with _hold_all_locks(home, state):
                _write_state(home, state)
                _rewrite_paths(home / _DATABASE, state.formerly, str(home))
        _write_state(home, replace(state, formerly=()))


def is_moved(home: Path) -> bool:
    """Whether state.json has another path than `home`, or the database may have one. Raises as `read_state` does."""
    state = read_state(home)
    return state is not None and (state.path != str(home) or bool(state.formerly))


def read_state(home: Path) -> StateRecord | None:
    """Read state.json; None if it does not exist. Raises GPTCoreError for a newer format or a damaged file."""
    path = home / _FILE
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    if (format_ := parse_record(data, _Format)) is not None and format_.format > FORMAT:
        raise GPTCoreError(
            f"the state root {home} has format {format_.format}, made by a newer release of gptflow; this one reads "
            f"format {FORMAT}. Upgrade gptflow, or set GPTFLOW_HOME to another directory."
        )
    if (state := parse_record(data, StateRecord)) is None:
        raise GPTCoreError(f"{path} is damaged. Delete it: the next command writes it again.")
    return state


def _plan_state(home: Path, state: StateRecord | None) -> StateRecord:
    """Return the record for a state root at `home`: with its earlier paths, and with a new id if it is a copy."""
    path = str(home)
    if state is None:
        formerly = [old for old in _read_old_paths(home / _DATABASE) if old != path]
        identity = None
    else:
        formerly = [old for old in dict.fromkeys((*state.formerly, state.path)) if old != path]
        identity = state.id
    if any(_has_original(Path(old), home, identity) for old in formerly):
        identity = None
        # up.json names the processes of the original's `gptflow up`. The copy's would stop them as leftovers.
        (home / "up.json").unlink(missing_ok=True)
    return StateRecord(FORMAT, identity or uuid.uuid4().hex, path, tuple(formerly))


def _read_old_paths(database: Path) -> list[str]:
    """Return the paths at which a state root without state.json made its own experiments."""
    if not database.exists():
        return []
    with _connect(database) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
            return []
        rows = connection.execute(_OURS).fetchall()
    ends = ((location, f"/artifacts/{name}") for name, location in rows)
    return sorted({location.removesuffix(end) for location, end in ends if location.endswith(end)})


def _has_original(old: Path, home: Path, identity: str | None) -> bool:
    """Whether the same state is still at `old`, so that the state root at `home` is a copy."""
    try:
        if not (old / _DATABASE).exists() or old.samefile(home):
            return False
        other = read_state(old)
    except OSError:  # not readable by this user, so not this user's state
        return False
    except GPTCoreError:
        return True
    return identity is None or other is None or other.id == identity


@contextmanager
def _hold_all_locks(home: Path, state: StateRecord) -> Iterator[None]:
    """Hold every lock of the state root, because a running process would write old paths meanwhile.

    Raises GPTCoreError if another process holds one of them.
    """
    with ExitStack() as stack:
        for path in (home / "up.lock", *sorted((home / "locks").glob("*"))):
            if not stack.enter_context(locks.try_lock(path)):
                raise GPTCoreError(
                    f"the state root {home} was at {state.formerly[-1]} before, and is in use ({path.name} is held): "
                    "its paths cannot be rewritten. Stop what runs there, then run the same command again."
                )
        yield


def _rewrite_paths(database: Path, formerly: tuple[str, ...], home: str) -> None:
    """Replace the old roots by `home` in every path in the database. Changes all paths or none."""
    if not database.exists():
        return
    with _connect(database) as connection:
        connection.execute("begin immediate")
        for old in formerly:
            for table, column in _filter_existing(connection, _LOCATIONS):
                for before, after in _list_spellings(old, home):
                    _replace_prefix(connection, table, column, before, after)
            for table, column in _filter_existing(connection, _JSON_LOCATIONS):
                before, after = (json.dumps(f"{path}/")[:-1] for path in (old, home))
                connection.execute(
                    f"update {table} set {column} = replace({column}, ?1, ?2)"
                    f" where instr({column}, ?1) and not instr({column}, ?2)",
                    (before, after),
                )
        connection.execute("commit")


def _replace_prefix(connection: sqlite3.Connection, table: str, column: str, before: str, after: str) -> None:
    # A path inside `after` stays as it is, because `after` may be inside `before`.
    connection.execute(
        f"update {table} set {column} = ?2 || substr({column}, length(?1) + 1)"
        f" where ({column} = ?1 or substr({column}, 1, length(?1) + 1) = ?1 || '/')"
        f" and {column} != ?2 and substr({column}, 1, length(?2) + 1) != ?2 || '/'",
        (before, after),
    )


def _list_spellings(old: str, new: str) -> list[tuple[str, str]]:
    """Return the old and the new path, as paths and as the file URIs that MLflow makes of them."""
    uri = f"file://{quote(new)}"
    path = uri if "%" in new else new  # MLflow decodes the `%20` in a path
    pairs = [(old, path), (f"file://{old}", f"file://{new}"), (f"file://{quote(old)}", uri)]
    return list(dict.fromkeys(pairs))


def _filter_existing(connection: sqlite3.Connection, columns: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Return those columns that this version of MLflow's schema has."""
    return [
        (table, column)
        for table, column in columns
        if any(row[1] == column for row in connection.execute(f"pragma table_info({table})"))
    ]


@contextmanager
def _connect(database: Path) -> Iterator[sqlite3.Connection]:
    """Open the database without implicit transactions.

    Raises GPTCoreError if the file is not a database, or stays locked for a minute.
    """
    try:
        with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise GPTCoreError(
            f"the database {database} cannot be used: {error}. If another process writes to it, stop that process; if "
            "it is damaged, restore it from a backup."
        ) from None


def _write_state(home: Path, state: StateRecord) -> None:
    body = {key: value for key, value in asdict(state).items() if value}
    write_atomically(home / _FILE, json.dumps(body, indent=1) + "\n")

"""state.json: which format the state root has, who it is, and where it lies; and what follows when it lies elsewhere.

MLflow keeps absolute paths in its database. So a state root records its own path, and whoever enters it at another one
first rewrites those paths: a moved or copied state answers every look-up, and nothing in a copy points to the original.
The new path is written down before the database is touched and the old one struck out afterwards, so a kill in between
leaves the next command to do it again, wherever the state lies by then. Nothing here imports MLflow.

Other absolute paths stay as they are, for nothing is looked up by them: the sources of a corpus, which lie outside; and
what reports, logs and MLmodel files tell people about the past.
"""

import fcntl
import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from flows import lock
from gptcore.errors import GPTCoreError
from gptcore.manifest import flush

FORMAT = 1
"""What this release reads and writes. A state without state.json is older, and has the same layout."""
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
"""Columns of MLflow's database that hold a path, or a file URI."""
_JSON_LOCATIONS = (("datasets", "dataset_source"),)
"""Columns that hold JSON with paths in it."""
_OURS = """
    select distinct experiments.name, experiments.artifact_location from experiments
    join runs using (experiment_id) join tags using (run_uuid) where tags.key = 'run_key'
"""


@dataclass(frozen=True)
class State:
    """What state.json says."""

    format: int
    id: str
    """Names the state wherever it lies: Prefect's deployments carry it. A copy beside its original gets its own."""
    path: str
    formerly: tuple[str, ...] = ()
    """Paths that MLflow's database may still name."""


def settle(here: Path) -> None:
    """Makes the state root at `here` know where it lies, and its database with it. It must be an existing directory.

    Raises GPTCoreError for a newer format, a damaged state.json or database, and a moved state root that is in use.
    """
    if (state := read(here)) is not None and state == State(state.format, state.id, str(here)):
        return
    with (here / "mlflow.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = _at(here, read(here))
        if state.formerly:
            with _nobody_at_work(here, state):
                _write(here, state)
                _rewrite(here / _DATABASE, state.formerly, str(here))
        _write(here, replace(state, formerly=()))


def read(here: Path) -> State | None:
    """What state.json says; None where there is none. Raises GPTCoreError for a newer format or a damaged file."""
    path = here / _FILE
    try:
        body = json.loads(path.read_text())
        if body["format"] > FORMAT:
            raise GPTCoreError(
                f"the state root {here} has format {body['format']}, made by a newer release of gptflow; this one "
                f"reads format {FORMAT}. Upgrade gptflow, or set GPTFLOW_HOME to another directory."
            )
        return State(body["format"], body["id"], body["path"], tuple(body.get("formerly", ())))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise GPTCoreError(f"{path} is damaged: {error!r}. Delete it: the next command writes it anew.") from None


def _at(here: Path, state: State | None) -> State:
    """The state as it is to be at `here`: with the paths that it had before, and an id of its own if it is a copy."""
    path = str(here)
    if state is None:
        formerly = [old for old in _found_in(here / _DATABASE) if old != path]
        identity = None
    else:
        formerly = [old for old in dict.fromkeys((*state.formerly, state.path)) if old != path]
        identity = state.id
    if any(_lives_on(Path(old), here, identity) for old in formerly):
        identity = None
        # It names the processes of the original's `gptflow up`, which the copy's would take for left over and stop.
        (here / "up.json").unlink(missing_ok=True)
    return State(FORMAT, identity or uuid.uuid4().hex, path, tuple(formerly))


def _found_in(database: Path) -> list[str]:
    """Where a state that has no state.json lay when its own experiments were made."""
    if not database.exists():
        return []
    with _open(database) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'experiments'").fetchone():
            return []
        found = connection.execute(_OURS).fetchall()
    ends = ((location, f"/artifacts/{name}") for name, location in found)
    return sorted({location.removesuffix(end) for location, end in ends if location.endswith(end)})


def _lives_on(old: Path, here: Path, identity: str | None) -> bool:
    """Whether the state that lay at `old` is still there, so that the one here is a copy."""
    if not (old / _DATABASE).exists() or old.samefile(here):
        return False
    with suppress(GPTCoreError, OSError):
        other = read(old)
        return identity is None or other is None or other.id == identity
    return True


@contextmanager
def _nobody_at_work(here: Path, state: State) -> Iterator[None]:
    """Holds every lock of the state root. Raises GPTCoreError if one is taken: somebody writes old paths meanwhile."""
    with ExitStack() as standing_still:
        for path in (here / "up.lock", *sorted((here / "locks").glob("*"))):
            if not standing_still.enter_context(lock.taken(path)):
                raise GPTCoreError(
                    f"the state root {here} lay at {state.formerly[-1]} before, and is in use ({path.name} is held): "
                    "its paths cannot be rewritten. Stop what runs there, then run the same command again."
                )
        yield


def _rewrite(database: Path, formerly: tuple[str, ...], here: str) -> None:
    """Lets every path in the database that leads into one of the old roots lead into `here`, or changes nothing."""
    if not database.exists():
        return
    with _open(database) as connection:
        connection.execute("begin immediate")
        for old in formerly:
            for table, column in _existing(connection, _LOCATIONS):
                for before, after in _spellings(old, here):
                    _replace_prefix(connection, table, column, before, after)
            for table, column in _existing(connection, _JSON_LOCATIONS):
                before, after = (json.dumps(f"{path}/")[:-1] for path in (old, here))
                connection.execute(
                    f"update {table} set {column} = replace({column}, ?1, ?2)"
                    f" where instr({column}, ?1) and not instr({column}, ?2)",
                    (before, after),
                )
        connection.execute("commit")


def _replace_prefix(connection: sqlite3.Connection, table: str, column: str, before: str, after: str) -> None:
    # What leads into `after` already is left alone: it may lie inside `before`.
    connection.execute(
        f"update {table} set {column} = ?2 || substr({column}, length(?1) + 1)"
        f" where ({column} = ?1 or substr({column}, 1, length(?1) + 1) = ?1 || '/')"
        f" and {column} != ?2 and substr({column}, 1, length(?2) + 1) != ?2 || '/'",
        (before, after),
    )


def _spellings(old: str, new: str) -> list[tuple[str, str]]:
    """A path, and the URIs that MLflow makes of it."""
    pairs = [(old, new), (f"file://{old}", f"file://{new}"), (f"file://{quote(old)}", f"file://{quote(new)}")]
    return list(dict.fromkeys(pairs))


def _existing(connection: sqlite3.Connection, columns: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Those columns that this version of MLflow's schema has."""
    return [
        (table, column)
        for table, column in columns
        if any(row[1] == column for row in connection.execute(f"pragma table_info({table})"))
    ]


@contextmanager
def _open(database: Path) -> Iterator[sqlite3.Connection]:
    """Without implicit transactions. Raises GPTCoreError if the file is no database, or stays locked for a minute."""
    try:
        with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise GPTCoreError(
            f"the database {database} cannot be used: {error}. If something else writes to it, stop that; if it is "
            "damaged, restore it from a backup."
        ) from None


def _write(here: Path, state: State) -> None:
    """Writes state.json, at once or not at all."""
    body = {key: value for key, value in asdict(state).items() if value}
    temporary = here / f".tmp-{_FILE}"
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    flush(temporary)
    temporary.replace(here / _FILE)
    flush(here)

"""A real PostgreSQL: the lock between machines, error messages when it refuses, and where passwords are kept."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.state import lock_holder, locks, postgres_lock
from flows.state import postgres as database
from flows.state.backends import export_passwords, read_backends, save_backends
from flows.state.databases import DatabaseBroken, prefect_tables
from flows.state.postgres import DatabaseRefused, DatabaseUnreachable, PostgresDatabase, parse
from flows.state.root import StateRoot
from gptcore.errors import ConfigError
from tests.servers import gptflow, refused
from tests.state.postgres import Postgres

pytestmark = pytest.mark.slow

HOLD = "import sys; from pathlib import Path\nfrom flows.state.locks import hold\n"
HOLD += "from flows.state.postgres import PostgresDatabase\n"
HOLD += "with hold(Path(sys.argv[1]), 'run-1', database=PostgresDatabase(sys.argv[2])):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def shared(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> PostgresDatabase:
    """A new database that this process may use."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    return parse(postgres.new(), "the test")


@pytest.fixture
def elsewhere(shared: PostgresDatabase, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock `x.lock` of another state root, as if on another machine."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "elsewhere" / "x.lock"), shared.url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_on_another_machine_can_be_skipped_or_waited_for_and_is_released_when_its_holder_dies(
    shared: PostgresDatabase, elsewhere: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    path = tmp_path / "here" / "x.lock"
    with (
        pytest.raises(lock_holder.LockHeld, match=rf"pid {elsewhere.pid} on .+, since 20..-"),
        locks.hold(path, database=shared),
    ):
        pass
    found = locks.find_holder(path, shared)
    assert found is not None and (found.pid, found.flow_run) == (elsewhere.pid, "run-1")
    assert locks.find_holder(tmp_path / "here" / "y.lock", shared) is None
    with locks.hold(tmp_path / "here" / "y.lock", database=shared), locks.try_lock(path, shared) as free:
        assert not free
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {elsewhere.pid}"])
    began = time.monotonic()
    with locks.hold(path, overlap="wait", database=shared) as died:
        assert time.monotonic() - began > 0.3
        assert died == found
        postgres_lock.ensure_held()
    killer.wait()
    assert locks.find_holder(path, shared) is None
    with locks.hold(path, database=shared) as died:
        assert died is None, "the lock was released, so no holder died"


def test_a_broken_connection_gets_its_lock_back_unless_another_process_took_it_then_nothing_is_published(
    shared: PostgresDatabase, postgres: Postgres, tmp_path: Path
) -> None:
    name = shared.url.rpartition("/")[2]
    end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'gptflow lock'"
    here, there = tmp_path / "here" / "x.lock", tmp_path / "there" / "x.lock"
    with locks.hold(here, database=shared):
        still_held = postgres_lock.make_lock_check()
        postgres.ask(name, end)
        postgres_lock.ensure_held()
        with pytest.raises(lock_holder.LockHeld), locks.hold(there, database=shared):
            pass
    with pytest.raises(postgres_lock.LockLost):
        still_held()  # the lock was released
    with locks.hold(here, database=shared):
        postgres.ask(name, end)
        with (
            locks.hold(there, database=shared),
            pytest.raises(postgres_lock.LockLost, match=r"publishes nothing") as lost,
        ):
            postgres_lock.ensure_held()
        assert "x.lock was lost" in str(lost.value) and "another process has taken it" in str(lost.value)
        with pytest.raises(postgres_lock.LockLost):
            postgres_lock.ensure_not_lost()
    postgres_lock.ensure_not_lost()


def test_a_refusal_of_postgresql_is_reported_in_one_line_with_the_fix(
    postgres: Postgres, shared: PostgresDatabase, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shared.url.rpartition("/")[2]
    postgres.ask(name, "create role guest login password 'guest'")
    wrong = {
        shared.url.replace(name, "nowhere"): (DatabaseRefused, r"\"nowhere\" does not exist\. Create it"),
        shared.url.replace(f":{postgres.port}", ":9"): (DatabaseUnreachable, "does not answer: .* Start it, or fix"),
    }
    for url, (kind, said) in wrong.items():
        with pytest.raises(kind, match=said):
            PostgresDatabase(url).prepare()
    with monkeypatch.context() as patched:
        patched.setenv("PGPASSWORD", "guest")
        with pytest.raises(DatabaseRefused, match=r"permission denied .* Grant the user CREATE on the database"):
            PostgresDatabase(shared.url.replace("keeper", "guest")).prepare()
        with pytest.raises(DatabaseRefused, match=r"password authentication failed .* Set PGPASSWORD"):
            shared.prepare()
        patched.setitem(sys.modules, "psycopg2", None)
        with pytest.raises(DatabaseRefused, match=r"pip install 'gptflow\[postgres\]'"):
            shared.prepare()
    for text in (
        "mysql://u@h/d",
        "postgresql://u:secret@h",
        "postgresql://u:secret@h/a/b",
        "postgresql://u:secret@h:x/d",
    ):
        with pytest.raises(ConfigError, match="Write postgresql://USER@HOST/NAME") as error:
            parse(text, "GPTFLOW_DATABASE")
        assert "secret" not in str(error.value)
    password = {"PGPASSWORD": "wrong-one"}
    refused(gptflow(project, "models", GPTFLOW_DATABASE=shared.url, **password), 2, "password authentication failed")
    told = shared.url.replace("keeper@", "keeper:secret@")
    refused(gptflow(project, "up", "--database", told), 2, "--database has a password in it", "PGPASSWORD")
    both = gptflow(project, "models", GPTFLOW_DATABASE=told, **password)
    refused(both, 2, "GPTFLOW_DATABASE has another password than PGPASSWORD")
    refused(gptflow(project, "models", GPTFLOW_ARTIFACTS="file:///x"), 2, "Write s3://BUCKET/PREFIX")
    assert "secret" not in both.stderr


def test_tables_that_a_kill_left_half_made_are_created_anew_unless_they_have_rows(
    postgres: Postgres, shared: PostgresDatabase
) -> None:
    name = shared.url.rpartition("/")[2]

    def create_table(_url: str) -> None:
        postgres.ask(name, "create table prefect.flow_run (id integer)")  # fails if it exists

    tables = prefect_tables(shared)
    tables = replace(tables, schema=replace(tables.schema, upgrade=create_table))
    shared.prepare()
    revision = "'cdcb4018dd0e'::text as version_num"  # the migration after this one commits half-way
    postgres.ask(name, f"create table prefect.alembic_version as select {revision}", "create table prefect.flow_run ()")
    tables.prepare()
    assert postgres.ask(name, "select tablename from pg_tables where schemaname = 'prefect'") == ["flow_run"]
    postgres.ask(name, "insert into prefect.flow_run values (7)")
    with pytest.raises(DatabaseBroken, match=r"tables of prefect .* could not be .* restore a backup of the schema"):
        tables.prepare()
    assert postgres.ask(name, "select id from prefect.flow_run") == ["7"]


def test_passwords_of_web_servers_are_moved_to_the_variables_that_their_clients_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://ann:s%40cret@127.0.0.1:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://bob:s/cret@[::1]:5000".replace("/c", "%2Fc"))
    export_passwords()
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert os.environ["PREFECT_API_AUTH_STRING"] == "ann:s@cret"
    assert StateRoot(tmp_path).find_mlflow_ui() == "https://[::1]:5000", "cards and messages link there"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("bob", "s/cret")
    export_passwords()
    assert os.environ["PREFECT_API_AUTH_STRING"] == "ann:s@cret", "a second call changes nothing"


def test_passwords_are_removed_from_every_url_and_the_state_root_saves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p%40ss@db.example:6432/ml?sslmode=require")
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/deep/down/")
    export_passwords()
    found = read_backends(tmp_path)
    assert found.database == PostgresDatabase("postgresql://me@db.example:6432/ml")
    assert found.artifacts == "s3://bucket/deep/down"
    assert os.environ["MLFLOW_TRACKING_URI"] == "postgresql://me@db.example:6432/ml?sslmode=require"
    assert (os.environ["PGPASSWORD"], os.environ["PGSSLMODE"]) == ("p@ss", "require")
    assert StateRoot(tmp_path).tracking_address == "postgresql://me@db.example:6432/ml"
    save_backends(tmp_path, found)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://me:p%40ss@db.example:6432/ml")
    export_passwords()
    assert read_backends(tmp_path) == found
    assert StateRoot(tmp_path).tracking_uri == "postgresql://me@db.example:6432/ml", (
        "expected the schema that the MLflow server uses"
    )
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    assert read_backends(tmp_path) == found and "p@ss" not in (tmp_path / "backends.json").read_text()
    assert StateRoot(tmp_path).tracking_uri.startswith(
        "postgresql://me@db.example:6432/ml?options=-csearch_path%3Dmlflow&"
    )
    assert StateRoot(tmp_path).artifact_location("tiny") == "s3://bucket/deep/down/artifacts/tiny"
    monkeypatch.setenv("GPTFLOW_DATABASE", "local")
    monkeypatch.setenv("GPTFLOW_ARTIFACTS", "local")
    assert StateRoot(tmp_path).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert StateRoot(tmp_path).artifact_location("tiny") == f"{tmp_path}/artifacts/tiny"
    assert database.VARIABLE == "GPTFLOW_DATABASE"

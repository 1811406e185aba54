"""A real PostgreSQL: the lock between machines, what is said where it refuses, and where passwords go."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import lock
from flows.sharing import advisory, database
from flows.sharing.backends import backends_of, remember
from flows.sharing.database import Database, DatabaseAway, DatabaseRefuses, parse
from flows.state import StateRoot
from gptcore.errors import ConfigError
from tests.flows.postgres import Postgres
from tests.flows.servers import gptflow, refused

pytestmark = pytest.mark.slow

HOLD = (
    "import sys; from pathlib import Path; from flows.lock import hold; from flows.sharing.database import Database\n"
)
HOLD += "with hold(Path(sys.argv[1]), 'run-1', database=Database(sys.argv[2])):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def shared(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Database:
    """A new database that this process may use."""
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    return parse(postgres.new(), "the test")


@pytest.fixture
def elsewhere(shared: Database, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock `x.lock` of another state root, as if on another machine."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "elsewhere" / "x.lock"), shared.url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_held_on_another_machine_is_skipped_or_waited_for_and_free_when_its_holder_dies(
    shared: Database, elsewhere: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    path = tmp_path / "here" / "x.lock"
    with pytest.raises(lock.Held, match=rf"pid {elsewhere.pid} on .+, since 20..-"), lock.hold(path, database=shared):
        pass
    found = lock.holder(path, shared)
    assert found is not None and (found.pid, found.flow_run) == (elsewhere.pid, "run-1")
    assert lock.holder(tmp_path / "here" / "y.lock", shared) is None
    with lock.hold(tmp_path / "here" / "y.lock", database=shared), lock.taken(path, shared) as free:
        assert not free
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {elsewhere.pid}"])
    began = time.monotonic()
    with lock.hold(path, overlap="wait", database=shared) as died:
        assert time.monotonic() - began > 0.3
        assert died == found
        advisory.ensure_held()
    killer.wait()
    assert lock.holder(path, shared) is None
    with lock.hold(path, database=shared) as died:
        assert died is None, "it was given back"


def test_a_connection_that_breaks_is_made_good_unless_somebody_else_took_the_lock_then_nothing_is_published(
    shared: Database, postgres: Postgres, tmp_path: Path
) -> None:
    name = shared.url.rpartition("/")[2]
    end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'gptflow lock'"
    here, there = tmp_path / "here" / "x.lock", tmp_path / "there" / "x.lock"
    with lock.hold(here, database=shared):
        still_held = advisory.guard()
        postgres.ask(name, end)
        advisory.ensure_held()
        with pytest.raises(lock.Held), lock.hold(there, database=shared):
            pass
    with pytest.raises(advisory.LockLost):
        still_held()  # it has been given back
    with lock.hold(here, database=shared):
        postgres.ask(name, end)
        with lock.hold(there, database=shared), pytest.raises(advisory.LockLost, match=r"publishes nothing") as lost:
            advisory.ensure_held()
        assert "x.lock was lost" in str(lost.value) and "somebody else has taken it" in str(lost.value)
        with pytest.raises(advisory.LockLost):
            advisory.ensure_not_lost()
    advisory.ensure_not_lost()


def test_what_postgresql_refuses_is_said_in_one_line_with_the_cure(
    postgres: Postgres, shared: Database, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shared.url.rpartition("/")[2]
    postgres.ask(name, "create role guest login password 'guest'")
    wrong = {
        shared.url.replace(name, "nowhere"): (DatabaseRefuses, r"\"nowhere\" does not exist\. Create it"),
        shared.url.replace(f":{postgres.port}", ":9"): (DatabaseAway, "does not answer: .* Start it, or mend"),
    }
    for url, (kind, said) in wrong.items():
        with pytest.raises(kind, match=said):
            Database(url).prepare()
    with monkeypatch.context() as patched:
        patched.setenv("PGPASSWORD", "guest")
        with pytest.raises(DatabaseRefuses, match=r"permission denied .* Grant the user CREATE on the database"):
            Database(shared.url.replace("keeper", "guest")).prepare()
        with pytest.raises(DatabaseRefuses, match=r"password authentication failed .* Set PGPASSWORD"):
            shared.prepare()
        patched.setitem(sys.modules, "psycopg2", None)
        with pytest.raises(DatabaseRefuses, match=r"pip install 'gptflow\[postgres\]'"):
            shared.prepare()
    for text in (
        "mysql://u@h/d",
        "postgresql://u:secret@h",
        "postgresql://u:secret@h/a/b",
        "postgresql://u:secret@h:x/d",
    ):
        with pytest.raises(ConfigError, match="write postgresql://USER@HOST/NAME") as error:
            parse(text, "GPTFLOW_DATABASE")
        assert "secret" not in str(error.value)
    password = {"PGPASSWORD": "wrong-one"}
    refused(gptflow(project, "models", GPTFLOW_DATABASE=shared.url, **password), 2, "password authentication failed")
    told = shared.url.replace("keeper@", "keeper:secret@")
    refused(gptflow(project, "up", "--database", told), 2, "--database has a password in it", "PGPASSWORD")
    both = gptflow(project, "models", GPTFLOW_DATABASE=told, **password)
    refused(both, 2, "GPTFLOW_DATABASE has another password than PGPASSWORD")
    refused(gptflow(project, "models", GPTFLOW_ARTIFACTS="file:///x"), 2, "write s3://BUCKET/PREFIX")
    assert "secret" not in both.stderr


def test_a_password_is_taken_out_of_every_url_and_the_state_root_remembers_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:p%40ss@db.example:6432/ml?sslmode=require")
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/deep/down/")
    found = backends_of(tmp_path)
    assert found.database == Database("postgresql://me@db.example:6432/ml")
    assert found.artifacts == "s3://bucket/deep/down"
    assert os.environ["MLFLOW_TRACKING_URI"] == "postgresql://me@db.example:6432/ml?sslmode=require"
    assert (os.environ["PGPASSWORD"], os.environ["PGSSLMODE"]) == ("p@ss", "require")
    assert StateRoot(tmp_path).tracking_address == "postgresql://me@db.example:6432/ml"
    remember(tmp_path, found)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://me:p%40ss@db.example:6432/ml")
    assert backends_of(tmp_path) == found
    assert StateRoot(tmp_path).tracking_uri == "postgresql://me@db.example:6432/ml", (
        "in the schema that its server uses"
    )
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    assert backends_of(tmp_path) == found and "p@ss" not in (tmp_path / "backends.json").read_text()
    assert StateRoot(tmp_path).tracking_uri.startswith(
        "postgresql://me@db.example:6432/ml?options=-csearch_path%3Dmlflow&"
    )
    assert StateRoot(tmp_path).artifact_location("tiny") == "s3://bucket/deep/down/artifacts/tiny"
    monkeypatch.setenv("GPTFLOW_DATABASE", "local")
    monkeypatch.setenv("GPTFLOW_ARTIFACTS", "local")
    assert StateRoot(tmp_path).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert StateRoot(tmp_path).artifact_location("tiny") == f"{tmp_path}/artifacts/tiny"
    assert database.VARIABLE == "GPTFLOW_DATABASE"

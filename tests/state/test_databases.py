"""The SQLite databases of MLflow and Prefect: created whole, migrated with a copy, and named if they are broken."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.store.db import utils
from prefect.server.database import provide_database_interface
from prefect.server.database.dependencies import temporary_database_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings
from sqlalchemy import create_engine, text

from flows.cli import cli, doctor_checks
from flows.cli.doctor_checks import CheckTarget
from flows.state import databases
from flows.state.databases import Condition, DatabaseBroken, SQLiteDatabase, mlflow_database, prefect_database
from flows.state.root import StateRoot
from tests.faults.test_state_root import read_only

ODD = "a?b #%20c;é"
"""A directory's name with characters that mean something in a URL."""


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        (revision,) = connection.execute("select version_num from alembic_version").fetchone()
    return str(revision)


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def copying(database: SQLiteDatabase, complete: Path) -> SQLiteDatabase:
    """Return the database with a creation that takes no seconds: it copies a complete database."""

    def upgrade(url: str) -> None:
        shutil.copy(complete, url.partition(":///")[2])

    return replace(database, schema=replace(database.schema, upgrade=upgrade))


@pytest.fixture
def made(tmp_path: Path, migrated: Path) -> SQLiteDatabase:
    """A complete, empty database of MLflow."""
    shutil.copy(migrated / "mlflow.db", tmp_path)
    return mlflow_database(tmp_path)


@pytest.mark.parametrize("package", ["mlflow", "prefect"])
def test_a_complete_database_is_known_without_importing_its_package(
    tmp_path: Path, migrated: Path, package: str
) -> None:
    shutil.copy(migrated / f"{package}.db", tmp_path)
    program = f"""
import sys
from pathlib import Path
from flows.state import databases
print(databases.{package}_database(Path({str(tmp_path)!r})).check())
assert not {{"mlflow", "prefect", "sqlalchemy", "alembic"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "Condition.WHOLE\n"
    before = (tmp_path / f"{package}.db").read_bytes()
    {"mlflow": mlflow_database, "prefect": prefect_database}[package](tmp_path).prepare()
    assert (tmp_path / f"{package}.db").read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(bytes(range(1, 256)) * 100)


def set_newer_schema(path: Path) -> None:
    execute(path, "update alembic_version set version_num = 'f00dfeed0000'")


def replace_by_other(path: Path) -> None:
    path.unlink()
    execute(path, "create table notes (text)")


def empty_beside_files(path: Path) -> None:
    path.write_bytes(b"")
    (path.parent / "artifacts" / "tiny").mkdir(parents=True)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[Callable[[Path], None], str] = {
    cut: "cannot be used: database disk image is malformed. Restore it",
    fill_with_garbage: "cannot be used: file is not a database. Restore it",
    set_newer_schema: "has the schema f00dfeed0000, which mlflow [0-9.]+ does not know: a newer mlflow made it",
    replace_by_other: "cannot be used: it has none of mlflow's tables. Restore it",
    empty_beside_files: "cannot be used: it is empty, but .*artifacts has files. Restore it",
    replace_by_fifo: "is not a file, so it cannot be a database. Move it away",
    replace_by_directory: "is not a file, so it cannot be a database. Move it away",
}
COMMANDS = (
    *("run tiny", "up", "serve", "deploy --work-pool x", "models", "show models:/m/1", "reproduce models:/m/1"),
    *("promote m 1 --reason x", "rollback m --reason x", "prune", "generate m", "serve-model m@champion"),
    *("prepare tiny there", "export models:/m/1 there"),
)


@pytest.mark.parametrize("break_", BROKEN, ids=lambda break_: break_.__name__)
def test_every_command_names_a_broken_database_and_its_fix(
    project: Path, root: StateRoot, monkeypatch: pytest.MonkeyPatch, break_: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    break_(root.path / "mlflow.db")
    for command_line in COMMANDS:
        result = CliRunner().invoke(cli, command_line.split())
        assert isinstance(result.exception, DatabaseBroken), (command_line, result.output, result.exception)
        assert result.exception.exit_code == 1
        with pytest.raises(DatabaseBroken, match=rf"{root.path}/mlflow\.db {BROKEN[break_]}"):
            raise result.exception
    with pytest.raises(DatabaseBroken, match=BROKEN[break_]):
        list(doctor_checks.check_registry(CheckTarget(project / "pipelines.yaml", root)))


def test_a_read_only_database_is_named(project: Path, root: StateRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    with read_only(root.path / "mlflow.db"):
        result = CliRunner().invoke(cli, ["models"])
    with pytest.raises(DatabaseBroken, match=r"mlflow\.db is read-only.*Correct its permissions"):
        raise result.exception or AssertionError(result.output)


def test_a_link_to_a_disk_that_is_not_mounted_is_named_and_stays(tmp_path: Path) -> None:
    database = mlflow_database(tmp_path)
    for target in ("mounted/mlflow.db", "mlflow.db"):
        database.path.unlink(missing_ok=True)
        database.path.symlink_to(target)
        with pytest.raises(DatabaseBroken, match=rf"mlflow\.db is a link to {target}, which cannot be opened: .*Mount"):
            database.prepare()
        assert database.path.is_symlink()


def test_damage_in_the_middle_is_named_when_mlflow_meets_it(
    project: Path, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.tracking.errors import translate_errors

    path = root.path / "mlflow.db"
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(DatabaseBroken, match=r"mlflow\.db cannot be used: .*malformed"), translate_errors(root):
        MlflowClient(root.tracking_uri).search_registered_models()


@pytest.mark.parametrize("kind", ["0 bytes", "half-made", "no revision yet"])
def test_a_database_that_a_kill_left_unfinished_is_created_anew(
    made: SQLiteDatabase, migrated: Path, kind: str
) -> None:
    if kind == "0 bytes":
        made.path.write_bytes(b"")
    elif kind == "half-made":
        execute(made.path, "update alembic_version set version_num = '451aebb31d03'", "drop table logged_models")
    else:
        execute(made.path, "drop table alembic_version", "create table _alembic_tmp_runs (a)")
    assert made.check() is Condition.EMPTY
    left = made.path.with_name(f".tmp-{made.path.name}-123-wal")
    left.write_bytes(b"of a killed process")
    copying(made, migrated / "mlflow.db").prepare()
    assert made.check() is Condition.WHOLE and sorted(path.name for path in made.path.parent.iterdir()) == [
        "mlflow.db",
        "mlflow.lock",
    ]


def downgrade(path: Path) -> str:
    """Undo MLflow's newest migration, as if an earlier MLflow had made the database. Return the revision."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = utils._get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")
    engine.dispose()
    execute(path, "insert into experiments (experiment_id, name, lifecycle_stage) values (7, 'mine', 'active')")
    return revision_of(path)


def test_a_database_of_an_older_schema_is_migrated_and_a_copy_is_kept(made: SQLiteDatabase) -> None:
    newest = revision_of(made.path)
    older = downgrade(made.path)
    assert older != newest and made.check() is Condition.OLD
    for number in range(3):
        earlier = made.path.with_name(f"mlflow-schema-{number}.db")
        earlier.write_bytes(b"")
        os.utime(earlier, (number, number))
    made.prepare()
    assert made.check() is Condition.WHOLE and revision_of(made.path) == newest
    names = sorted(path.name for path in made.path.parent.iterdir())
    assert names == ["mlflow-schema-2.db", f"mlflow-schema-{older}.db", "mlflow.db", "mlflow.lock"]
    assert revision_of(made.path.with_name(f"mlflow-schema-{older}.db")) == older
    assert MlflowClient(made.url).get_experiment("7").name == "mine"


def test_a_prefect_server_of_an_older_release_leaves_its_database_to_the_installed_one(
    tmp_path: Path, migrated: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(migrated / "prefect.db", tmp_path)
    database = prefect_database(tmp_path)
    newest = revision_of(database.path)
    own = {PREFECT_API_DATABASE_CONNECTION_URL: database.url}
    with temporary_settings(own), temporary_database_config(None):
        asyncio.run(provide_database_interface().run_migrations_downgrade("-3"))
    execute(database.path, "insert into variable (name, value) values ('mine', '7')")
    older = revision_of(database.path)
    assert older != newest and database.check() is Condition.OLD
    with temporary_settings(own), temporary_database_config(None):
        databases.main("prefect", str(tmp_path))
        served = provide_database_interface().database_config.connection_url
    assert served == database.url, "a server in this process uses the migrated database, not the temporary file"
    assert database.check() is Condition.WHOLE and revision_of(database.path) == newest
    kept = tmp_path / f"prefect-schema-{older}.db"
    assert revision_of(kept) == older and f"as it was is {kept}" in capfd.readouterr().err
    for path in (database.path, kept):
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("select value from variable where name = 'mine'").fetchone() == (7,)


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_migration_that_fails_leaves_the_database_as_it_was(made: SQLiteDatabase, journal: str) -> None:
    execute(made.path, f"pragma journal_mode = {journal}")
    older = downgrade(made.path)
    rows = dump(made.path)

    def fail(url: str) -> None:
        execute(Path(url.partition(":///")[2]), "drop table experiments")
        raise RuntimeError("duplicate column name: a\nSQL: ...")

    broken = replace(made, schema=replace(made.schema, upgrade=fail))
    with pytest.raises(DatabaseBroken, match=r"older schema than mlflow .* duplicate column name: a\. It is unchanged"):
        broken.prepare()
    assert dump(made.path) == rows and revision_of(made.path) == older


def test_a_database_in_use_is_not_migrated(made: SQLiteDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    downgrade(made.path)
    monkeypatch.setattr(databases, "_PATIENCE_SECONDS", 0.1)
    with closing(sqlite3.connect(made.path, isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(DatabaseBroken, match="another process uses it"):
            made.prepare()
    made.prepare()
    assert made.check() is Condition.WHOLE


def test_a_state_root_with_characters_of_urls_in_its_path_keeps_everything_inside(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "GPTFLOW_HOME"):
        monkeypatch.delenv(name, raising=False)
    root = StateRoot(tmp_path / ODD)
    root.path.mkdir()
    shutil.copy(migrated / "mlflow.db", root.path)
    root.prepare()
    client = MlflowClient(root.tracking_uri)
    experiment = client.create_experiment("tiny", artifact_location=root.artifact_location("tiny"))
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "text", "note.txt")
    model = client.create_logged_model(experiment, name="gpt", source_run_id=run.info.run_id)
    assert [path.name for path in tmp_path.iterdir()] == [ODD]
    (note,) = root.artifacts.rglob("note.txt")
    assert (
        note.read_text() == "text"
        and Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "text"
    )
    moved = StateRoot(root.path.rename(tmp_path / "moved%20again?")).prepare()
    client = MlflowClient(moved.tracking_uri)
    assert Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "text"
    assert client.get_logged_model(model.model_id).artifact_location.startswith(moved.artifacts.as_uri())
    assert [path.name for path in tmp_path.iterdir()] == ["moved%20again?"]


def test_prefects_url_of_such_a_path_names_the_file(tmp_path: Path, migrated: Path) -> None:
    home = tmp_path / ODD
    home.mkdir()
    shutil.copy(migrated / "prefect.db", home)
    database = prefect_database(home)
    assert database.url.startswith("sqlite+aiosqlite:///")
    engine = create_engine(database.url.replace("aiosqlite", "pysqlite"))
    with engine.connect() as connection:
        assert connection.execute(text("select count(*) from flow_run")).scalar() == 0
    engine.dispose()

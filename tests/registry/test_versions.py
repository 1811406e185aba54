"""Look-ups in a registry with many versions."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from rich.console import Console as Terminal
from rich.table import Table
from sqlalchemy import Engine, event

from flows.cli import cli
from flows.cli.doctor_checks import CheckTarget, check_registry
from flows.config.pipelines import Pipeline
from flows.registry import champion, versions
from flows.state import console
from flows.state.root import StateRoot


def add_versions(root: StateRoot, count: int, **tags: str) -> None:
    """Register versions of gpt-tiny without files."""
    client = MlflowClient(root.tracking_uri)
    if not client.search_registered_models():
        client.create_registered_model("gpt-tiny")
    for _ in range(count):
        client.create_model_version("gpt-tiny", str(root.artifacts), tags={"pipeline": "tiny", **tags})


def count_statements(action: Callable[[], object]) -> int:
    """Return the number of SQL statements that `action` executes."""
    statements: list[str] = []

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    with listening(Engine, "before_cursor_execute", record):
        action()
    return len(statements)


@contextmanager
def listening(target: object, name: str, listener: Callable[..., object]) -> Iterator[None]:
    """Call the listener for the events of SQLAlchemy inside this context."""
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def test_a_version_is_named_by_number_alias_or_name_with_or_without_the_prefix(root: StateRoot) -> None:
    add_versions(root, 2)
    for unknown in ("gpt-tiny", "gpt-tiny@best", "models:/gpt-tiny@champion"):
        with pytest.raises(versions.UnknownVersion, match=r"no version with the alias .* version is gpt-tiny/2"):
            versions.resolve(root, unknown)
    MlflowClient(root.tracking_uri).set_registered_model_alias("gpt-tiny", "champion", "1")
    for named in ("gpt-tiny", "gpt-tiny@champion", "gpt-tiny/1"):
        for uri in (named, f"models:/{named}"):
            assert str(versions.resolve(root, uri).version) == "1"
    assert str(versions.resolve(root, "gpt-tiny@latest").version) == "2", "MLflow's own alias of the newest version"
    for unknown, why in (("gpt-tiny/3", "newest version"), ("nobody", "Registered models: gpt-tiny")):
        with pytest.raises(versions.UnknownVersion, match=why):
            versions.resolve(root, unknown)
    for wrong in ("runs:/abc/model", "models:/gpt-tiny/latest", "gpt-tiny@a/b", ""):
        with pytest.raises(versions.UnknownVersion, match="Write NAME/VERSION, NAME@ALIAS or NAME"):
            versions.resolve(root, wrong)


def test_the_number_of_queries_of_a_listing_does_not_grow_with_the_number_of_versions(root: StateRoot) -> None:
    add_versions(root, 2, verdict="rejected")
    MlflowClient(root.tracking_uri).set_registered_model_alias("gpt-tiny", "champion", "2")
    listed: list[str] = []

    def list_models() -> None:
        done = CliRunner().invoke(cli, ["models", "--json"])
        assert done.exception is None
        listed.append(done.output)

    list_models()  # records that the champion was set in MLflow itself
    few = count_statements(list_models)
    add_versions(root, 20)
    for number in range(3):
        MlflowClient(root.tracking_uri).create_registered_model(f"gpt-{number}")
    assert count_statements(list_models) == few
    summaries = json.loads(listed[-1])
    assert [summary["version"] for summary in summaries] == list(range(1, 23))
    assert {summary["version"]: summary["aliases"] for summary in summaries if summary["aliases"]} == {2: ["champion"]}
    assert summaries[1] == versions.summarize(root, versions.resolve(root, "models:/gpt-tiny/2"))


def test_a_look_up_of_one_version_or_of_the_champion_reads_no_other_version(root: StateRoot, tiny: Pipeline) -> None:
    def look_up() -> None:
        version = versions.find_champion(root, "gpt-tiny")
        assert version is not None and versions.summarize(root, version)["aliases"] == ["champion"]
        assert [move.target for move in champion.read_moves(root, "gpt-tiny")] == ["1"]
        champion.complete_logs(root)
        assert champion.complete_log(root, "gpt-tiny") is None

    add_versions(root, 2, verdict="promoted")
    MlflowClient(root.tracking_uri).set_registered_model_alias("gpt-tiny", "champion", "1")
    champion.complete_logs(root, "gpt-tiny")
    loaded: list[object] = []
    with listening(SqlModelVersion, "load", lambda *given: loaded.append(given)):
        look_up()
        few = len(loaded)
        add_versions(root, 20)
        loaded.clear()
        look_up()
    assert 0 < len(loaded) == few


@pytest.mark.parametrize("width", [12, 80])
def test_the_fast_table_of_many_rows_looks_like_one_of_single_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console, "_terminal", lambda: Terminal(highlight=False, width=width))
    rows = [(f"version {number}", "" if number % 2 else "a longer text") for number in range(8, 12)]
    table = Table("version", "text")
    for row in rows:
        table.add_row(*row)
    console.print_table(table)
    slow = capsys.readouterr().out
    console.print_rows(("version", "text"), rows)
    assert capsys.readouterr().out == slow
    assert (slow.count("\n") > 8) is (width == 12), "narrow cells are wrapped"


def test_doctor_lists_the_models_without_reading_their_versions(
    root: StateRoot, project: object, tiny: Pipeline
) -> None:
    def check() -> None:
        assert [found.message for found in check_registry(CheckTarget(root.path, root))][1:] == [
            "gpt-tiny has no champion yet"
        ]

    add_versions(root, 2)
    few = count_statements(check)
    add_versions(root, 20)
    assert count_statements(check) == few


def test_the_newest_finished_version_is_found_behind_many_undecided_ones(root: StateRoot, tiny: Pipeline) -> None:
    add_versions(root, 1, verdict="promoted")
    add_versions(root, 1, verdict="rejected")
    add_versions(root, 1, verdict="rejected", gate_kind="sources overridden")
    add_versions(root, 25)
    found = versions.find_newest_finished(root, tiny)
    assert found is not None and str(found.version) == "2"

"""Look-ups in a registry with many versions."""

import json
from collections.abc import Callable

from click.testing import CliRunner
from mlflow import MlflowClient
from sqlalchemy import Engine, event

from flows.cli import cli
from flows.cli.checks import CheckTarget, check_registry
from flows.config.pipelines import Pipeline
from flows.registry import versions
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

    event.listen(Engine, "before_cursor_execute", record)
    try:
        action()
    finally:
        event.remove(Engine, "before_cursor_execute", record)
    return len(statements)


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
    assert count_statements(list_models) == few
    summaries = json.loads(listed[-1])
    assert [summary["version"] for summary in summaries] == list(range(1, 23))
    assert {summary["version"]: summary["aliases"] for summary in summaries if summary["aliases"]} == {2: ["champion"]}
    assert summaries[1] == versions.summarize(root, versions.resolve(root, "models:/gpt-tiny/2"))


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

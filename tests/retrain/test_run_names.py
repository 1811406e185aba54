"""The names of flow runs: which are replaced, and what they say."""

from datetime import UTC, datetime

import pytest
from prefect.utilities.names import generate_slug

from flows.retrain.run_names import build_name

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "given",
    ["alpha-ceti", "beta17-canis-majoris-nebula", "notes", "notes 2026-11-29", "notes 2026-11-29 · v7 promoted"],
)
def test_a_generated_name_and_that_of_an_earlier_try_are_replaced_by_pipeline_and_date(given: str) -> None:
    assert build_name("notes", given, NOON) == "notes 2026-11-30"
    assert {build_name("notes", generate_slug(2), NOON) for _ in range(20)} == {"notes 2026-11-30"}


@pytest.mark.parametrize(
    "given", ["lower rate", "final-run", "notes with the new book", "a-b-c", "alpha", "other 2026"]
)
def test_a_typed_name_is_kept(given: str) -> None:
    assert build_name("notes", given, NOON) == given

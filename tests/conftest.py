"""Where the fixtures are, and the order of the tests: with several workers the longest files begin first."""

import pytest

pytest_plugins = ["tests.fixtures"]

LONGEST = ("test_soak.py", "test_three_nights.py", "test_browser.py", "test_up.py", "test_ancestry.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: otherwise the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))

"""The order of the tests: with several workers the longest files begin first, so that all end at the same time.
And what a test wants to be read of its kills, in the summary."""

import pytest

LONGEST = ("test_soak.py", "test_three_nights.py", "test_browser.py", "test_up.py", "test_ancestry.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: otherwise the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests recorded as their kills: how many, and where they fell."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "kills":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")

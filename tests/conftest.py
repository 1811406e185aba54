"""Where the fixtures are, in which order tests run, and what is told of their kills.

With several workers the longest files begin first, so that all end at the same time.
"""

import pytest

pytest_plugins = ["tests.fixtures"]

LONGEST = (
    *("test_soak.py", "test_two_hosts.py", "test_shared_state.py", "test_processes.py", "test_away.py"),
    *("test_release_kills.py", "test_flow_kills.py", "test_three_nights.py", "test_deploy.py", "test_browser.py"),
    *("test_up.py", "test_runners.py", "test_ancestry.py", "test_disk.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: otherwise the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests recorded as their kills: how many, and where they fell."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "kills":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")

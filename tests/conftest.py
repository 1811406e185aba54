"""Load the fixtures, order the test files, and report the kills that tests recorded.

With several workers the longest files start first, so that all workers finish at about the same time.
"""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a slow machine is not a failure
settings.load_profile("untimed")

pytest_plugins = ["tests.fixtures"]

LONGEST = (
    *(
        "test_up.py",
        "test_upgrade.py",
        "test_away.py",
        "test_work_pool.py",
        "test_processes.py",
        "test_flow_kills.py",
    ),
    *("test_three_nights.py", "test_relocate.py", "test_browser.py", "test_notify.py", "test_release_kills.py"),
    *("test_watch.py", "test_events.py", "test_reproduce.py", "test_readme.py", "test_offline.py", "test_ancestry.py"),
    *("test_flow.py", "test_kills.py", "test_retention.py", "test_corpora.py", "test_doctor.py", "test_configs.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest files first. The sort is stable, so the order of the other tests stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded about their kills: how many, and at which points."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "kills":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")

"""Where the fixtures are, in which order tests run, and what is told of their kills.

With several workers the longest files begin first, so that all end at the same time.
"""

import pytest

pytest_plugins = ["tests.fixtures"]

LONGEST = (
    *(
        "test_up.py",
        "test_away.py",
        "test_deploy.py",
        "test_processes.py",
        "test_shared_state.py",
        "test_flow_kills.py",
    ),
    *("test_three_nights.py", "test_relocate.py", "test_browser.py", "test_notify.py", "test_release_kills.py"),
    *("test_watch.py", "test_events.py", "test_reproduce.py", "test_readme.py", "test_offline.py", "test_ancestry.py"),
    *("test_retrain.py", "test_kills.py", "test_prune.py", "test_corpora.py", "test_doctor.py", "test_configs.py"),
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

"""A real browser before a real `gptflow up`: Chromium without a window, and a record of every host it asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.fixtures import write_project
from tests.flows.servers import Up

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 60_000  # in playwright's milliseconds: two cores may be busy with other tests


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. Without one the tests are skipped, but not where a whole check is asked for (CI=true)."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        missing = f"no browser: none of {', '.join(CHROMIUM)} is on PATH; on Debian, apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def up(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`gptflow up` with the pipeline `tiny`, cold and on a fresh state root, as a user's first one.

    It asks for the browser first: without one nothing needs to start.
    """
    up = Up(write_project(tmp_path_factory.mktemp("project")))
    up.cold = True
    try:
        yield up.start()
    finally:
        up.stop()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab. Whatever it asked for came from this machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(SECONDS)
    asked: set[str | None] = set()
    page.on("request", lambda request: asked.add(_host(request.url)))
    page.on("websocket", lambda socket: asked.add(_host(socket.url)))
    yield page
    page.close()
    assert asked - {None} == {"127.0.0.1"}


@pytest.fixture
def screenshots() -> Path | None:
    """Where pictures for the README go: the directory that GPTFLOW_SCREENSHOTS names."""
    directory = os.environ.get("GPTFLOW_SCREENSHOTS")
    return Path(directory) if directory else None


def _host(url: str) -> str | None:
    """None for what needs no host: data: and blob:."""
    return urlsplit(url).hostname

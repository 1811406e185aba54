"""A real browser on a real `gptflow up`: headless Chromium, and a record of every host that it contacted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.servers import Up
from tests.tiny import write_project

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
    "--host-resolver-rules=MAP *.example 127.0.0.1",  # after DNS rebinding, another site's name means this machine
)
SECONDS = 60_000  # in milliseconds, as playwright expects: two cores may be busy with other tests


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser. Without a browser the tests are skipped, or fail if CI=true asks for a full check."""
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
    """`gptflow up` with the pipeline `tiny`, cold and on a fresh state root, like a user's first start.

    The fixture requests the browser first: without a browser nothing needs to start.
    """
    up = Up(write_project(tmp_path_factory.mktemp("project")))
    up.cold = True
    try:
        yield up.start()
    finally:
        up.stop()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A browser tab. All of its requests must go to this machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(SECONDS)
    asked: set[str | None] = set()
    page.on("request", lambda request: asked.add(_host(request.url)))
    page.on("websocket", lambda socket: asked.add(_host(socket.url)))
    yield page
    page.close()
    assert asked - {None} == {"127.0.0.1"}


@pytest.fixture
def foreign_page(browser: Browser) -> Iterator[Page]:
    """A tab with a page of another site, http://evil.example, which a server on this machine plays."""
    with HTTPServer(("127.0.0.1", 0), _EmptyPage) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://evil.example:{site.server_port}")
        yield page
        page.close()
        site.shutdown()


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html><body></body></html>")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def screenshots() -> Path | None:
    """The directory for the pictures of the README, or None: GPTFLOW_SCREENSHOTS names it."""
    directory = os.environ.get("GPTFLOW_SCREENSHOTS")
    return Path(directory) if directory else None


def _host(url: str) -> str | None:
    """Return the host of a URL, or None for data: and blob: URLs, which have no host."""
    return urlsplit(url).hostname

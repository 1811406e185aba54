"""The endpoint's page in a browser: a text with its surprises, by keyboard, on a server with a key."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.endpoint.endpoint import endpoint
from tests.ui.conftest import SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow
expect.set_options(timeout=SECONDS)
KEY = "swordfish-1"


def test_a_person_tries_the_model_by_keyboard_and_sees_the_alternatives_of_a_token(page: Page) -> None:
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    with endpoint(key=KEY) as served:
        page.goto(served.url)
        expect(page.get_by_label("Key of this server")).to_be_focused()
        page.keyboard.type(KEY)
        page.get_by_label("Prompt", exact=True).fill("The sea")
        page.get_by_label("Tokens").fill("12")
        page.get_by_label("Seed").fill("1")
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("status")).to_have_text(
            re.compile("12 tokens of gpt-tiny/1, until the limit of tokens")
        )
        text = page.get_by_role("region", name="The text")
        expect(text).to_contain_text("The sea")
        tokens = text.locator("span")
        assert tokens.count() > 1 and float(tokens.last.evaluate("one => one.style.getPropertyValue('--surprise')")) > 0
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        expect(tokens.nth(1)).to_be_focused()
        expect(page.get_by_role("tooltip")).to_contain_text("%")
        if directory := os.environ.get("GPTFLOW_SCREENSHOTS"):
            page.screenshot(path=Path(directory) / "page.png")
        page.get_by_role("button", name="Model card").click()
        expect(page.get_by_role("dialog")).to_contain_text("# Card 1")
        page.keyboard.press("Escape")
        page.get_by_label("Colour the prompt too").check()
        page.get_by_label("Temperature").fill("9")
        page.get_by_role("button", name="Continue").click()
        assert page.get_by_label("Temperature").evaluate("one => !one.validity.valid")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Tokens").fill("4096")
        page.keyboard.press("Control+Enter")
        expect(tokens.nth(20)).to_be_visible()
        assert [tokens.nth(i).inner_text() for i in range(3)] == list("The")
        page.keyboard.press("Escape")
        expect(page.get_by_role("status")).to_have_text(re.compile("stopped"))
    assert not problems

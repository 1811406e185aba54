"""A user's steps in the two web pages: start a run with one changed value, see why it won, see the champion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import PipelinesFile
from tests.servers import Up
from tests.ui.conftest import SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.slow
expect.set_options(timeout=SECONDS)

HEADING = ":scope > .p-label__header .schema-form-property__label"
CHANGED = "25"


def open_form(page: Page, up: Up) -> None:
    """Open the form for a custom run of the deployment."""
    identity = up.prefect.ask("deployments/name/retrain/tiny")["id"]
    page.goto(f"{up.servers().prefect}/deployments/deployment/{identity}/run")


def named(parent: Page | Locator, page: Page, label: str) -> Locator:
    return parent.locator(".schema-form-property", has=page.locator(f"{HEADING}:text-is('{label}')"))


def field(page: Page, section: str, label: str) -> Locator:
    """Return the form field of one value, with its name, its description and its error message."""
    return named(named(page, page, section), page, f"{label} (Optional)")


def control(page: Page, section: str, label: str) -> Locator:
    return field(page, section, label).locator("input, textarea").first


def submitted(page: Page) -> str:
    """Submit the form, and return the id of the flow run that it started.

    The page shows its own link to the run for a few seconds only, and a busy machine may miss it.
    """
    for _ in range(3):  # retry as a person would: Prefect answers 503 while its database is locked
        with page.expect_response(re.compile("/create_flow_run$"), timeout=3 * SECONDS) as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != 503:
            break
    assert answer.value.ok, answer.value.text()
    return str(answer.value.json()["id"])


def picture(page: Page, directory: Path | None, name: str) -> None:
    if directory is not None:
        page.wait_for_timeout(1500)  # animations end
        page.screenshot(path=directory / f"{name}.png")


def test_the_form_refuses_a_wrong_value_and_names_the_field_and_the_reason(page: Page, up: Up) -> None:
    open_form(page, up)
    control(page, "train", "Batch Size").fill("0")
    page.get_by_role("button", name="Submit").click()
    refused = "Validation failed for field 'train.batch_size'. Failure reason: 0 is less than the minimum of 1"
    expect(page.get_by_text(refused).first).to_be_visible()
    control(page, "train", "Batch Size").fill("8")
    control(page, "train", "Max Steps").fill("-5")
    page.get_by_role("button", name="Submit").click()
    expect(field(page, "train", "Max Steps")).to_contain_text("-5 is not valid")
    assert page.url.endswith("/run") and up.prefect.runs() == []


def test_a_run_with_one_value_changed_in_the_form_keeps_the_others_and_shows_its_verdict(
    page: Page, up: Up, screenshots: Path | None
) -> None:
    open_form(page, up)
    shown = {
        ("corpus", "Tokenizer"): "bytes",
        ("corpus", "Val Fraction"): "0.15",
        ("model", "Emb Dim"): "32",
        ("train", "Learning Rate"): "0.01",
        ("train", "Max Steps"): "60",
        ("sample", "Prompts"): "The model",
    }
    for (section, label), value in shown.items():
        expect(control(page, section, label)).to_have_value(value)
    control(page, "train", "Max Steps").fill(CHANGED)
    field(page, "train", "Max Steps").scroll_into_view_if_needed()
    picture(page, screenshots, "form")
    page.goto(f"{up.servers().prefect}/runs/flow-run/{submitted(page)}")

    expect(page.get_by_text("Promoted", exact=True)).to_be_visible(timeout=3 * SECONDS)
    page.reload()  # the timeline continues as if the run did
    picture(page, screenshots, "run")
    trained_as_asked(up)
    page.get_by_text("Artifacts", exact=True).click()
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    plot = page.locator("img[src^='data:image/png']").first
    expect(plot).to_be_visible()
    assert plot.evaluate("image => image.naturalWidth") > 300
    (version,) = MlflowClient(f"sqlite:///{up.root.path / 'mlflow.db'}").search_model_versions("name = 'gpt-tiny'")
    expect(page.get_by_text(re.compile("promoted")).first).to_be_visible()
    expect(page.get_by_text(f"{float(version.tags['holdout_bits_per_byte']):.4f}").first).to_be_visible()
    picture(page, screenshots, "card")

    page.goto(f"{up.servers().mlflow}/#/models/gpt-tiny")
    expect(page.get_by_text("@ champion")).to_be_visible()
    page.get_by_text("Model training", exact=True).click()
    page.goto(f"{up.servers().mlflow}/#/models/gpt-tiny")
    expect(page.get_by_role("row").filter(has_text="Version 1").get_by_text("@ champion")).to_be_visible()
    if screenshots is not None:
        page.get_by_role("button", name="Close", exact=True).click()  # the assistant takes a quarter of the page
        page.get_by_text("Tags", exact=True).first.click()
    picture(page, screenshots, "model")


def trained_as_asked(up: Up) -> None:
    """Check in the run directory that every value is the pipeline's own, except the one that was changed."""
    own = PipelinesFile(up.project / "pipelines.yaml").pipeline("tiny")
    (path,) = up.root.path.glob("runs/tiny/*/config.json")
    trained = json.loads(path.read_text())
    # these are auto until the run chooses
    chosen = {key: trained["train"][key] for key in ("device", "precision", "compile", "processes")}
    assert trained["train"] == {**own.train.model_dump(mode="json"), **chosen, "max_steps": int(CHANGED)}
    assert trained["model"] == own.model.model_dump(mode="json")
    client = MlflowClient(f"sqlite:///{up.root.path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    for section in ("corpus", "sample", "gate"):
        for key, value in getattr(own, section).model_dump(mode="json").items():
            logged = run.data.params[f"{section}.{key}"]
            assert logged == (value if isinstance(value, str) else json.dumps(value)), (section, key)

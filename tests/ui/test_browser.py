"""A user's steps in the two web pages: start a run with one changed value, see why it won, see the champion."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from flows.config.pipelines import PipelinesFile
from gptcore.corpus.split import SPLIT_KEYS
from tests.servers import Up, clean
from tests.ui.conftest import SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

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
    control(page, "Training", "Batch size").fill("0")
    page.get_by_role("button", name="Submit").click()
    refused = "Validation failed for field 'train.batch_size'. Failure reason: 0 is less than the minimum of 1"
    expect(page.get_by_text(refused).first).to_be_visible()
    control(page, "Training", "Batch size").fill("8")
    control(page, "Training", "Max steps").fill("-5")
    page.get_by_role("button", name="Submit").click()
    expect(field(page, "Training", "Max steps")).to_contain_text("-5 is not valid")
    assert page.url.endswith("/run") and up.prefect.runs() == []


def test_a_run_with_one_value_changed_in_the_form_keeps_the_others_and_shows_its_verdict(
    page: Page, up: Up, screenshots: Path | None
) -> None:
    open_form(page, up)
    shown = {
        ("Text", "Tokenizer"): "bytes",
        ("Text", "Share of val"): "0.15",
        ("Model", "Embedding width"): "32",
        ("Training", "Learning rate"): "0.01",
        ("Training", "Max steps"): "60",
        ("Samples", "Prompts"): "The model",
    }
    for (section, label), value in shown.items():
        expect(control(page, section, label)).to_have_value(value)
    control(page, "Training", "Max steps").fill(CHANGED)
    accept = page.get_by_text(re.compile("^Accept the text"))
    expect(accept.first).to_be_visible()
    accept.first.scroll_into_view_if_needed()
    picture(page, screenshots, "form")
    page.goto(f"{up.servers().prefect}/runs/flow-run/{submitted(page)}")

    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=3 * SECONDS)
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
            if value is None and key in SPLIT_KEYS:  # empty until the run chooses
                assert float(logged) > 0
                continue
            assert logged == (value if isinstance(value, str) else json.dumps(value)), (section, key)


ATTACK = """async ([base, socket, posts]) => {
    const done = [];
    const attempt = async (name, action) => {
        try { done.push([name, String(await action())]); } catch (error) { done.push([name, "failed"]); }
    };
    for (const [path, body] of posts) {
        const untyped = new Blob([JSON.stringify(body)]);  // sent without a content type, so without a preflight
        await attempt("blob", () => fetch(base + path, {method: "POST", mode: "no-cors", body: untyped}));
        const json = {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)};
        await attempt("json", async () => (await fetch(base + path, json)).status);
        await attempt("form", () => new Promise(resolve => {
            const frame = document.createElement("iframe");
            frame.name = "target" + Math.random();
            document.body.appendChild(frame);
            const form = document.body.appendChild(document.createElement("form"));
            Object.assign(form, {method: "POST", action: base + path, enctype: "text/plain", target: frame.name});
            const text = JSON.stringify({...body, ignored: "="});
            const field = form.appendChild(document.createElement("input"));
            [field.name, field.value] = [text.slice(0, text.indexOf("=")), text.slice(text.indexOf("=") + 1)];
            frame.onload = () => resolve("sent");
            form.submit();
        }));
    }
    for (const path of socket) {
        await attempt(path, () => new Promise((resolve, reject) => {
            const made = new WebSocket(base.replace("http", "ws") + path, ["prefect"]);
            made.onopen = () => resolve("open");
            made.onerror = reject;
        }));
    }
    return done;
}"""
"""Sends each body in the three ways in which a page may send one to another site, and opens the WebSockets."""


def state_of(up: Up) -> list[Any]:
    """Return what the attacks try to change."""
    prefect = [up.prefect.ask(f"{kind}/filter", {}) for kind in ("variables", "deployments", "flow_runs", "work_pools")]
    deployments = [{key: one[key] for key in ("id", "name", "paused", "pull_steps", "tags")} for one in prefect[1]]
    experiments = MlflowClient(up.servers().mlflow).search_experiments()
    return [prefect[0], deployments, len(prefect[2]), prefect[3], sorted(one.name for one in experiments)]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_site_cannot_use_the_servers(foreign_page: Page, browser: Browser, up: Up, host: str) -> None:
    before = state_of(up)
    deployment = up.prefect.ask("deployments/name/retrain/tiny")["id"]
    run = f"/api/deployments/{deployment}/create_flow_run"
    prefect, mlflow = (f"http://{host}:{port}" for port in (up.prefect_port, up.mlflow_port))
    posts = [["/api/variables/", {"name": "evil", "value": "1"}], [run, {"name": "evil"}]]
    sockets = ["/api/events/out", "/api/events/in", "/api/logs/out"]
    done = foreign_page.evaluate(ATTACK, [prefect, sockets, posts])
    create = ["/api/2.0/mlflow/experiments/create", {"name": "evil"}]
    done += foreign_page.evaluate(ATTACK, [mlflow, ["/graphql"], [create]])
    assert {(name, result) for name, result in done if name not in ("blob", "form")} == {
        (name, "failed") for name in ("json", *sockets, "/graphql")
    }
    patched = "url => fetch(url, {method: 'PATCH', body: '{\"paused\": true}'}).then(() => 'done', () => 'failed')"
    assert foreign_page.evaluate(patched, f"{prefect}/api/deployments/{deployment}") == "failed"
    for port in (up.prefect_port, up.mlflow_port):
        rebound = browser.new_page()  # the other site's name means this machine now
        answer = rebound.goto(f"http://evil.example:{port}/")
        assert answer is not None and answer.status == 400 and "does not answer as" in answer.text()
        rebound.close()
    assert state_of(up) == before


def test_pages_and_programs_of_this_machine_can(browser: Browser, up: Up) -> None:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"http://localhost:{up.prefect_port}/deployments")
    expect(page.get_by_text("tiny", exact=True).first).to_be_visible()
    page.goto(f"http://localhost:{up.mlflow_port}/#/experiments")
    expect(page.get_by_text("Experiments", exact=True).first).to_be_visible()
    page.close()
    command = [sys.executable, "-m", "prefect", "deployment", "run", "retrain/tiny", "--start-in", "1 hour"]
    done = subprocess.run(command, env=clean(PREFECT_API_URL=up.prefect.url), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

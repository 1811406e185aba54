"""Notifications: the messages, and real failures, kills and promotions that send them."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.config.pipelines import Pipeline, PipelinesFile
from flows.notifications.notify import Message, NotifyConfig, send
from flows.retrain.parameters import build_flow_parameters, merge_parameters
from flows.state.root import StateRoot
from gptcore.errors import ConfigError
from tests.servers import Prefect, Receiver, Serving, gptflow, wait_for
from tests.tiny import write_pipelines

FILE = "pipelines:\n  night:\n    notify:\n      - "
LOG = logging.getLogger("test")
MESSAGE = Message(
    "night", "failure", "night: failed", "No space left on device", "a-b-c", "http://127.0.0.1/runs/a-b-c"
)


def test_a_refused_address_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_text(FILE + "{webhook: 'example.org/services/secret'}\n")
    with pytest.raises(ConfigError) as refused:
        PipelinesFile(tmp_path / "pipelines.yaml").pipeline("night")
    assert "secret" not in str(refused.value)


def test_parameters_of_a_run_do_not_change_the_notification_targets(tiny: Pipeline) -> None:
    pipeline = tiny.model_copy(update={"notify": (NotifyConfig(block="slack-webhook/team", on=("stale",)),)})
    registered = build_flow_parameters(pipeline, set(Pipeline.model_fields))
    assert merge_parameters(registered, {**registered, "train": {"max_steps": 5}}).notify == pipeline.notify


def test_a_webhook_gets_the_message_only_if_it_subscribes_to_the_event(receiver: Receiver) -> None:
    everything = NotifyConfig(webhook=f"{receiver.url}/one")
    promotions = NotifyConfig(webhook=f"{receiver.url}/two", on=("promotion",))
    assert send([everything, promotions], MESSAGE, LOG) == 1
    (got,) = receiver.got
    assert got.pop("time").endswith("+00:00")
    assert got == {
        "pipeline": "night",
        "event": "failure",
        "title": "night: failed",
        "text": "No space left on device",
        "flow_run_id": "a-b-c",
        "url": "http://127.0.0.1/runs/a-b-c",
    }


def test_a_failing_webhook_is_tried_twice_and_logged_without_its_path(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = 404
    refusing, silent = (
        NotifyConfig(webhook=f"{url}/secret?key=secret") for url in (receiver.url, "http://127.0.0.1:9")
    )
    assert send([refusing, silent], MESSAGE, LOG) == 0
    assert len(receiver.got) == 2
    lines = [record.getMessage() for record in caplog.records if record.name == "test"]
    assert lines == [
        "webhook at 127.0.0.1 did not receive the message (failure): it answered 404",
        "webhook at 127.0.0.1 did not receive the message (failure): ConnectionError",
    ]
    assert "secret" not in caplog.text


@pytest.mark.slow
def test_a_block_on_the_server_gets_the_message_and_a_missing_block_is_logged(
    server: Prefect, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.blocks.system import Secret
    from prefect.settings import PREFECT_API_URL, temporary_settings

    lines: list[str] = []  # not caplog's, because Prefect may replace the root logger's handlers meanwhile
    monkeypatch.setattr(LOG, "handle", lambda record: lines.append(record.getMessage()))
    body = {"title": "{{subject}}", "text": "{{body}}"}
    url = f"{receiver.url}/secret"
    with temporary_settings({PREFECT_API_URL: server.url}):
        CustomWebhookNotificationBlock(name="team", url=url, json_data=body, allow_private_urls=True).save("team")
        Secret(value="x").save("team")
        names = ("custom-webhook/team", "custom-webhook/nobody", "secret/team")
        assert send([NotifyConfig(block=name) for name in names], MESSAGE, LOG) == 1
        assert receiver.got == [{"title": MESSAGE.title, "text": f"{MESSAGE.text}\n{MESSAGE.url}"}]
        receiver.status = 500
        assert send([NotifyConfig(block=names[0])], MESSAGE, LOG) == 0
    assert lines == [
        "block custom-webhook/nobody did not receive the message (failure): the Prefect server has no such block",
        "block secret/team did not receive the message (failure): it is a Secret, not a notification block",
        "block custom-webhook/team did not receive the message (failure): it answered 500",
    ]


@pytest.mark.slow
def test_a_served_pipeline_reports_promotions_failures_and_kills(
    project: Path, server: Prefect, receiver: Receiver
) -> None:
    def list_messages() -> list[tuple[str, ...]]:
        return [(message["event"], message["title"], message["flow_run_id"]) for message in receiver.got]

    dead = {"webhook": "http://127.0.0.1:9/hook"}  # an unreachable target must not affect the others
    write_pipelines(project, night={"notify": [dead, {"webhook": f"{receiver.url}/hook"}]})
    with Serving(project, server):
        first = server.start("night")
        assert server.verdict(first) == "promoted"
        wait_for(lambda: receiver.got, 30)
        failed = server.start("night", corpus={"sources": ["/nowhere"]})
        assert server.ended(failed)["type"] == "FAILED"
        wait_for(lambda: len(receiver.got) == 2, 30)
        killed = server.start("night", train={"max_steps": 1_000_000, "eval_every": 1_000_000})
        flow_process(project).kill()
        assert server.ended(killed)["type"] == "CRASHED"
        wait_for(lambda: len(receiver.got) == 3, 30)
    assert list_messages() == [
        ("promotion", "night: gpt-night has a new champion", first),
        ("failure", "night: failed", failed),
        ("failure", "night: crashed", killed),
    ]
    texts: list[Any] = [message["text"] for message in receiver.got]
    assert "first version" in texts[0] and "'/nowhere' does not exist" in texts[1] and "SIGKILL" in texts[2]
    assert receiver.got[0]["url"] == f"{server.url.removesuffix('/api')}/runs/flow-run/{first}"


@pytest.mark.slow
@pytest.mark.usefixtures("root")
def test_a_run_from_the_command_line_sends_notifications_too(
    project: Path, server: Prefect, receiver: Receiver
) -> None:
    write_pipelines(project, tiny={"notify": [{"webhook": f"{receiver.url}/hook"}]})
    (project / "text" / "one.txt").write_text("Too short.")
    done = gptflow(project, "run", "tiny", PREFECT_API_URL=server.url)
    assert done.returncode == 2 and "nothing is left for train" in done.stderr, done.stdout + done.stderr
    (message,) = receiver.got
    assert (message["event"], message["title"]) == ("failure", "tiny: failed")
    assert "nothing is left for train" in message["text"]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tiny_registry")
def test_a_run_that_died_unnoticed_is_reported_when_it_is_found(
    root: StateRoot, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.retrain.flow import retrain
    from flows.tracking import reconcile

    monkeypatch.setattr(reconcile, "_STARTING", timedelta(0))
    parameters = {"pipeline": "night", "notify": [{"webhook": f"{receiver.url}/hook"}]}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(retrain, parameters=parameters, state=Running())
        assert f"crashed    Prefect run {run.id} of night" in reconcile.reconcile(client, root)
        reconcile.reconcile(client, root)
    (message,) = receiver.got
    assert (message["event"], message["flow_run_id"]) == ("failure", str(run.id))
    assert message["text"].startswith("No process worked on this run")


def flow_process(project: Path) -> psutil.Process:
    """Return the process of the flow run whose trainer is running."""
    runs = str(project / "mlruns" / "runs")

    def look() -> list[psutil.Process]:
        trainers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(part.startswith(runs) for part in process.info["cmdline"] or ())
        ]
        parents = [trainer.parent() for trainer in trainers]
        return [parent for parent in parents if parent and "prefect.engine" in parent.cmdline()]

    wait_for(look, 240)
    (flow,) = look()
    return flow

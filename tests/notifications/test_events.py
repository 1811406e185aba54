"""Events: the event of each promotion and rollback, and the deployments that it starts."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests
from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Crashed, Failed

from flows.config.pipelines import PipelinesFile, TriggerConfig
from flows.notifications import events
from flows.notifications.verdicts import read_text, read_verdict
from flows.registry import champion
from flows.registry.champion import GATE
from flows.retrain.watch import watch
from gptcore.errors import ConfigError
from tests.servers import Prefect, Receiver, Serving, clean, gptflow, prefect_server, wait_for
from tests.tiny import write_pipelines

MODEL = "gpt-tiny"
FILE = "pipelines:\n  base: {model_name: gpt-base}\n  night:\n    triggers:\n      - "


def test_triggers_name_an_event_and_its_resource(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_text(FILE + "{on: corpus_changed}\n      - {on: promoted, model: gpt-base}\n")
    triggers = PipelinesFile(tmp_path / "pipelines.yaml").pipeline("night").triggers
    assert triggers == (TriggerConfig(on="corpus_changed"), TriggerConfig(on="promoted", model="gpt-base"))
    assert [trigger.awaited_event("night") for trigger in triggers] == [
        ("gptflow.corpus.changed", "gptflow.pipeline.night"),
        ("gptflow.model.promoted", "gptflow.model.gpt-base"),
    ]


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {night: {schedule: {interval: 60, paused: yes}}}\n")
    with pytest.raises(ConfigError, match=r"schedule.paused.*boolean \(given: 'yes'\)"):
        PipelinesFile(tmp_path / "pipelines.yaml").pipeline("night")


@pytest.fixture
def registry(tiny_registry: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpt-tiny with two versions, and a server that receives its events."""
    monkeypatch.setenv("PREFECT_API_URL", f"{receiver.url}/api")
    for _ in range(2):
        tiny_registry.register()
    return tiny_registry


def test_every_promotion_and_rollback_sends_an_event(registry: Any, receiver: Receiver) -> None:
    champion.promote(registry.root, MODEL, "1", "first", GATE)
    champion.promote(registry.root, MODEL, "2", "nicer", "ann")
    champion.promote(registry.root, MODEL, "2", "it is champion already", "ann")
    champion.rollback(registry.root, MODEL, "swears", "ben")
    told = [event for (event,) in receiver.got]
    assert {event["event"] for event in told} == {"gptflow.model.promoted"}
    assert {event["resource"]["prefect.resource.id"] for event in told} == {"gptflow.model.gpt-tiny"}
    keys = ("version", "previous", "kind", "by", "reason", "pipeline")
    assert [tuple(event["payload"][key] for key in keys) for event in told] == [
        ("1", None, "promoted", GATE, "first", "tiny"),
        ("2", "1", "promoted by a person", "ann", "nicer", "tiny"),
        ("1", "2", "rolled back", "ben", "swears", "tiny"),
    ]


def test_the_event_of_a_killed_promotion_is_sent_once_when_the_promotion_is_completed(
    registry: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(champion._ChampionLog, "_carry_out", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            champion.promote(registry.root, MODEL, "1", "first", "ann")
    assert receiver.got == []
    champion.complete_log(registry.root, MODEL)
    champion.complete_log(registry.root, MODEL)
    assert [event["payload"]["version"] for (event,) in receiver.got] == ["1"]


@pytest.mark.parametrize(
    ("state", "verdict", "event"),
    [
        (Completed(message="rejected: within noise"), "rejected", "prefect.flow-run.Kept champion"),
        (Completed(name="Kept champion", message="within noise"), "rejected", "prefect.flow-run.Kept champion"),
        (Failed(message="held: half of the text is gone"), "held", "prefect.flow-run.Held"),
        (Completed(message="12 files: 3 kB"), None, None),
        (Crashed(message="killed"), None, None),
    ],
)
def test_a_verdict_is_read_from_states_of_this_and_earlier_releases_and_sends_the_event_of_earlier_ones(
    state: State[Any],
    verdict: str | None,
    event: str | None,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{receiver.url}/api")
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), tags=["nightly"])
    assert read_verdict(state) == verdict
    events.send_former_state_name(watch, run, state)
    assert [sent["event"] for (sent,) in receiver.got] == ([event] if event else [])
    for (sent,) in receiver.got:
        assert sent["resource"] == {"prefect.resource.id": f"prefect.flow-run.{run.id}"}
        assert [resource["prefect.resource.role"] for resource in sent["related"]] == ["flow", "deployment", "tag"]
        assert read_text(state) in ("within noise", "half of the text is gone")


def test_an_event_that_cannot_be_sent_is_logged_and_the_promotion_succeeds(
    registry: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = 500
    assert champion.promote(registry.root, MODEL, "1", "first", "ann") is not None
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert champion.promote(registry.root, MODEL, "2", "second", "ann") is not None
    messages = [record.getMessage() for record in caplog.records if record.name == events.__name__]
    assert len(messages) == 2 and "500" in messages[0] and all("127.0.0.1 did not take" in line for line in messages)


def test_without_a_prefect_server_promotions_and_corpus_changes_connect_to_nothing_and_warn_of_nothing(
    registry: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    addresses: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        addresses.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("PREFECT_API_URL")
    events.send_corpus_changed("tiny", ["text"])
    assert champion.promote(registry.root, MODEL, "1", "first", "ann") is not None
    assert addresses == [] and [record for record in caplog.records if record.name == events.__name__] == []


@pytest.mark.slow
def test_the_promote_command_sends_its_event_without_importing_prefect(
    registry: Any, receiver: Receiver, project: Path
) -> None:
    program = "import sys; from flows.cli import main\ntry: main()\nfinally: print('prefect' in sys.modules)"
    arguments = ["promote", MODEL, "2", "--reason", "nicer"]
    environment = clean(PREFECT_API_URL=f"{receiver.url}/api")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"{MODEL}: version 2 is champion, after none", "False"], done.stderr
    ((event,),) = receiver.got
    assert event["payload"]["reason"] == "nicer"


@pytest.mark.slow
def test_a_promotion_starts_the_pipelines_with_a_trigger_on_it_until_the_trigger_is_removed(
    project: Path, server: Prefect
) -> None:
    def automations() -> list[str]:
        return [automation["name"] for automation in server.ask("automations/filter", {})]

    def runs(pipeline: str) -> list[str]:
        return [run["state"]["type"] for run in server.runs() if run["parameters"].get("pipeline") == pipeline]

    follower, other = ({"triggers": [{"on": "promoted", "model": f"gpt-{name}"}]} for name in ("base", "idle"))
    write_pipelines(project, base={}, idle={}, follower=follower, other=other)
    names = [
        "follower on gptflow.model.promoted of gptflow.model.gpt-base",
        "other on gptflow.model.promoted of gptflow.model.gpt-idle",
    ]
    with Serving(project, server):
        assert sorted(automations()) == names
        assert server.verdict(server.start("base")) == "promoted"
        wait_for(lambda: runs("follower") == ["COMPLETED"], 240)
    write_pipelines(project, base={}, idle={}, follower={})
    with Serving(project, server) as lines:
        assert "changed    follower" in lines and "removed    other" in lines and automations() == []
    assert runs("follower") == ["COMPLETED"] and runs("other") == []


@pytest.mark.slow
def test_a_server_with_a_password_receives_events_through_prefects_own_client(
    tiny_registry: Any, project: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny_registry.register()
    directory = tmp_path_factory.mktemp("locked")
    with prefect_server(directory, migrated, PREFECT_SERVER_API_AUTH_STRING="ann:secret") as server:
        given = {"PREFECT_API_URL": server.url, "PREFECT_API_AUTH_STRING": "ann:secret"}
        done = gptflow(project, "promote", MODEL, "1", "--reason", "first", **given)
        assert (done.returncode, done.stdout) == (0, f"{MODEL}: version 1 is champion, after none\n"), done.stderr
        asked = {"filter": {"event": {"name": ["gptflow.model.promoted"]}}}
        url, password = f"{server.url}/events/filter", ("ann", "secret")
        wait_for(lambda: requests.post(url, json=asked, auth=password, timeout=20).json()["total"] == 1, 20)

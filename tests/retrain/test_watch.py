"""The watch flow: it reports changed sources and overdue pipelines, and a changed text is trained on."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.config.pipelines import Pipeline, PipelinesFile, TriggerConfig
from flows.config.schedule import ScheduleConfig
from flows.notifications.events import EventNotSent
from flows.notifications.notify import NotifyConfig
from flows.retrain import last_success
from flows.retrain.watch import look_at_sources, look_at_successes, read_memory, read_registered, register
from flows.state import locks
from flows.state.root import StateRoot
from gptcore.errors import ConfigError
from tests.servers import Prefect, Receiver, Serving, wait_for
from tests.tiny import prose, write_pipelines


@pytest.fixture(autouse=True)
def without_flow_run() -> Iterator[None]:
    """No flow run: its logger is disabled."""
    from prefect.logging import disable_run_logger

    with disable_run_logger():
        yield


@pytest.fixture
def awaiting(tiny: Pipeline, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The tiny pipeline, waiting for its corpus to change; the receiver gets the events."""
    monkeypatch.setenv("PREFECT_API_URL", receiver.url)
    return tiny.model_copy(update={"triggers": (TriggerConfig(on="corpus_changed"),)})


def test_the_first_look_and_every_change_are_reported_once(
    awaiting: Pipeline, root: StateRoot, receiver: Receiver
) -> None:
    (text,) = awaiting.corpus.sources
    said = [f"the corpus of tiny changed: {text}"]
    assert look_at_sources(root, awaiting) == said
    assert look_at_sources(root, awaiting) == []
    (Path(text) / "two.txt").write_text(prose(2))
    assert look_at_sources(root, awaiting) == said
    assert look_at_sources(root, awaiting) == []
    (Path(text) / "two.txt").unlink()
    assert look_at_sources(root, awaiting) == said
    assert [event["payload"] for (event,) in receiver.got] == [{"pipeline": "tiny", "sources": [text]}] * 3


def test_a_source_that_is_added_to_the_file_or_removed_from_it_is_a_change(awaiting: Pipeline, root: StateRoot) -> None:
    look_at_sources(root, awaiting)
    more = awaiting.corpus.model_copy(update={"sources": (*awaiting.corpus.sources, "python-docs")})
    said = ["the corpus of tiny changed: python-docs"]
    assert look_at_sources(root, awaiting.model_copy(update={"corpus": more})) == said
    assert look_at_sources(root, awaiting) == said


def test_an_unreachable_source_is_not_a_change_and_does_not_hide_other_changes(
    awaiting: Pipeline, root: StateRoot
) -> None:
    (text,) = awaiting.corpus.sources
    corpus = awaiting.corpus.model_copy(update={"sources": ("http://127.0.0.1:9/text.txt", text)})
    pipeline = awaiting.model_copy(update={"corpus": corpus})
    assert look_at_sources(root, pipeline) == [f"the corpus of tiny changed: {text}"]
    assert look_at_sources(root, pipeline) == []
    (Path(text) / "two.txt").write_text(prose(2))
    assert look_at_sources(root, pipeline) == [f"the corpus of tiny changed: {text}"]
    Path(text).rename(Path(text).with_name("moved"))
    assert look_at_sources(root, pipeline) == []
    Path(text).with_name("moved").rename(text)
    assert look_at_sources(root, pipeline) == []


def test_an_event_that_was_not_accepted_is_sent_again(awaiting: Pipeline, root: StateRoot, receiver: Receiver) -> None:
    receiver.status = 500
    for _ in range(2):
        with pytest.raises(EventNotSent):
            look_at_sources(root, awaiting)
    receiver.status = 204
    assert len(look_at_sources(root, awaiting)) == 1
    assert look_at_sources(root, awaiting) == []


def test_a_change_during_a_run_is_reported_when_the_run_is_over(awaiting: Pipeline, root: StateRoot) -> None:
    with locks.hold(root.lock_path("tiny")):
        assert look_at_sources(root, awaiting) == []
    assert len(look_at_sources(root, awaiting)) == 1


def test_a_truncated_record_is_ignored(awaiting: Pipeline, root: StateRoot) -> None:
    (root.path / "watch").mkdir()
    (root.path / "watch" / "tiny.json").write_text('{"sources": {"te')
    assert len(look_at_sources(root, awaiting)) == 1
    assert read_memory(root, "tiny").sources.keys() == set(awaiting.corpus.sources)


def test_an_overdue_pipeline_is_reported_once_until_its_next_success(
    tiny: Pipeline, root: StateRoot, receiver: Receiver
) -> None:
    pipeline = tiny.model_copy(
        update={"schedule": ScheduleConfig(interval=3600), "notify": (NotifyConfig(webhook=f"{receiver.url}/hook"),)}
    )
    succeeded(root, timedelta(minutes=5))
    assert look_at_successes(root, pipeline) == []
    for ago in (timedelta(days=3, hours=4, minutes=1), timedelta(hours=5, minutes=1)):
        succeeded(root, ago)
        assert look_at_successes(root, pipeline) == ["tiny is overdue"]
        assert look_at_successes(root, pipeline) == []
    told = [(message["event"], message["title"], message["text"][:27]) for message in receiver.got]
    title = "tiny: no success for too long"
    assert told == [("stale", title, "No success for 3 days 4 h, "), ("stale", title, "No success for 5 h 1 min, s")]


def test_a_notification_that_was_not_accepted_is_sent_at_the_next_look(
    tiny: Pipeline, root: StateRoot, receiver: Receiver
) -> None:
    pipeline = tiny.model_copy(
        update={"schedule": ScheduleConfig(interval=3600), "notify": (NotifyConfig(webhook=f"{receiver.url}/hook"),)}
    )
    succeeded(root, timedelta(days=3))
    receiver.status = 503
    assert look_at_successes(root, pipeline) == []
    receiver.status = 200
    assert look_at_successes(root, pipeline) == ["tiny is overdue"]


def succeeded(root: StateRoot, ago: timedelta) -> None:
    last_success.record(root, "tiny", "skipped")
    path = root.path / "successes" / "tiny.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "at": (datetime.now(UTC) - ago).isoformat()}))


@pytest.mark.parametrize(
    ("keys", "is_watched"),
    [
        ("{}", False),
        ("{triggers: [{on: corpus_changed}]}", True),
        ("{notify: [{webhook: 'https://example.org/hook'}]}", False),  # never overdue without a schedule
        ("{schedule: {interval: 60}, notify: [{webhook: 'https://example.org/hook'}]}", True),
        ("{schedule: {interval: 60}, notify: [{webhook: 'https://example.org/hook', on: [failure]}]}", False),
    ],
)
def test_only_pipelines_that_ask_for_it_are_watched(tmp_path: Path, keys: str, is_watched: bool) -> None:
    (tmp_path / "pipelines.yaml").write_text(f"pipelines: {{night: {keys}}}")
    pipeline = PipelinesFile(tmp_path / "pipelines.yaml").pipeline("night")
    root = StateRoot(tmp_path / "home").prepare()
    assert read_registered(root) == []
    assert register(root, [pipeline]) == is_watched and read_registered(root) == [pipeline] * is_watched


@pytest.mark.parametrize("given", ["5", "90000", "1.5", "true", "often", "'300'"])
def test_watch_seconds_must_be_a_number_of_seconds(tmp_path: Path, given: str) -> None:
    (tmp_path / "pipelines.yaml").write_text(f"pipelines: {{night: {{}}}}\nwatch_seconds: {given}\n")
    with pytest.raises(ConfigError, match=r"pipelines.yaml:2: watch_seconds: .* from 10 to 86400 \(given: "):
        PipelinesFile(tmp_path / "pipelines.yaml")


def test_watch_seconds_are_five_minutes_unless_given(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {night: {}}\n")
    assert PipelinesFile(tmp_path / "pipelines.yaml").watch_seconds == 300


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_changed_text_is_trained_on_without_a_schedule(project: Path, server: Prefect) -> None:
    def runs() -> list[str]:
        started = [run for run in server.runs() if run["parameters"].get("pipeline") == "night"]
        return [str(run["state"]["message"]).partition(": ")[0] for run in started]

    write_pipelines(project, watch_seconds=15, night={"triggers": [{"on": "corpus_changed"}]})
    with Serving(project, server) as lines:
        assert lines[-1] == "added      watch"
        wait_for(lambda: runs() == ["promoted"], 200)
        looks = len(list_watch_runs(server))
        (project / "text" / "two.txt").write_text(prose(2))
        wait_for(lambda: len(runs()) == 2 and set(runs()) <= {"promoted", "rejected"}, 200)
        wait_for(lambda: len(list_watch_runs(server)) > looks + 2, 200)
        assert len(runs()) == 2
    write_pipelines(project, night={})
    with Serving(project, server) as lines:
        assert "removed    watch" in lines


def list_watch_runs(server: Prefect) -> list[str]:
    return [run["id"] for run in server.runs() if run["name"] == "watch" and run["end_time"]]

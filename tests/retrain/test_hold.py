"""A run is held if its text looks like an accident, until a person accepts the text."""

import re
from pathlib import Path
from typing import Any

import pytest

from flows.config.pipelines import Pipeline
from flows.notifications.notify import NotifyConfig
from flows.retrain import last_success
from flows.retrain.flow import TextHeld
from flows.retrain.policy import weigh
from flows.state.root import StateRoot
from gptcore.corpus.ingest import ingest
from tests.retrain.test_flow import mlflow_runs
from tests.retrain.test_policy import TRAINED, asking, run
from tests.servers import Receiver
from tests.tiny import prose

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_run_is_held_and_reported_if_half_of_the_text_is_gone_until_a_person_accepts_it(
    tiny: Pipeline, project: Path, root: StateRoot, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(tiny, train={"max_steps": 5})
    notify = (NotifyConfig(webhook=f"{receiver.url}/hook", on=("failure",)),)
    for number in range(8):
        (project / "text" / f"{number}.txt").write_text(prose(number + 10, 2000))
    assert run(asked)[0] in TRAINED
    trained = last_success.read_last(root, "tiny")
    (project / "text" / "one.txt").unlink()
    for number in range(3):
        (project / "text" / f"{number}.txt").unlink()

    flags: dict[str, Any]
    for flags in ({}, {"force": True}):
        with pytest.raises(TextHeld) as held:
            run(asked, notify=notify, **flags)
        said = str(held.value)
        assert re.match(
            r"(59|60)\.\d% of the text of version 1 is gone: of 9 documents, 4 are missing, 0 changed; ", said
        )
        assert f"{project}/text had 9 and has 5. Nothing was trained." in said
        assert "`gptflow run tiny --accept-text`" in said and ("--force does not accept it" in said) == bool(flags)
    told = [(message["event"], message["title"]) for message in receiver.got]
    assert told == [("failure", "tiny: held")] * 2 and receiver.got[-1]["text"] == said
    assert len(mlflow_runs(root)) == 1
    assert last_success.read_last(root, "tiny") == trained, "a held run is not a success"

    # A run that was killed between its acceptance and its training is resumed without a question.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("flows.retrain.attempts.check_fits", killed)
        run(asked, accept_text=True)
    name, outcome = run(asked)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/2"
    (project / "text" / "more.txt").write_text(prose(30, 500))
    reason = weigh(root, asked, "", ingest(asked.corpus, root.corpora, Path.cwd()))
    assert reason.must_train and reason.hold is None and reason.since == "2"


def killed(*_: object) -> None:
    raise KeyboardInterrupt

"""A run is held if its text looks like an accident, until a person accepts the text."""

import base64
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from prefect.exceptions import CancelledRun
from prefect.logging import disable_run_logger

from flows.cli import exit as cli_exit
from flows.cli import run as cli_run
from flows.cli.doctor_checks import CheckTarget, check_successes
from flows.config.pipelines import Pipeline, PipelinesFile
from flows.config.schedule import ScheduleConfig
from flows.registry import versions
from flows.retrain import hold, last_success
from flows.retrain.policy import Reason, find_reason
from flows.retrain.watch import look_at_sources
from flows.state.root import StateRoot
from gptcore.corpus.ingest import ingest
from gptcore.errors import CorpusError
from tests.retrain.test_flow import mlflow_runs
from tests.retrain.test_policy import TRAINED, asking, run
from tests.servers import Receiver
from tests.tiny import prose, write_pipelines

pytestmark = pytest.mark.usefixtures("prefect_server")

LINES = 200_000 // 70
DRAW = random.Random(3)
STRANGE = {
    "a log": (
        "".join(f"2026-11-30 02:{n // 60}:{n % 60} [{n * 7919 % 9973}] 200 {n * 31}ms\n" for n in range(LINES)),
        "letters are",
    ),
    "numbers": (
        "".join(",".join(f"{DRAW.gauss(0, 50):.4f}" for _ in range(8)) + "\n" for _ in range(LINES)),
        "letters are 0% of it",
    ),
    "base64": (
        "".join(base64.b64encode(DRAW.randbytes(57)).decode() + "\n" for _ in range(LINES)),
        "digits are",
    ),
    "Chinese": (
        "".join("".join(DRAW.choices("的一是在不了有和人这中大为上个国我以要他", k=20)) + "。\n" for _ in range(LINES)),
        "letters are",
    ),
}
"""Texts that are not prose, and what a message says about them first."""


def compare(root: StateRoot, pipeline: Pipeline, texts: dict[str, str]) -> Reason:
    """Replace the pipeline's text, and compare it with that of the newest version."""
    directory = Path(pipeline.corpus.sources[0])
    shutil.rmtree(directory)
    directory.mkdir()
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text)
    return find_reason(root, pipeline, "", ingest(pipeline.corpus, root.corpora, Path.cwd()))


def test_a_run_is_held_if_most_of_the_text_is_new_and_strange_to_the_champion(tiny: Pipeline, root: StateRoot) -> None:
    old = {"one": prose(1, 9000)}
    run(tiny)
    assert versions.find_champion(root, "gpt-tiny") is not None
    for name, (strange, kinds) in STRANGE.items():
        said = compare(root, tiny, {**old, name: strange}).hold
        unlike = r"[678]\d\.\d% of the text is new and unlike that of version 1"
        worse = r"the champion is worse on it by \d+\.\d\d bits per byte"
        assert said is not None and re.match(f"{unlike}: {worse}, {kinds} ", said), (name, said)
        assert compare(root, asking(tiny, retrain={"max_removed_share": 1.0}), {**old, name: strange}).hold is None
    said = compare(root, tiny, {"log": STRANGE["a log"][0]}).hold
    assert said is not None and said.startswith("100.0% of the text of version 1 is gone: ") and "unlike" in said

    a_part = STRANGE["a log"][0][: len(old["one"]) // 2]
    for texts in (
        {**old, "two": prose(2, 30_000)},
        {**old, "log": a_part},
        {"one": old["one"].replace("\n", "\r\n"), "two": prose(2, 1000)},
        {"one": old["one"][: len(old["one"]) * 6 // 10]},
    ):
        reason = compare(root, tiny, texts)
        assert reason.must_train and reason.hold is None, texts


def test_a_run_is_held_and_reported_if_half_of_the_text_is_gone_until_a_person_accepts_it(
    project: Path,
    root: StateRoot,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    notify = [{"webhook": f"{receiver.url}/hook", "on": ["failure"]}]
    triggers = [{"on": "corpus_changed"}]
    write_pipelines(project, tiny={"notify": notify, "triggers": triggers, "train": {"max_steps": 5}})
    tiny = PipelinesFile(project / "pipelines.yaml").pipeline("tiny")
    texts = [project / "text" / f"{number}.txt" for number in range(7)]
    texts.append(project / "text" / os.fsdecode(b"caf\xe9.txt"))  # a name that is not UTF-8
    for number, path in enumerate(texts):
        path.write_text(prose(number + 10, 2000))
    assert run(tiny)[0] in TRAINED
    with disable_run_logger():
        assert len(look_at_sources(root, tiny)) == 1, "the first look counts as a change"
    trained = last_success.read_last(root, "tiny")
    for path in (project / "text" / "one.txt", *texts[:3]):
        path.unlink()

    # The flow runs on the server that runs already. The rest of the command is as it is.
    monkeypatch.setattr(cli_run, "_launch", lambda pipeline, root, _, flags: cli_run._run_flow(pipeline, root, flags))
    monkeypatch.chdir(project)
    with disable_run_logger():
        assert len(look_at_sources(root, tiny)) == 1
    for flags in ([], ["--force"]):
        given = ["tiny", "--json", *flags]
        assert cli_exit._run(lambda given=given: cli_run.retrain_now.main(given, standalone_mode=False)) == 2
        printed = capfd.readouterr()
        outcome = json.loads(printed.out[printed.out.index("{\n") :])
        said = outcome["reason"]
        assert outcome["verdict"] == "held" and f"error: {said}" in printed.err
        assert re.match(
            r"(59|60)\.\d% of the text of version 1 is gone: of 9 documents, 4 are missing, 0 changed; ", said
        )
        assert f"{project}/text had 9 and has 5. Nothing was trained." in said
        assert "`gptflow run tiny --accept-text`" in said and ("--force does not accept it" in said) == bool(flags)
    told = [(message["event"], message["title"]) for message in receiver.got]
    assert told == [("failure", "tiny: held")] * 2 and receiver.got[-1]["text"] == said
    assert len(mlflow_runs(root)) == 1
    assert last_success.read_last(root, "tiny") == trained, "a held run is not a success"
    with disable_run_logger():
        assert look_at_sources(root, tiny) == [], "a held text is not tried again until it changes"
    good = texts[-1].read_bytes()
    texts[-1].write_bytes(good + b"\xe9")
    with disable_run_logger():
        assert len(look_at_sources(root, tiny)) == 1
    with pytest.raises(CorpusError, match=r"caf\\udce9\.txt is not UTF-8"):
        run(tiny, notify=tiny.notify)
    assert (receiver.got[-1]["title"], len(receiver.got)) == ("tiny: failed", 3)
    assert r"caf\udce9.txt is not UTF-8" in receiver.got[-1]["text"]
    texts[-1].write_bytes(good)

    scheduled = tiny.model_copy(update={"schedule": ScheduleConfig(interval=3600)})
    (check,) = check_successes(CheckTarget(project / "pipelines.yaml", root, (scheduled,)))
    assert not check.ok and "% of the text of version 1 is gone" in check.message and "--accept-text" in str(check)

    # A run that was killed after its acceptance, before or in its training, is resumed without a question.
    with monkeypatch.context() as patched, pytest.raises(CancelledRun):
        patched.setattr("flows.retrain.attempts.check_fits", killed)
        run(tiny, accept_text=True)
    (project / "text" / "more.txt").write_text(prose(30, 500))
    with monkeypatch.context() as patched, pytest.raises(CancelledRun):
        patched.setattr("flows.retrain.tasks.train", killed)
        run(tiny)
    name, outcome = run(tiny)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/2"
    (check,) = check_successes(CheckTarget(project / "pipelines.yaml", root, (scheduled,)))
    assert check.ok
    (project / "text" / "more.txt").unlink()
    snapshot = ingest(tiny.corpus, root.corpora, Path.cwd())
    reason = find_reason(root, tiny, "", snapshot)
    assert reason.must_train and reason.hold is None and reason.since == "2"
    assert not hold.is_accepted(root, tiny, snapshot, since="2"), "an acceptance ends with the next training"


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt

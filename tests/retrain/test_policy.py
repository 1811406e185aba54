"""When a run trains: its text and settings are compared with those of the newest finished training."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from flows.config.pipelines import SECTIONS, Pipeline
from flows.registry import versions
from flows.retrain import policy
from flows.retrain.flow import Outcome, retrain
from flows.state.root import StateRoot
from gptcore.corpus import ingest
from tests.tiny import prose

pytestmark = pytest.mark.usefixtures("prefect_server", "root")
TRAINED = ("promoted", "rejected")


def run(pipeline: Pipeline, **more: Any) -> tuple[str, Outcome]:
    sections = {name: getattr(pipeline, name) for name in SECTIONS}
    state = retrain(pipeline.name, pipeline.model_name, **sections, **more, return_state=True)
    outcome = state.result()
    return outcome.verdict, outcome


def asking(pipeline: Pipeline, **sections: dict[str, Any]) -> Pipeline:
    updates = {name: getattr(pipeline, name).model_copy(update=keys) for name, keys in sections.items()}
    return pipeline.model_copy(update=updates)


def test_a_run_trains_only_if_the_share_of_new_text_is_above_the_threshold(tiny: Pipeline, project: Path) -> None:
    asked = asking(tiny, retrain={"when": "share", "min_new_share": 0.2}, train={"max_steps": 5})
    assert run(asked)[0] in TRAINED
    (project / "text" / "two.txt").write_text(prose(2, 500))
    name, outcome = run(asked)
    assert name == "skipped"
    assert "of the text is new since version 1, no more than retrain.min_new_share 20.0%" in outcome.reason
    (project / "text" / "three.txt").write_text(prose(3, 9000))
    name, outcome = run(asked)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/2"


@pytest.mark.slow
def test_a_run_trains_only_if_the_champion_is_worse_on_the_new_text(tiny: Pipeline, project: Path) -> None:
    asked = asking(tiny, retrain={"when": "drift", "drift_margin": 0.5})
    run(asked)
    (project / "text" / "two.txt").write_text(prose(2, 2000))
    name, outcome = run(asked)
    assert name == "skipped" and "no more than retrain.drift_margin 0.5" in outcome.reason
    strange = "\n\n".join(" ".join("ZQXJVWK"[(i * j) % 7] * 3 + str(i * j) for j in range(20)) for i in range(60))
    (project / "text" / "two.txt").write_text(strange)
    name, outcome = run(asked)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/2"


def test_changed_settings_are_trained_under_any_policy_and_a_rejected_training_is_not_repeated(
    tiny: Pipeline, root: StateRoot, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = asking(tiny, retrain={"when": "share", "min_new_share": 0.9})
    run(strict)
    worse = asking(strict, train={"max_steps": 5, "optimizer": "muon"})
    name, outcome = run(worse)
    assert (name, outcome.uri) == ("rejected", "models:/gpt-tiny/2")
    changed = (
        "train.max_steps 60 -> 5, train.optimizer adamw -> muon; these are the defaults now: to keep the old ones,"
    )
    assert f"the settings are not those of version 1: {changed} set train.optimizer: adamw (" in caplog.text
    assert run(worse)[1].reason.startswith("nothing changed since version 2")
    with monkeypatch.context() as later_release:
        later_release.setattr(ingest, "CORPUS_VERSION", 99)
        assert run(worse)[1].reason.startswith("nothing changed since version 2"), "the same documents"
    # Back to the first settings: the newest training had others, but version 1 was trained with these.
    name, outcome = run(strict)
    assert name == "skipped" and "learned exactly this" in outcome.reason
    assert len(versions.list_versions(root, "gpt-tiny")) == 2


def test_another_number_of_cores_is_not_a_reason_to_train(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    auto = asking(tiny, train={"threads": "auto", "max_steps": 5})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    run(auto)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert run(auto)[0] == "skipped"
    run(asking(auto, train={"max_steps": 3}))
    assert "the settings are not those of version 1: train.max_steps 5 -> 3" in caplog.text
    assert "train.threads" not in caplog.text
    # Back to the first settings: version 1 was trained with these, on one core.
    name, outcome = run(auto)
    assert name == "skipped" and "learned exactly this" in outcome.reason


@pytest.mark.parametrize("tags", [{}, {"corpus_sha256": "f" * 64}], ids=["imported", "snapshot deleted"])
def test_the_drift_is_unknown_if_the_text_of_the_champion_is(
    tiny: Pipeline, root: StateRoot, tags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = ModelVersion("gpt-tiny", "1", 0, tags=[ModelVersionTag(*tag) for tag in tags.items()])
    monkeypatch.setattr(versions, "find_champion", lambda *_: champion)
    snapshot = ingest.ingest(tiny.corpus, root.corpora, root.project)
    drift, (_, why) = policy._measure_drift(root, tiny, snapshot, champion)
    assert drift is None and why.startswith("unknown")

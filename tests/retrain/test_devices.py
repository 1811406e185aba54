"""The device of a retraining: a missing one is refused at once, and scores are computed on the trainer's."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.versions import RegistryError
from flows.retrain import flow, policy, tasks
from flows.state.root import StateRoot
from gptcore.errors import DeviceMissing
from tests.retrain.test_policy import asking, run


@pytest.mark.usefixtures("prefect_server", "root")
def test_a_run_on_a_gpu_that_is_not_there_fails_before_it_reads_the_text(tiny: Pipeline, project: Path) -> None:
    with pytest.raises(DeviceMissing, match="device cuda: this machine has only cpu"):
        run(asking(tiny, train={"device": "cuda"}))
    assert not list((project / "mlruns").glob("corpora/*"))


def test_drift_and_gate_use_the_gpu_of_the_trainer(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked: list[str] = []

    def load(_root: StateRoot, _version: ModelVersion, device: str) -> Any:
        asked.append(device)
        raise RegistryError("the test needs no model")

    champion = ModelVersion("gpt-tiny", "1", 0, tags=[ModelVersionTag("corpus_sha256", "f" * 64)])
    monkeypatch.setattr(versions, "find_champion", lambda *_: champion)
    monkeypatch.setattr(policy, "load", load)
    monkeypatch.setattr(policy.manifest, "read_about", lambda _: {})
    monkeypatch.setattr(policy, "pick_new_blocks", lambda *_: [])
    retraining = flow._Retraining(tiny, root, False, False, False)
    policy._measure_drift(root, retraining.pipeline, cast(Any, SimpleNamespace(path=Path())), champion)
    monkeypatch.setattr(flow, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(tasks, "gate", lambda **given: asked.append(given["device"]))
    monkeypatch.setattr(tasks, "describe_verdict", lambda _: "")
    retraining.judge("2", cast(Any, None), cast(Any, None))
    assert asked == ["cuda", "cuda"]

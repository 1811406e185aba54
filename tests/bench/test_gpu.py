"""The benchmark of a GPU, at toy size on a CPU: every section works, and a promise that does not hold is named."""

import importlib.util
import json
import math
from pathlib import Path

import psutil
import pytest
import torch

from bench import gpu, gpu_sections
from tests import forks


def test_every_section_works_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(psutil, "Popen", forks.popen)
    monkeypatch.setattr(gpu_sections, "_has_transformers", lambda: False)
    file = tmp_path / "made" / "gpu.json"
    assert gpu.main(["--toy", "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "hf is left out: transformers is not installed" in printed
    for head in ("| toy ", "| toy, fp32, tokens/s ", "| every update is logged once ", "| largest difference "):
        assert head in printed
    ours, theirs = found["train"]["contenders"]
    assert (ours["name"], theirs["name"]) == ("ours", "nanogpt-style")
    padding = math.log(320 / 300)  # the vocabulary that nanoGPT pads makes the first guesses so much worse
    assert theirs["losses"][0] - ours["losses"][0] == pytest.approx(padding, abs=0.02)
    assert ours["losses"][1] < ours["losses"][0] and ours["share_of_matmul"] > 0
    assert [row["texts"] for row in found["generate"]["rows"]] == [1, 3]
    trainer = found["trainer"]
    assert trainer["was_killed"] and trainer["every_update_is_logged_once"] and trainer["repeated_updates"] > 0
    assert trainer["largest_difference_of_a_repeated_loss"] == 0, "on a CPU, a resumed training repeats its updates"
    assert len(found["score"]["bits_per_byte"]["cpu"]) == 2 and found["problems"] == []


@pytest.mark.deep
def test_hugging_faces_model_takes_part_if_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "gpu.json"
    assert gpu.main(["--toy", "--only", "train", "generate", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    _, style, hf = found["train"]["contenders"]
    assert hf["name"] == "hf" and hf["losses"] == pytest.approx(style["losses"], abs=0.01)
    assert all(row["same_tokens_as_hf"] == gpu_sections.TOY.new_tokens for row in found["generate"]["rows"])


def test_a_section_that_fails_leaves_the_others_and_a_promise_that_does_not_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_sections, "measure_training", lambda _: 1 / 0)
    monkeypatch.setattr(gpu_sections, "measure_scores", lambda *_: {"largest_difference": 0.002})
    assert gpu.main(["--toy", "--only", "train", "score", "--json", str(file)]) == 1
    said = ["train: failed, see the traceback", "score: the device differs from the CPU by 0.002 bits per byte"]
    assert json.loads(file.read_text())["problems"] == said
    assert all(line in capsys.readouterr().err for line in said[1:])
    trainer = {"was_killed": False, "exit_code": 1, "every_update_is_logged_once": False}
    assert len(gpu.list_problems("trainer", trainer)) == 3
    assert gpu.list_problems("train", {"contenders": [{"name": "hf", "error": "OutOfMemoryError: 80 GB"}]}) == [
        "train: hf failed: OutOfMemoryError: 80 GB"
    ]


def test_without_a_gpu_or_a_package_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "there is no CUDA GPU here" in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydantic" else find(name))
    assert gpu.main(["--toy"]) == 2
    assert "missing packages: pydantic" in capsys.readouterr().out

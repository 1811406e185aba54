"""Fixtures of the flow tests: a state root of their own, a tiny pipeline, and one Prefect server for all of them."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.pipelines import Pipeline, PipelinesFile
from flows.state import OPT_OUTS, StateRoot

WORDS = (
    "the a model learns from text and writes what comes next while every night new words arrive in many files".split()
)


def prose(seed: int, num_words: int = 3000) -> str:
    """Made-up English in paragraphs."""
    draw = random.Random(seed)
    sentences = [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 15))).capitalize() + "." for _ in range(num_words // 10)
    ]
    return "".join(sentence + ("\n\n" if draw.random() < 0.2 else " ") for sentence in sentences)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a text and a pipelines.yaml whose pipeline `tiny` trains in a second."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(prose(1))
    pipeline = {
        "corpus": {
            "sources": ["text"],
            "tokenizer": "bytes",
            "block_bytes": 256,
            "val_fraction": 0.15,
            "holdout_fraction": 0.15,
        },
        "model": {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 1},
        "train": {"max_steps": 60, "batch_size": 8, "learning_rate": 0.01, "eval_every": 20, "threads": 1},
        "sample": {"prompts": ["The model"], "temperatures": [0.0], "max_new_tokens": 20},
    }
    (tmp_path / "pipelines.yaml").write_text(yaml.safe_dump({"pipelines": {"tiny": pipeline}}))
    return tmp_path


@pytest.fixture
def root(project: Path, monkeypatch: pytest.MonkeyPatch) -> StateRoot:
    """The project's state root, entered by this process."""
    for name in ("GPTFLOW_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = StateRoot(project / "mlruns").create()
    monkeypatch.setenv("GPTFLOW_HOME", str(root.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", root.tracking_uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return root


@pytest.fixture
def tiny(project: Path) -> Pipeline:
    return PipelinesFile(project / "pipelines.yaml").pipeline("tiny")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a temporary database, shared by the tests of this process."""
    os.environ.update(OPT_OUTS)
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def gptflow(*arguments: str) -> list[str]:
    """The command line, as a command of this interpreter."""
    return [sys.executable, "-c", "from flows.cli import main; main()", *arguments]

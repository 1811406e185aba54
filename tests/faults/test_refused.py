"""Input that a trainer refuses: the checkpoint of another training, other tokens, code in place of weights."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from flows.registry.register import Candidate, register
from flows.state.root import StateRoot
from gptcore.errors import CheckpointError
from gptcore.evaluation.weights import load_model
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import RunDirectory
from tests.faults.dying import live
from tests.faults.kills import Twin, killed_at
from tests.faults.test_hostile_files import Payload
from tests.tiny import make_tokens
from tests.trainings import edit_config, prepare


@pytest.fixture
def run(tmp_path: Path, tokens: Tokens) -> RunDirectory:
    return prepare(tmp_path / "run", tokens)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Path:
    """The run directory of a training that was killed after a save. Tests copy it."""
    run = prepare(tmp_path_factory.mktemp("killed") / "run", tokens)
    assert killed_at(run, "after update 5 begins")
    return run.path


@pytest.fixture
def killed(tmp_path: Path, killed_once: Path) -> RunDirectory:
    """A training that was killed after its first save."""
    return RunDirectory(shutil.copytree(killed_once, tmp_path / "run"))


# Checkpoints of another training.


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "learning_rate", 0.02, "train.learning_rate is 0.01, this training has 0.02"),
        ("train", "seed", 7, "train.seed is 123, this training has 7"),
        ("model", "n_layers", 3, "model.n_layers is 2, this training has 3"),
        (None, "vocab_size", 300, "model.vocab_size is 257, this training has 300"),
    ],
)
def test_a_checkpoint_of_another_configuration_or_tokenizer_is_refused_with_key_and_both_values(
    killed: RunDirectory, section: str | None, key: str, value: Any, said: str
) -> None:
    edit_config(killed, section, key, value)
    life = live(killed)
    assert life.code == 1 and said in life.said and "Traceback" not in life.said
    assert isinstance(killed.read_failure(), CheckpointError)
    assert (killed.checkpoints / "step-00000004").exists()


def test_a_checkpoint_of_another_corpus_is_refused_with_both_identities(
    killed: RunDirectory, tokens: Tokens, tmp_path: Path
) -> None:
    other = make_tokens(tmp_path / "other", num_words=1100)
    edit_config(killed, None, "tokens", str(other.path))
    life = live(killed)
    assert life.code == 1 and f"has identity {other.sha256}, config.json expects {tokens.sha256}" in life.said
    edit_config(killed, None, "tokens_sha256", other.sha256)
    life = live(killed)
    assert life.code == 1 and f"tokens is '{tokens.sha256}', this training has '{other.sha256}'" in life.said


# Damaged weights.


def test_weights_damaged_after_the_training_are_neither_judged_nor_registered(
    run: RunDirectory, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    assert live(run).code == 0
    weights = bytearray(run.weights.read_bytes())
    weights[5000] ^= 1
    run.weights.write_bytes(weights)
    damaged = f"{run.weights} has sha256 .*: it was altered"
    with pytest.raises(CheckpointError, match=damaged):
        load_model(run, tokens, torch.device("cpu"))
    root = StateRoot(tmp_path / "mlruns").prepare()
    client = MlflowClient(root.tracking_uri)
    candidate = Candidate("gpt-m", "ab" * 32, 1, client.create_run(client.create_experiment("m")).info.run_id, {})
    with pytest.raises(CheckpointError, match=damaged):
        register(root, run, tokens, candidate)
    assert not client.search_registered_models() and not client.search_logged_models(["1"])


# Hostile checkpoints.


def test_a_pickle_planted_in_a_checkpoint_is_not_executed_and_the_training_ends_like_its_twin(
    tmp_path: Path, tokens: Tokens
) -> None:
    twin = Twin(tmp_path, "two epochs", tokens)
    run = twin.another()
    assert killed_at(run, "after update 12 begins")
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    pickle.loads(payload)
    (tmp_path / "executed").unlink()
    (run.checkpoints / "step-00000010" / "model.safetensors").write_bytes(payload)
    life = live(run)
    assert life.code == 0 and "checkpoint skipped" in life.said
    assert not (tmp_path / "executed").exists()
    twin.compare(run)

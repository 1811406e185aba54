"""Bundles: a loaded model answers as the saved one, a bundle holds no code, and damage is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import gptcore
from gptcore import bundle
from gptcore.errors import CheckpointError, TokenizerError
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer

CFG = {
    "vocab_size": 257,
    "context_length": 16,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.5,
    "qkv_bias": True,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPTModel(CFG).eval()


@pytest.fixture
def directory(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / "bundle"
    path.mkdir()
    lineage = {"seed": 123, "corpus_sha256": "ab" * 32}
    bundle.write_bundle(path, CFG, tmp_path / "weights.safetensors", get_tokenizer("bytes"), lineage)
    return path


def test_a_loaded_bundle_gives_the_same_logits_and_the_same_tokens(directory, model):
    loaded = bundle.load(directory)
    text = "Grüße, a line\n"
    assert loaded.tokenizer.encode(text) == get_tokenizer("bytes").encode(text)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    ids = torch.tensor([loaded.tokenizer.encode(text)])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), model(ids))
    assert not loaded.model.training


def test_a_bundle_can_be_moved_and_its_path_may_be_a_string(directory, model):
    moved = directory.rename(directory.with_name("elsewhere"))
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(gptcore.load(str(moved)).model(ids), model(ids))
    assert gptcore.load(moved).cfg == CFG


def test_a_bundle_holds_its_lineage_and_no_pickle(directory):
    assert json.loads((directory / "lineage.json").read_text())["seed"] == 123
    assert json.loads((directory / "config.json").read_text()) == CFG
    assert {path.suffix for path in directory.rglob("*") if path.is_file()} <= {".json", ".safetensors"}


def without_key(path):
    path.write_text(json.dumps({key: value for key, value in CFG.items() if key != "n_heads"}))


DAMAGES = {
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "weights empty": lambda path: os.truncate(path / "model.safetensors", 0),
    "weights truncated": lambda path: os.truncate(path / "model.safetensors", 2000),
    "weights of another shape": lambda path: save_file(
        GPTModel({**CFG, "emb_dim": 8}).state_dict(), path / "model.safetensors"
    ),
    "config missing": lambda path: (path / "config.json").unlink(),
    "config truncated": lambda path: os.truncate(path / "config.json", 30),
    "config binary": lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config without a key": lambda path: without_key(path / "config.json"),
    "config of another type": lambda path: (path / "config.json").write_text(json.dumps({**CFG, "n_heads": "2"})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_with_its_path(directory, damage):
    DAMAGES[damage](directory)
    with pytest.raises(CheckpointError, match=f"the bundle {directory} cannot be loaded"):
        bundle.load(directory)


def test_a_bundle_that_does_not_exist_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere cannot be loaded"):
        bundle.load(tmp_path / "nowhere")


def test_a_damaged_vocabulary_raises_a_tokenizer_error(directory):
    for path in (directory / "tokenizer").rglob("*"):
        os.truncate(path, 5)
    with pytest.raises(TokenizerError):
        bundle.load(directory)

"""Bundles: a loaded model answers as the saved one, a bundle holds no code, and damage is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import gptcore
from gptcore import bundle, manifest
from gptcore.errors import CheckpointError, TokenizerError
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import VOCABULARY, get_tokenizer
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "drop_rate": 0.5, "qkv_bias": True}


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
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_bundle_is_refused_with_its_path(directory, damage, has_manifest):
    if not has_manifest:
        (directory / "manifest.json").unlink()
    DAMAGES[damage](directory)
    with pytest.raises(CheckpointError, match=f"the bundle {directory} cannot be loaded"):
        bundle.load(directory)


def test_a_bundle_that_does_not_exist_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere cannot be loaded"):
        bundle.load(tmp_path / "nowhere")


ALTERATIONS = {
    "config.json": lambda data: json.dumps({**json.loads(data), "n_heads": 8}).encode(),
    "lineage.json": lambda data: data.replace(b"123", b"124"),
    "model.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 64]),
    f"tokenizer/{VOCABULARY}": lambda data: data + b" ",
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_file_that_was_altered_but_can_still_be_read_is_refused(directory, name):
    assert sorted(ALTERATIONS) == manifest.list_files(directory)
    bundle.load(directory)
    path = directory / name
    path.write_bytes(ALTERATIONS[name](path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"the bundle {directory} cannot be loaded: {path} .* it was altered"):
        bundle.load(directory)


def test_the_card_may_be_edited_and_a_bundle_of_an_earlier_release_has_no_manifest(directory, model):
    (directory / bundle.CARD).write_text("license: MIT")
    bundle.load(directory)
    (directory / "manifest.json").unlink()
    bundle.load(directory)


def test_a_damaged_vocabulary_raises_a_tokenizer_error(directory):
    (directory / "manifest.json").unlink()
    for path in (directory / "tokenizer").rglob("*"):
        os.truncate(path, 5)
    with pytest.raises(TokenizerError):
        bundle.load(directory)

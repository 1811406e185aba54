"""Which version is served: the champion moves while it is followed, is damaged, or cannot be looked up."""

import pytest
from mlflow import MlflowClient

from flows.releases.registry import UnknownVersion, bundle_path
from flows.serving.following import Following
from flows.state import StateRoot
from gptcore.errors import CheckpointError
from tests.fixtures import TinyRegistry

CHAMPION = "models:/gpt-tiny@champion"


@pytest.fixture
def champion(tiny_registry: TinyRegistry) -> TinyRegistry:
    """Two versions, the first of which is champion."""
    for _ in range(2):
        tiny_registry.register()
    move(tiny_registry.root, "1")
    return tiny_registry


def move(root: StateRoot, version: str) -> None:
    MlflowClient(root.tracking_uri).set_registered_model_alias("gpt-tiny", "champion", version)


def damage(root: StateRoot, version: str) -> None:
    weights = bundle_path(root, "gpt-tiny", version) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def test_a_moved_champion_is_served_at_the_next_look(champion: TinyRegistry) -> None:
    following = Following(champion.root, CHAMPION)
    before = following.served
    following.look()
    assert following.served is before
    move(champion.root, "2")
    following.look()
    assert (following.served.id, following.problem) == ("gpt-tiny/2", None)
    assert "gpt-tiny/2" in following.names and "gpt-tiny/1" not in following.names
    assert following.served.fingerprint != before.fingerprint


def test_a_champion_that_cannot_be_loaded_leaves_the_one_before_until_its_files_are_back(
    champion: TinyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = Following(champion.root, CHAMPION)
    weights = bundle_path(champion.root, "gpt-tiny", "2") / "model.safetensors"
    intact = weights.read_bytes()
    damage(champion.root, "2")
    move(champion.root, "2")
    for _ in range(2):
        following.look()
        assert following.served.id == "gpt-tiny/1"
        assert "models:/gpt-tiny/2 cannot be loaded" in str(following.problem)
        assert "it was altered" in str(following.problem)
    weights.write_bytes(intact)
    following.look()
    assert following.served.id == "gpt-tiny/1", "it is not read again at every look"
    monkeypatch.setattr("flows.serving.following.AGAIN_SECONDS", 0.0)
    following.look()
    assert (following.served.id, following.problem) == ("gpt-tiny/2", None)


def test_a_registry_that_is_away_or_an_alias_that_is_gone_changes_nothing_but_is_said(
    champion: TinyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = Following(champion.root, CHAMPION)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        following.look()
        assert following.served.id == "gpt-tiny/1" and "127.0.0.1" in str(following.problem)
    following.look()
    assert following.problem is None
    MlflowClient(champion.root.tracking_uri).delete_registered_model_alias("gpt-tiny", "champion")
    following.look()
    assert following.served.id == "gpt-tiny/1" and "does not exist" in str(following.problem)


def test_what_cannot_be_served_in_the_beginning_is_an_error(champion: TinyRegistry) -> None:
    with pytest.raises(UnknownVersion, match="models:/gpt-tiny/3 does not exist"):
        Following(champion.root, "models:/gpt-tiny/3")
    damage(champion.root, "1")
    with pytest.raises(CheckpointError, match="it was altered"):
        Following(champion.root, CHAMPION)


def test_weights_of_8_bits_are_served_too(champion: TinyRegistry) -> None:
    served = Following(champion.root, "models:/gpt-tiny/2", "int8").served
    assert type(served.loaded.model.out_head).__name__ == "Int8Linear"

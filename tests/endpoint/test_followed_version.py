"""Which version is served when the champion changes, is damaged or cannot be looked up."""

import pytest
from mlflow import MlflowClient

from flows.endpoint.followed_version import FollowedVersion
from flows.endpoint.server import complete_uri
from flows.registry.versions import UnknownVersion, fetch_bundle
from flows.state.root import StateRoot
from gptcore.errors import CheckpointError
from tests.fixtures import TinyRegistry

CHAMPION = "models:/gpt-tiny@champion"


@pytest.fixture
def champion(tiny_registry: TinyRegistry) -> TinyRegistry:
    """Two versions, the first of which is the champion."""
    for _ in range(2):
        tiny_registry.register()
    move(tiny_registry.root, "1")
    return tiny_registry


def move(root: StateRoot, version: str) -> None:
    MlflowClient(root.tracking_uri).set_registered_model_alias("gpt-tiny", "champion", version)


def damage(root: StateRoot, version: str) -> None:
    weights = fetch_bundle(root, "gpt-tiny", version) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def test_a_bare_name_means_the_champion_and_is_followed() -> None:
    for given in ("gpt-tiny", "models:/gpt-tiny", "gpt-tiny@champion", "models:/gpt-tiny@champion"):
        assert complete_uri(given) == "models:/gpt-tiny@champion"
    assert complete_uri("gpt-tiny/7") == complete_uri("models:/gpt-tiny/7") == "models:/gpt-tiny/7"


def test_a_new_champion_is_served_after_the_next_update(champion: TinyRegistry) -> None:
    followed = FollowedVersion(champion.root, CHAMPION)
    before = followed.current
    followed.update()
    assert followed.current is before
    move(champion.root, "2")
    followed.update()
    assert (followed.current.id, followed.problem) == ("gpt-tiny/2", None)
    assert "gpt-tiny/2" in followed.names and "gpt-tiny/1" not in followed.names
    assert followed.current.fingerprint != before.fingerprint


def test_the_previous_champion_is_served_until_the_files_of_a_damaged_one_are_restored(
    champion: TinyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = FollowedVersion(champion.root, CHAMPION)
    weights = fetch_bundle(champion.root, "gpt-tiny", "2") / "model.safetensors"
    intact = weights.read_bytes()
    damage(champion.root, "2")
    move(champion.root, "2")
    for _ in range(2):
        followed.update()
        assert followed.current.id == "gpt-tiny/1"
        assert "models:/gpt-tiny/2 cannot be loaded" in str(followed.problem)
        assert "it was altered" in str(followed.problem)
    weights.write_bytes(intact)
    followed.update()
    assert followed.current.id == "gpt-tiny/1", "the bundle is not read again at every update"
    monkeypatch.setattr("flows.endpoint.followed_version.RELOAD_SECONDS", 0.0)
    followed.update()
    assert (followed.current.id, followed.problem) == ("gpt-tiny/2", None)


def test_an_unreachable_registry_or_a_deleted_alias_is_reported_and_changes_nothing(
    champion: TinyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = FollowedVersion(champion.root, CHAMPION)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        followed.update()
        assert followed.current.id == "gpt-tiny/1" and "127.0.0.1" in str(followed.problem)
    followed.update()
    assert followed.problem is None
    MlflowClient(champion.root.tracking_uri).delete_registered_model_alias("gpt-tiny", "champion")
    followed.update()
    assert followed.current.id == "gpt-tiny/1" and "does not exist" in str(followed.problem)


def test_a_version_that_cannot_be_served_at_the_start_is_an_error(champion: TinyRegistry) -> None:
    with pytest.raises(UnknownVersion, match="models:/gpt-tiny/3 does not exist"):
        FollowedVersion(champion.root, "models:/gpt-tiny/3")
    damage(champion.root, "1")
    with pytest.raises(CheckpointError, match="it was altered"):
        FollowedVersion(champion.root, CHAMPION)


def test_a_version_can_be_served_with_8_bit_weights(champion: TinyRegistry) -> None:
    served = FollowedVersion(champion.root, "models:/gpt-tiny/2", "cpu", "int8").current
    assert type(served.loaded.model.out_head).__name__ == "Int8Linear"

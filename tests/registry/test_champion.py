"""Promotion, rollback and the log of moves, on a real SQLite registry, with crashes and changes made in MLflow."""

from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.registry import versions
from flows.registry.champion import GATE, NoPrevious, complete_log, explain_withdrawal, promote, read_moves, rollback
from flows.registry.moves import trace_champions
from flows.registry.versions import RegistryError, UnknownVersion
from flows.state.root import StateRoot

MODEL = "gpt-tiny"


def current(root: StateRoot) -> str | None:
    found = versions.find_champion(root, MODEL)
    return None if found is None else str(found.version)


def log(root: StateRoot) -> list[tuple[str | None, str | None, str]]:
    """Complete the log of moves and return it."""
    complete_log(root, MODEL)
    return [(move.source, move.target, move.kind) for move in read_moves(root, MODEL)]


def promoted(tiny_registry: Any, count: int) -> StateRoot:
    """Return a registry whose versions 1 to `count` were promoted by the gate, one after another."""
    for version in range(1, count + 1):
        tiny_registry.register()
        over = str(version - 1) if version > 1 else None
        promote(tiny_registry.root, MODEL, str(version), f"night {version}", GATE, over=over)
    return tiny_registry.root


def test_each_rollback_goes_one_champion_further_back_and_never_forward(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 3)
    assert (rollback(root, MODEL, "writes nonsense", "ann").target, current(root)) == ("2", "2")
    assert (rollback(root, MODEL, "so does this", "ann").target, current(root)) == ("1", "1")
    with pytest.raises(NoPrevious, match="no earlier champion to go back to; the champion is version 1"):
        rollback(root, MODEL, "and this", "ann")
    assert current(root) == "1"
    assert log(root)[-2:] == [("3", "2", "rolled back"), ("2", "1", "rolled back")]
    assert [move.reason for move in read_moves(root, MODEL)][-2:] == ["writes nonsense", "so does this"]


def test_a_rollback_after_a_new_promotion_restores_the_champion_that_the_promotion_replaced(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 3)
    rollback(root, MODEL, "bad", "ann")
    tiny_registry.register()
    promote(root, MODEL, "4", "better", GATE, over="2")
    assert MlflowClient(root.tracking_uri).get_model_version_by_alias(MODEL, "previous").version == 2
    assert [rollback(root, MODEL, "bad too", "ann").target for _ in range(2)] == ["2", "1"]


def test_the_gate_does_not_promote_withdrawn_weights_but_promotes_better_ones(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 2)
    rollback(root, MODEL, "swears", "ann")
    tiny_registry.register(weights_of=2)
    for version in ("2", "3"):
        assert "was rolled back by ann: swears" in str(explain_withdrawal(root, MODEL, version))
        with pytest.raises(RegistryError, match=r"is not promoted: .*rolled back by ann: swears"):
            promote(root, MODEL, version, "scores best", GATE, over="1")
    assert current(root) == "1"
    tiny_registry.register()
    assert explain_withdrawal(root, MODEL, "4") is None
    promote(root, MODEL, "4", "better", GATE, over="1")
    assert current(root) == "4"


def test_withdrawn_weights_stay_withdrawn_when_their_version_is_deleted(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 2)
    rollback(root, MODEL, "swears", "ann")
    tiny_registry.register(weights_of=2)
    MlflowClient(root.tracking_uri).delete_model_version(MODEL, "2")
    assert "version 2, which has the same weights," in str(explain_withdrawal(root, MODEL, "3"))


def test_a_person_can_promote_a_withdrawn_version_and_its_weights_are_no_longer_withdrawn(
    tiny_registry: Any,
) -> None:
    root = promoted(tiny_registry, 2)
    rollback(root, MODEL, "swears", "ann")
    tiny_registry.register(weights_of=2)
    client = MlflowClient(root.tracking_uri)
    assert client.get_model_version(MODEL, "2").tags["withdrawn"] == "ann: swears"
    move = promote(root, MODEL, "2", "it was the prompt", "bob")
    assert move is not None and (move.kind, move.by) == ("promoted by a person", "bob")
    assert "withdrawn" not in client.get_model_version(MODEL, "2").tags
    assert explain_withdrawal(root, MODEL, "2") is None and explain_withdrawal(root, MODEL, "3") is None
    assert rollback(root, MODEL, "no, it was not", "bob").target == "1"


def test_a_rollback_skips_versions_that_were_rolled_back_before(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 3)
    promote(root, MODEL, "2", "was nicer", "ann")
    assert [rollback(root, MODEL, "no", "ann").target for _ in range(2)] == ["3", "1"]


def test_promoting_the_champion_changes_nothing(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 1)
    assert promote(root, MODEL, "1", "again", "ann") is None
    assert len(read_moves(root, MODEL)) == 1


def test_the_gate_does_not_replace_a_champion_that_it_did_not_compare_with(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 2)
    tiny_registry.register()
    with pytest.raises(RegistryError, match="compared with version 1, but by now the champion is 2"):
        promote(root, MODEL, "3", "better than 1", GATE, over="1")
    assert current(root) == "2"


def test_unknown_versions_and_models_are_refused_by_name(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 1)
    with pytest.raises(UnknownVersion, match="models:/gpt-tiny/7 does not exist; gpt-tiny has versions 1"):
        promote(root, MODEL, "7", "why not", "ann")
    for ask in (lambda: promote(root, "nobody", "1", "x", "ann"), lambda: rollback(root, "nobody", "x", "ann")):
        with pytest.raises(UnknownVersion, match="no registered model 'nobody'"):
            ask()


def test_a_version_that_cannot_be_loaded_does_not_become_champion(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 2)
    weights = versions.fetch_bundle(root, MODEL, "1") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    for ask in (lambda: promote(root, MODEL, "1", "x", "ann"), lambda: rollback(root, MODEL, "x", "ann")):
        with pytest.raises(RegistryError, match="models:/gpt-tiny/1 cannot be loaded, and nothing is promoted"):
            ask()
    assert current(root) == "2" and len(read_moves(root, MODEL)) == 2


@pytest.mark.parametrize("when", ["before the alias", "after the alias", "before the completion"])
@pytest.mark.parametrize("kind", ["promoted by a person", "rolled back"])
def test_a_killed_promotion_or_rollback_is_completed_once_by_the_next_call(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch, when: str, kind: str
) -> None:
    root = promoted(tiny_registry, 3)
    tiny_registry.register()

    def ask() -> object:
        return promote(root, MODEL, "4", "x", "ann") if kind != "rolled back" else rollback(root, MODEL, "x", "ann")

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill(patched, when)
        ask()
    assert current(root) in ("3", "4" if kind != "rolled back" else "2")
    ask()
    expected = ("3", "4", kind) if kind != "rolled back" else ("3", "2", kind)
    assert current(root) == expected[1]
    assert log(root)[3:] == [expected]
    assert all(move.is_done for move in read_moves(root, MODEL))
    assert ("withdrawn" in MlflowClient(root.tracking_uri).get_model_version(MODEL, "3").tags) == (
        kind == "rolled back"
    )


def kill(patched: pytest.MonkeyPatch, when: str) -> None:
    """Make the next promotion or rollback end at this point, like a killed process."""
    client = MlflowClient
    if when == "before the completion":
        patched.setattr("flows.registry.champion._ChampionLog._complete", raises)
    elif when == "before the alias":
        patched.setattr(client, "set_registered_model_alias", raises)
    else:
        really: Callable[..., None] = client.set_registered_model_alias

        def moved_then_killed(*arguments: object) -> None:
            really(*arguments)
            raise KeyboardInterrupt

        patched.setattr(client, "set_registered_model_alias", moved_then_killed)


def raises(*_: object) -> None:
    raise KeyboardInterrupt


def test_settling_the_log_completes_a_killed_rollback_and_reading_the_log_does_not(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = promoted(tiny_registry, 2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill(patched, "before the alias")
        rollback(root, MODEL, "x", "ann")
    assert not read_moves(root, MODEL)[-1].is_done
    assert current(root) == "2"
    completed = complete_log(root, MODEL)
    assert completed is not None and completed.kind == "rolled back" and complete_log(root, MODEL) is None
    assert log(root)[-1] == ("2", "1", "rolled back")
    assert current(root) == "1"


def test_an_unfinished_rollback_is_dropped_if_the_alias_was_moved_elsewhere(
    tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = promoted(tiny_registry, 3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill(patched, "before the alias")
        rollback(root, MODEL, "x", "ann")
    MlflowClient(root.tracking_uri).set_registered_model_alias(MODEL, "champion", "1")
    assert log(root)[3:] == [("3", "1", "moved outside")]
    assert current(root) == "1"


def test_a_change_of_champion_in_mlflow_is_logged_by_the_next_call_and_can_be_rolled_back(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 2)
    tiny_registry.register()
    client = MlflowClient(root.tracking_uri)
    client.set_registered_model_alias(MODEL, "champion", "3")
    assert log(root)[2:] == [("2", "3", "moved outside")]
    assert len(log(root)) == 3
    assert rollback(root, MODEL, "x", "ann").target == "2"
    client.delete_registered_model_alias(MODEL, "champion")
    assert log(root)[4:] == [("2", None, "moved outside")]
    assert rollback(root, MODEL, "who did that?", "ann").target == "2"
    assert trace_champions(read_moves(root, MODEL)) == ["1", "2"]


def test_the_log_of_an_older_registry_begins_with_its_current_champion(tiny_registry: Any) -> None:
    root = tiny_registry.root
    tiny_registry.register()
    MlflowClient(root.tracking_uri).set_registered_model_alias(MODEL, "champion", "1")
    assert log(root) == [(None, "1", "moved outside")]


def test_a_damaged_entry_of_the_log_is_named(tiny_registry: Any) -> None:
    root = promoted(tiny_registry, 1)
    MlflowClient(root.tracking_uri).set_registered_model_tag(MODEL, "move-000001", "{}")
    with pytest.raises(RegistryError, match="the tag move-000001 of the registered model gpt-tiny is damaged"):
        rollback(root, MODEL, "x", "ann")

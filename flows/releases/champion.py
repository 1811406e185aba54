"""Moving the champion: promotion, rollback, and the log of both. Nothing else moves the alias.

A move is written into the log before the alias moves and completed afterwards, so whoever looks next after a crash
finishes it: `settle`, which every call here begins with. It also notices that somebody moved the alias in MLflow itself
and writes that down. What the log means stands in moves.py. The alias `previous` and the tag `withdrawn` are the log's
conclusions, kept where people see them. Prefect hears of each move that was carried out here (events.py).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.releases.moves import Kind, Move, previous, read, withdrawn
from flows.releases.registry import CHAMPION, RegistryError, UnknownVersion, versions
from flows.service import events
from flows.sharing import advisory
from flows.state import StateRoot
from gptcore.errors import GPTCoreError

GATE = "gate"
"""Who promotes automatically. Everybody else is a person."""
PREVIOUS = "previous"
WITHDRAWN = "withdrawn"
ANY = ""
"""Whichever version is champion."""


class NoPrevious(GPTCoreError):
    """A rollback has nowhere to go."""

    exit_code = 2


def promote(root: StateRoot, model: str, version: str, reason: str, by: str, over: str | None = ANY) -> Move | None:
    """Makes `version` champion and returns the move; None if it is the champion already.

    `by` is GATE or a person. The gate names the champion that it compared with as `over` (None: there was none), and
    does not promote weights that were withdrawn. A person may: that takes the withdrawal back. Raises UnknownVersion,
    and RegistryError if the version cannot be loaded or the gate's comparison is out of date: then nothing moves.
    """
    with _settled(root, model) as (log, _):
        found = log.loadable(version)
        if log.current == version:
            return None
        if by != GATE:
            return log.move(found, "promoted by a person", reason, by)
        if over not in (ANY, log.current):
            raise RegistryError(
                f"models:/{model}/{version} was compared with version {over or '(none)'}, but by now the champion is "
                f"{log.current or '(none)'}. Nothing is promoted; the next run compares again."
            )
        if (why := log.withdrawal(found)) is not None:
            raise RegistryError(f"models:/{model}/{version} is not promoted: {why}")
        return log.move(found, "promoted", reason, by)


def rollback(root: StateRoot, model: str, reason: str, by: str) -> Move:
    """Goes back to the champion before the current one's promotion, and withdraws the current one.

    A rollback that was killed half-way is completed instead, so asking again after a crash is still one step back.
    Raises UnknownVersion for an unknown model, NoPrevious where there is nowhere to go, and RegistryError if the
    version to go back to cannot be loaded: then nothing moves.
    """
    with _settled(root, model) as (log, completed):
        if completed is not None and completed.kind == "rolled back":
            return completed
        if (version := previous(log.moves)) is None:
            raise NoPrevious(
                f"{model} has no earlier champion to go back to; the champion is version {log.current or '(none)'}. "
                f"`gptflow models {model}` lists versions, `gptflow promote {model} VERSION` takes another one."
            )
        return log.move(log.loadable(version), "rolled back", reason, by)


def moves(root: StateRoot, model: str) -> list[Move]:
    """The log of moves, oldest first, settled. Raises UnknownVersion for an unknown model."""
    with unmoved(root, model) as log:
        return log


def withdrawal(root: StateRoot, model: str, version: str) -> str | None:
    """Why the gate must not promote the version, in a sentence, if it or its weights were rolled back."""
    with _settled(root, model) as (log, _):
        return log.withdrawal(log.version(version))


@contextmanager
def unmoved(root: StateRoot, model: str) -> Iterator[list[Move]]:
    """The settled log. While this lasts nobody moves the champion (through gptflow, on this machine)."""
    with _settled(root, model) as (log, _):
        yield log.moves


@contextmanager
def _settled(root: StateRoot, model: str) -> Iterator[tuple["_Log", Move | None]]:
    """The model's log, settled and ours alone; and the interrupted move that was completed to get there."""
    # Not .lock: that ending belongs to pipelines, and a pipeline's run waits here while it holds its own.
    carried_out: list[Move] = []
    try:
        with root.hold(root.path / "locks" / f"{quote(model, safe='')}.champion", overlap="wait"):
            log = _Log(root, model, carried_out)
            yield log, log.settle()
    except MlflowException as error:
        raise RegistryError(f"the registry at {root.tracking_address} does not answer: {error}") from None
    finally:
        for move in carried_out:
            events.model_promoted(model, move.as_dict(), _pipeline_of(root, model, move))


def _pipeline_of(root: StateRoot, model: str, move: Move) -> str | None:
    """The pipeline that made the version, as its MLflow run says; None where that is unknown."""
    client = MlflowClient(root.tracking_uri)
    with suppress(MlflowException):
        found = client.get_model_version(model, str(move.target))
        return client.get_run(str(found.run_id)).data.tags.get("pipeline")
    return None


class _Log:
    """A registered model's log of moves, and the alias that it speaks of."""

    def __init__(self, root: StateRoot, model: str, carried_out: list[Move]) -> None:
        self.root, self.model, self.carried_out = root, model, carried_out
        self.client = MlflowClient(root.tracking_uri)
        try:
            registered = self.client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                versions(root, model)  # names the models that there are
            raise
        self.moves = read(model, registered.tags)
        self.aliases = {alias: str(version) for alias, version in registered.aliases.items()}

    @property
    def current(self) -> str | None:
        """The version that the alias names; None if there is no champion."""
        return self.aliases.get(CHAMPION)

    def settle(self) -> Move | None:
        """Completes a move that was interrupted, and returns it; writes down a move that was made in MLflow itself."""
        completed = None
        if self.moves and not self.moves[-1].is_done:
            completed = self._resume(self.moves.pop())
        logged = self.moves[-1].target if self.moves else None
        if self.current != logged:
            found = self._existing(self.current)
            outside = self._new(found, "moved outside", "found so; the alias was not moved by gptflow", "unknown")
            self._complete(replace(outside, source=logged))
        return completed

    def move(self, found: ModelVersion, kind: Kind, reason: str, by: str) -> Move:
        """Intent, alias, completion."""
        move = self._new(found, kind, reason, by)
        self._write(move)
        return self._carry_out(move)

    def loadable(self, version: str) -> ModelVersion:
        """The version, once its bundle has been loaded. Raises UnknownVersion, RegistryError."""
        found = self.version(version)
        from flows.releases.loading import load  # torch: seconds that a wrong version need not wait for

        load(self.root, found)
        return found

    def version(self, version: str) -> ModelVersion:
        """Looks a version up. Raises UnknownVersion."""
        if (found := self._existing(version)) is None:
            known = ", ".join(str(there.version) for there in versions(self.root, self.model))
            raise UnknownVersion(f"models:/{self.model}/{version} does not exist; {self.model} has versions {known}.")
        return found

    def withdrawal(self, found: ModelVersion) -> str | None:
        """Why these weights are not to be promoted automatically, if they were rolled back."""
        own, weights = str(found.version), found.tags.get("weights_sha256")
        for version, move in withdrawn(self.moves).items():
            if version == own or (weights and weights == move.weights):
                which = "it" if version == own else f"version {version}, which has the same weights,"
                return f"{which} was rolled back by {move.by}: {move.reason}"
        return None

    def _resume(self, move: Move) -> Move | None:
        if self.current == move.target or (self.current == move.source and self._existing(move.target)):
            return self._carry_out(move)
        # Somebody has moved the alias elsewhere or deleted the version since: the move did not take place.
        self.client.delete_registered_model_tag(self.model, move.tag)
        return None

    def _carry_out(self, move: Move) -> Move:
        assert move.target is not None, "only people in MLflow take the alias away"
        if self.current != move.target:
            advisory.ensure_held()
            self.client.set_registered_model_alias(self.model, CHAMPION, move.target)
            self.aliases[CHAMPION] = move.target
        done = self._complete(move)
        self.carried_out.append(done)
        return done

    def _complete(self, move: Move) -> Move:
        """Shows the move's consequences on the versions, then marks it as done."""
        done = replace(move, is_done=True)
        before, after = withdrawn(self.moves), withdrawn([*self.moves, done])
        for version in before.keys() - after.keys():
            if (found := self._existing(version)) is not None and WITHDRAWN in found.tags:
                self.client.delete_model_version_tag(self.model, version, WITHDRAWN)
        for version in after.keys() - before.keys():
            if self._existing(version) is not None:
                self.client.set_model_version_tag(self.model, version, WITHDRAWN, f"{done.by}: {done.reason}")
        self.moves.append(done)
        self._show_previous()
        self._write(done)
        return done

    def _show_previous(self) -> None:
        version = previous(self.moves)
        if version is not None and self._existing(version) is not None:
            self.client.set_registered_model_alias(self.model, PREVIOUS, version)
        elif PREVIOUS in self.aliases:
            self.client.delete_registered_model_alias(self.model, PREVIOUS)

    def _new(self, found: ModelVersion | None, kind: Kind, reason: str, by: str) -> Move:
        subject = self._existing(self.current) if kind == "rolled back" else found
        return Move(
            number=self.moves[-1].number + 1 if self.moves else 1,
            source=self.current,
            target=None if found is None else str(found.version),
            kind=kind,
            reason=reason,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            by=by,
            weights=None if subject is None else subject.tags.get("weights_sha256"),
        )

    def _write(self, move: Move) -> None:
        self.client.set_registered_model_tag(self.model, move.tag, json.dumps(move.as_dict()))

    def _existing(self, version: str | None) -> ModelVersion | None:
        if version is None:
            return None
        try:
            return self.client.get_model_version(self.model, version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

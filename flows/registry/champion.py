"""The champion: promotion, rollback, and the log of both. No other module moves the alias `champion`.

A promotion or rollback is written to the log before the alias moves, and marked as done afterwards. If the process is
killed in between, the next call completes it: `promote`, `rollback` and `hold_champion` call `complete_log` first. If
somebody has moved the alias in MLflow itself, `complete_log` records that move too. See moves.py for what the log
means. The alias `previous` and the tag `withdrawn` show the log's conclusions to people. Prefect receives an event for
each move that was carried out here (events.py).
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

from flows.notifications import events
from flows.registry.moves import Kind, Move, find_previous, find_withdrawn, parse_moves
from flows.registry.tags import VersionTags
from flows.registry.versions import CHAMPION, RegistryError, UnknownVersion, list_registered, list_versions
from flows.state import postgres_lock
from flows.state.root import StateRoot
from gptcore.errors import GPTCoreError

GATE = "gate"
"""Actor of automatic promotions. Every other actor is a person."""
PREVIOUS = "previous"
WITHDRAWN = "withdrawn"
ANY = ""
"""Any version may be the champion."""


class NoPrevious(GPTCoreError):
    """There is no earlier champion to roll back to."""

    exit_code = 2


def promote(root: StateRoot, model: str, version: str, reason: str, by: str, over: str | None = ANY) -> Move | None:
    """Make `version` champion and return the move. None if the version is the champion already.

    `by` is GATE or a person. The gate passes as `over` the champion that it compared with (None: there was none), and
    does not promote withdrawn weights. A person may promote them, which takes the withdrawal back. Raises
    UnknownVersion. Raises RegistryError if the version cannot be loaded or if the champion has changed since the gate's
    comparison; then the champion stays.
    """
    with _open_log(root, model) as log:
        log.complete_log()
        candidate = log.get_loadable_version(version)
        if log.champion == version:
            return None
        if by != GATE:
            return log.move_champion(candidate, "promoted by a person", reason, by)
        if over not in (ANY, log.champion):
            raise RegistryError(
                f"models:/{model}/{version} was compared with version {over or '(none)'}, but by now the champion is "
                f"{log.champion or '(none)'}. Nothing is promoted; the next run compares again."
            )
        if (why := log.explain_withdrawal(candidate)) is not None:
            raise RegistryError(f"models:/{model}/{version} is not promoted: {why}")
        return log.move_champion(candidate, "promoted", reason, by)


def rollback(root: StateRoot, model: str, reason: str, by: str) -> Move:
    """Go back to the champion before the current one's promotion, and withdraw the current one.

    If an earlier rollback was killed half-way, complete that one instead. So repeating the command after a crash still
    goes back only one step.

    Raises UnknownVersion for an unknown model and NoPrevious if there is no earlier champion. Raises RegistryError if
    the earlier champion cannot be loaded; then the champion stays.
    """
    with _open_log(root, model) as log:
        completed = log.complete_log()
        if completed is not None and completed.kind == "rolled back":
            return completed
        if (version := find_previous(log.moves)) is None:
            raise NoPrevious(
                f"{model} has no earlier champion to go back to; the champion is version {log.champion or '(none)'}. "
                f"`gptflow models {model}` lists versions, `gptflow promote {model} VERSION` takes another one."
            )
        return log.move_champion(log.get_loadable_version(version), "rolled back", reason, by)


def complete_log(root: StateRoot, model: str) -> Move | None:
    """Complete an interrupted promotion or rollback, and record a champion that was set in MLflow itself.

    Return the move that was completed, None if none was. Raises UnknownVersion for an unknown model.
    """
    with _open_log(root, model) as log:
        return log.complete_log()


def complete_logs(root: StateRoot, model: str | None = None) -> None:
    """Call `complete_log` for one model or for all models, but only if the log is not complete. Takes one query."""
    for registered in list_registered(root, model):
        moves = parse_moves(registered.name, registered.tags)
        is_done = not moves or moves[-1].is_done
        logged = moves[-1].target if moves else None
        champion = registered.aliases.get(CHAMPION)
        if not is_done or logged != (None if champion is None else str(champion)):
            complete_log(root, registered.name)


def read_moves(root: StateRoot, model: str) -> list[Move]:
    """Return the log of moves, oldest first, without writing. Its last move may be interrupted: see `complete_log`.

    Raises UnknownVersion for an unknown model.
    """
    with _open_log(root, model) as log:
        return log.moves


def explain_withdrawal(root: StateRoot, model: str, version: str) -> str | None:
    """Return, in a sentence, why the gate must not promote the version: it or its weights were rolled back.

    None if the gate may promote the version. Raises UnknownVersion.
    """
    with _open_log(root, model) as log:
        return log.explain_withdrawal(log.get_version(version))


@contextmanager
def hold_champion(root: StateRoot, model: str) -> Iterator[list[Move]]:
    """Complete the log and yield it. Inside this context, no gptflow process on this machine moves the champion."""
    with _open_log(root, model) as log:
        log.complete_log()
        yield log.moves


@contextmanager
def _open_log(root: StateRoot, model: str) -> Iterator["_ChampionLog"]:
    """Lock the model's log and yield it; send an event for each move that was carried out, after the lock's release."""
    log: _ChampionLog | None = None
    # Not .lock: that suffix belongs to pipelines, and a pipeline's run waits here while it holds its own lock.
    try:
        with root.hold(root.path / "locks" / f"{quote(model, safe='')}.champion", overlap="wait"):
            log = _ChampionLog(root, model)
            yield log
    except MlflowException as error:
        raise RegistryError(f"the registry at {root.tracking_address} does not answer: {error}") from None
    finally:
        for move in log.carried_out if log is not None else ():
            events.send_model_promoted(model, move.as_dict(), _find_pipeline(root, model, move))


def _find_pipeline(root: StateRoot, model: str, move: Move) -> str | None:
    """Return the pipeline that made the move's target, as the version's MLflow run names it. None if unknown."""
    client = MlflowClient(root.tracking_uri)
    with suppress(MlflowException):
        version = client.get_model_version(model, str(move.target))
        return client.get_run(str(version.run_id)).data.tags.get("pipeline")
    return None


class _ChampionLog:
    """A registered model's log of moves, and the alias that the log describes."""

    def __init__(self, root: StateRoot, model: str) -> None:
        self.root, self.model = root, model
        self.carried_out: list[Move] = []
        """The moves that this process has carried out."""
        self.client = MlflowClient(root.tracking_uri)
        if not (matches := list_registered(root, model)):
            list_versions(root, model)  # raises UnknownVersion, which names the registered models
        (registered,) = matches
        self.moves = parse_moves(model, registered.tags)
        self.aliases = {alias: str(version) for alias, version in registered.aliases.items()}

    @property
    def champion(self) -> str | None:
        """The version that the alias names. None if there is no champion."""
        return self.aliases.get(CHAMPION)

    def complete_log(self) -> Move | None:
        """Complete an interrupted move, and return it. Record a champion that was set in MLflow itself."""
        completed = None
        if self.moves and not self.moves[-1].is_done:
            completed = self._resume(self.moves.pop())
        logged = self.moves[-1].target if self.moves else None
        if self.champion != logged:
            version = self._find_version(self.champion)
            outside = self._build_move(version, "moved outside", "gptflow did not move the alias", "unknown")
            self._complete(replace(outside, source=logged))
        return completed

    def move_champion(self, version: ModelVersion, kind: Kind, reason: str, by: str) -> Move:
        """Write the intent, move the alias, and mark the move as done."""
        move = self._build_move(version, kind, reason, by)
        self._write(move)
        return self._carry_out(move)

    def get_loadable_version(self, number: str) -> ModelVersion:
        """Return a version after loading its bundle. Raises UnknownVersion, RegistryError."""
        version = self.get_version(number)
        from flows.registry.loading import load  # torch: seconds of import that an unknown version need not wait for

        load(self.root, version)
        return version

    def get_version(self, number: str) -> ModelVersion:
        """Return a version. Raises UnknownVersion."""
        if (version := self._find_version(number)) is None:
            known = ", ".join(str(version.version) for version in list_versions(self.root, self.model))
            raise UnknownVersion(f"models:/{self.model}/{number} does not exist; {self.model} has versions {known}.")
        return version

    def explain_withdrawal(self, candidate: ModelVersion) -> str | None:
        """Return why the gate must not promote a version's weights: they were rolled back. None if it may."""
        own, weights = str(candidate.version), VersionTags.from_tags(candidate.tags).weights_sha256
        for version, move in find_withdrawn(self.moves).items():
            if version == own or (weights and weights == move.weights):
                which = "it" if version == own else f"version {version}, which has the same weights,"
                return f"{which} was rolled back by {move.by}: {move.reason}"
        return None

    def _resume(self, move: Move) -> Move | None:
        """Carry out a move of which only the intent was written. Drop it if the alias was moved elsewhere since."""
        if self.champion == move.target or (self.champion == move.source and self._find_version(move.target)):
            return self._carry_out(move)
        # Somebody has moved the alias elsewhere or deleted the version since: the move did not take place.
        self.client.delete_registered_model_tag(self.model, move.tag)
        return None

    def _carry_out(self, move: Move) -> Move:
        """Move the alias to the move's target, and mark the move as done."""
        assert move.target is not None, "only people remove the alias, in MLflow itself"
        if self.champion != move.target:
            postgres_lock.ensure_held()
            self.client.set_registered_model_alias(self.model, CHAMPION, move.target)
            self.aliases[CHAMPION] = move.target
        done = self._complete(move)
        self.carried_out.append(done)
        return done

    def _complete(self, move: Move) -> Move:
        """Update the tags and the alias `previous` that follow from the move, then mark the move as done."""
        done = replace(move, is_done=True)
        before, after = find_withdrawn(self.moves), find_withdrawn([*self.moves, done])
        for number in before.keys() - after.keys():
            if (version := self._find_version(number)) is not None and WITHDRAWN in version.tags:
                self.client.delete_model_version_tag(self.model, number, WITHDRAWN)
        for number in after.keys() - before.keys():
            if self._find_version(number) is not None:
                self.client.set_model_version_tag(self.model, number, WITHDRAWN, f"{done.by}: {done.reason}")
        self.moves.append(done)
        self._update_previous()
        self._write(done)
        return done

    def _update_previous(self) -> None:
        """Set the alias `previous` to the version that a rollback goes back to. Delete it if there is none."""
        version = find_previous(self.moves)
        if version is not None and self._find_version(version) is not None:
            self.client.set_registered_model_alias(self.model, PREVIOUS, version)
        elif PREVIOUS in self.aliases:
            self.client.delete_registered_model_alias(self.model, PREVIOUS)

    def _build_move(self, version: ModelVersion | None, kind: Kind, reason: str, by: str) -> Move:
        subject = self._find_version(self.champion) if kind == "rolled back" else version
        return Move(
            number=self.moves[-1].number + 1 if self.moves else 1,
            source=self.champion,
            target=None if version is None else str(version.version),
            kind=kind,
            reason=reason,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            by=by,
            weights=None if subject is None else VersionTags.from_tags(subject.tags).weights_sha256,
        )

    def _write(self, move: Move) -> None:
        self.client.set_registered_model_tag(self.model, move.tag, json.dumps(move.as_dict()))

    def _find_version(self, number: str | None) -> ModelVersion | None:
        """Return a version, or None if it does not exist."""
        if number is None:
            return None
        try:
            return self.client.get_model_version(self.model, number)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

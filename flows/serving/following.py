"""Which version is served: the one that a URI names, now or from now on.

A champion is followed without a restart: a thread looks into the registry every few seconds and loads what it finds
before anybody is told of it. Whatever goes wrong there (a registry that does not answer, a version that cannot be
loaded), the version that is served goes on being served, and the problem is said once in the log and shown in /health.
"""

import logging
import time
from dataclasses import dataclass, field
from threading import Thread

from mlflow.entities.model_registry import ModelVersion

from flows.releases import loading, registry
from flows.state import StateRoot
from gptcore.bundle import Loaded
from gptcore.writing.quantize import quantize

LOOK_SECONDS = 2.0
AGAIN_SECONDS = 30.0
"""A version that could not be loaded is tried again after so long, its files may be restored."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Served:
    """A version in memory."""

    name: str
    version: str
    loaded: Loaded
    fingerprint: str
    """The beginning of the sha256 of its weights, or empty."""
    created: int
    """When it was registered, in seconds since the epoch."""

    @property
    def id(self) -> str:
        """NAME/VERSION."""
        return f"{self.name}/{self.version}"


@dataclass
class Following:
    """The version that `uri` names. Raises UnknownVersion, or what is wrong with it, where nothing is served yet."""

    root: StateRoot
    uri: str
    """models:/NAME@ALIAS, which is followed, or models:/NAME/VERSION."""
    quantized: str | None = None
    """How the weights are rounded: int8, or not at all."""
    served: Served = field(init=False)
    problem: str | None = field(init=False, default=None)
    """Why the registry's version is not the one that is served."""
    failed: tuple[str, str, float] = field(init=False, default=("", "", 0.0))
    """The version that could not be loaded last, why, and when that was."""

    def __post_init__(self) -> None:
        self.served = self.load(registry.resolve(self.root, self.uri))

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may call the model: as asked for, its version now, and both with models:/ in front."""
        asked = self.uri.removeprefix("models:/")
        names = dict.fromkeys((asked, self.served.name, self.served.id))
        return (*names, *(f"models:/{name}" for name in names if name != self.served.name))

    def start(self) -> None:
        """Follows an alias from now on. The thread ends with the process."""
        if "@" in self.uri:
            Thread(target=self.follow, name="following", daemon=True).start()

    def follow(self) -> None:
        """Looks, for ever."""
        while True:
            time.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Serves what the alias names now, if that can be had."""
        try:
            found = registry.resolve(self.root, self.uri)
        except Exception as error:  # whatever it is, it is no reason to stop
            self.note(f"{type(error).__name__}: {error}".partition("\n")[0])
            return
        failed, why, when = self.failed
        if str(found.version) == self.served.version:
            self.note(None)
        elif str(found.version) == failed and time.monotonic() - when < AGAIN_SECONDS:
            self.note(why)
        else:
            self.exchange(found)

    def exchange(self, found: ModelVersion) -> None:
        """Loads a version and serves it, or notes why not."""
        try:
            served = self.load(found)
        except Exception as error:  # as above
            why = f"{registry.uri_of(found)} cannot be loaded: {error}"
            self.failed = str(found.version), why, time.monotonic()
            self.note(why)
            return
        _log.info("%s is served from now on; %s finishes what it has begun", served.id, self.served.id)
        self.served, self.problem = served, None

    def note(self, problem: str | None) -> None:
        """Remembers a problem, and says it when it is new."""
        if problem is not None and problem != self.problem:
            _log.warning("%s goes on being served. %s", self.served.id, problem)
        elif problem is None and self.problem is not None:
            _log.info("the registry answers again, and names %s", self.served.id)
        self.problem = problem

    def load(self, found: ModelVersion) -> Served:
        """A registered version as one that can be served. Raises GPTCoreError if its files are gone or damaged."""
        loaded = loading.verified(self.root, found)
        if self.quantized:
            quantize(loaded.model, self.quantized)
        digest = found.tags.get("weights_sha256") or ""
        return Served(found.name, str(found.version), loaded, digest[:16], (found.creation_timestamp or 0) // 1000)

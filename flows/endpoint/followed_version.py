"""The version that the endpoint serves: the one that a model URI names.

An alias such as `@champion` is followed without a restart. A thread queries the registry every 2 seconds and loads a
new version before any request sees it. If the registry does not answer or a version cannot be loaded, the endpoint
keeps serving the version before. It logs the problem once and shows it in /health.
"""

import logging
import time
from dataclasses import dataclass, field
from threading import Thread

from mlflow.entities.model_registry import ModelVersion

from flows.registry import loading, versions
from flows.registry.tags import VersionTags
from flows.state.root import StateRoot
from gptcore.bundle import CARD, LoadedModel
from gptcore.generation.quantize import quantize

POLL_SECONDS = 2.0
RELOAD_SECONDS = 30.0
"""After this time a version that could not be loaded is tried again: its files may have been restored."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """A version in memory."""

    name: str
    version: str
    loaded: LoadedModel
    fingerprint: str
    """The first 16 digits of the weights' sha256, or empty."""
    created: int
    """When the version was registered, in seconds since the epoch."""
    card: str = ""
    """The model card, in markdown, or empty."""

    @property
    def id(self) -> str:
        """NAME/VERSION."""
        return f"{self.name}/{self.version}"


@dataclass(frozen=True)
class _FailedLoad:
    """The latest version that could not be loaded."""

    version: str
    problem: str
    at: float
    """In monotonic seconds."""


@dataclass
class FollowedVersion:
    """The version that `uri` names, loaded when this object is made.

    Raises UnknownVersion if there is no such version, RegistryError if its files are missing, CheckpointError or
    TokenizerError if they are damaged, and DeviceMissing.
    """

    root: StateRoot
    uri: str
    """models:/NAME@ALIAS, which is followed, or models:/NAME/VERSION."""
    device: str = "auto"
    """Where the model computes: cpu, cuda, cuda:N, mps or auto."""
    quantization: str | None = None
    """How the weights are rounded: `int8`, or None."""
    current: ServedVersion = field(init=False)
    problem: str | None = field(init=False, default=None)
    """Why the registry's version is not the one that is served."""
    failed_load: _FailedLoad | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.current = self.load(versions.resolve(self.root, self.uri))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request may give for the model.

        With the URI models:/gpt-notes@champion and version 7: `gpt-notes@champion`, `gpt-notes`, `gpt-notes/7`, and the
        first and the last of them with `models:/` in front.
        """
        name_in_uri = self.uri.removeprefix("models:/")
        names = dict.fromkeys((name_in_uri, self.current.name, self.current.id))
        return (*names, *(f"models:/{name}" for name in names if name != self.current.name))

    def start(self) -> None:
        """Follow the alias from now on, in a thread that ends with the process. Do nothing for a fixed version."""
        if "@" in self.uri:
            Thread(target=self.poll, name="followed-version", daemon=True).start()

    def poll(self) -> None:
        """Call `update` every POLL_SECONDS, without end."""
        while True:
            time.sleep(POLL_SECONDS)
            self.update()

    def update(self) -> None:
        """Serve the version that the alias names now, if it can be loaded."""
        try:
            version = versions.resolve(self.root, self.uri)
        except Exception as error:  # no failure of the registry may end the thread
            self.report(f"{type(error).__name__}: {error}".partition("\n")[0])
            return
        failed, number = self.failed_load, str(version.version)
        if number == self.current.version:
            self.report(None)
        elif failed is not None and number == failed.version and time.monotonic() - failed.at < RELOAD_SECONDS:
            self.report(failed.problem)
        else:
            self.switch_to(version)

    def switch_to(self, version: ModelVersion) -> None:
        """Load the version and serve it, or report why it cannot be loaded."""
        try:
            loaded = self.load(version)
        except Exception as error:  # a version that cannot be loaded may not end the thread either
            problem = f"{versions.uri_of(version)} cannot be loaded: {error}"
            self.failed_load = _FailedLoad(str(version.version), problem, time.monotonic())
            self.report(problem)
            return
        _log.info("%s is served from now on; %s finishes the texts that it has begun", loaded.id, self.current.id)
        self.current, self.problem = loaded, None

    def report(self, problem: str | None) -> None:
        """Store the problem for /health, and log it if it is new. None means that all is well."""
        if problem is not None and problem != self.problem:
            _log.warning("%s is still served. %s", self.current.id, problem)
        elif problem is None and self.problem is not None:
            _log.info("the registry answers again and names %s", self.current.id)
        self.problem = problem

    def load(self, version: ModelVersion) -> ServedVersion:
        """Load a registered version. Raises GPTCoreError if its files are missing or damaged."""
        loaded = loading.load_verified(self.root, version, self.device)
        if self.quantization:
            quantize(loaded.model, self.quantization)
        return ServedVersion(
            name=version.name,
            version=str(version.version),
            loaded=loaded,
            fingerprint=(VersionTags.from_tags(version.tags).weights_sha256 or "")[:16],
            created=(version.creation_timestamp or 0) // 1000,
            card=self.read_card(version),
        )

    def read_card(self, version: ModelVersion) -> str:
        """Return the version's card, or an empty text. Earlier releases wrote none."""
        try:
            path = versions.fetch_bundle(self.root, version.name, str(version.version), CARD)
            return path.read_text(encoding="utf-8", errors="replace")
        except (versions.RegistryError, OSError):
            return ""

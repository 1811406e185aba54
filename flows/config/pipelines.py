"""pipelines.yaml as `Pipeline` objects: reading, merging and strict checks.

The command line wins over the pipeline, the pipeline over `defaults:`, and those over the schema's defaults. An unknown
key, a wrong type or an impossible value is refused. The error names the file, the line, the key and the allowed range,
and the nearest known name.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from flows.config import defaults, yaml
from flows.config.schedule import ScheduleConfig
from flows.config.yaml import MAX_BYTES, Marks, UnsupportedYAML
from flows.notifications.events import CORPUS_CHANGED, MODEL_PROMOTED, model_resource, pipeline_resource
from flows.notifications.notify import NotifyConfig
from flows.state.lock_holder import Overlap
from gptcore.config import (
    CorpusConfig,
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    RetrainConfig,
    SampleConfig,
    TrainConfig,
    explain_long_warm_up,
)
from gptcore.credentials import shorten_addresses
from gptcore.errors import ConfigError
from gptcore.sections import KeyPath, Section, check

SECTIONS = ("corpus", "model", "train", "evaluate", "sample", "gate", "retrain")
"""The sections of a pipeline. Their keys are merged one by one. Each section is a parameter of the flow."""
RUNNING_KEYS = frozenset({"retrain", "schedule", "triggers", "overlap", "task_runner", "notify", "tags"})
"""The keys that say when and how a pipeline runs. They do not change what is trained."""
_TOP_KEYS = ("defaults", "pipelines", "watch_seconds")
_WATCH_SECONDS = (10, 86_400)
_SHAPE_KEYS = ("context_length", "emb_dim", "n_heads", "n_layers")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""The pattern of a pipeline's name and of a registered model's name."""


class TriggerConfig(Section):
    """An event that starts a run of the pipeline: its corpus changed, or another model got a new champion.

    The champion is the version that the alias `@champion` of a registered model names.
    """

    on: Literal["corpus_changed", "promoted"]
    """corpus_changed: the flow `watch` saw that the pipeline's sources have changed. promoted: the gate or a person
    made another version the champion of `model`, by a promotion or a rollback."""
    model: str | None = None
    """With promoted: the registered model, which is the model_name of another pipeline in the file."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.on == "promoted" and self.model is None:
            raise ValueError("promoted needs a model, as in {on: promoted, model: gpt-base}")
        if self.on == "corpus_changed" and self.model is not None:
            raise ValueError(
                f"corpus_changed is about the pipeline's own corpus; it has no model (given: {self.model!r:.80})"
            )
        return self

    def awaited_event(self, pipeline: str) -> tuple[str, str]:
        """Return the name of the event that starts the pipeline, and the resource that the event is about."""
        if self.model is None:
            return CORPUS_CHANGED, pipeline_resource(pipeline)
        return MODEL_PROMOTED, model_resource(self.model)


def _check_task_runner(name: str) -> str:
    if name in ("processes", "dask", "ray"):
        return name
    try:
        parts = urlsplit(name)
        has_address = parts.hostname is not None and parts.port is not None
    except ValueError:
        has_address = False
    is_plain = has_address and "@" not in name and not any((parts.path.strip("/"), parts.query, parts.fragment))
    if is_plain and parts.scheme in ("tcp", "tls", "ray"):
        return name
    # An address with an @ may hold a password, so it is not repeated.
    problem = "an address must not hold credentials" if "@" in name else f"given: {name!r:.80}"
    raise ValueError(
        "must be processes, dask, ray, a Dask scheduler as in tcp://HOST:8786 (or tls://), or a Ray cluster as in "
        f"ray://HOST:10001 ({problem})"
    )


TaskRunnerName = Annotated[str, AfterValidator(_check_task_runner)]
"""A value of the key `task_runner`. See flows/retrain/task_runners.py for what each value starts."""


class Pipeline(Section):
    """One entry of pipelines.yaml, with every default filled in."""

    name: str = Field(pattern=NAME)
    """The pipeline's name."""
    model_name: str = Field(pattern=NAME)
    """The registered model that its champions belong to. Default: gpt-<pipeline>."""
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = defaults.MODEL
    train: TrainConfig = defaults.TRAIN
    evaluate: EvaluateConfig = EvaluateConfig()
    sample: SampleConfig = SampleConfig()
    gate: GateConfig = GateConfig()
    retrain: RetrainConfig = RetrainConfig()
    schedule: ScheduleConfig | None = None
    """When `gptflow up` or `gptflow serve` starts a run. Default: never."""
    triggers: tuple[TriggerConfig, ...] = ()
    """Events that start it: {on: corpus_changed}, or {on: promoted, model: gpt-base}."""
    overlap: Overlap = "skip"
    """What a new run does while another run of the pipeline is active: `skip` ends it, `wait` lets it wait."""
    task_runner: TaskRunnerName = "processes"
    """What reads and encodes the shards of a large corpus: processes (of this machine), dask or ray (a cluster that
    belongs to the run), a Dask scheduler (tcp://HOST:8786, tls://HOST:8786) or a Ray cluster (ray://HOST:10001)."""
    notify: tuple[NotifyConfig, ...] = ()
    """Where failures, promotions and overdue pipelines are reported: {webhook: ADDRESS} or {block: TYPE/NAME}."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] = ()
    """Tags of the pipeline's deployment and runs in the Prefect UI."""


class PipelinesFile:
    """A parsed pipelines.yaml: plain data, and the line number of each key."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file is missing, is not YAML, or has unknown keys at the top."""
        self.path = path
        self.data, self.marks = _read(path)
        self._built: dict[str, Pipeline] = {}
        self._check_top()

    @property
    def watch_seconds(self) -> int:
        """Seconds between two checks of the sources and successes of all pipelines."""
        return self.data.get("watch_seconds", 300)

    def names(self) -> list[str]:
        """Return the pipelines' names, in the file's order."""
        return list(self.data["pipelines"])

    def pipeline(self, name: str, overrides: Sequence[str] = ()) -> Pipeline:
        """Return the pipeline `name` with `overrides` ("section.key=value") merged over it. Raises ConfigError."""
        if overrides:
            return self._build(name, overrides)
        if name not in self._built:  # `serve` reads each of hundreds of pipelines several times
            self._built[name] = self._build(name, ())
        return self._built[name]

    def _build(self, name: str, overrides: Sequence[str]) -> Pipeline:
        if name not in self.data["pipelines"]:
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(self.names())}."
            raise ConfigError(f"{self.path} has no pipeline {name!r}. {hint}")
        layers = [self.data.get("defaults") or {}, self.data["pipelines"][name] or {}, parse_overrides(overrides)]
        merged = {"name": name, "model_name": f"gpt-{name}", **merge(layers)}
        if merged["name"] != name:
            where = self._where(name, ("name",), layers)
            raise ConfigError(f"{where}: there is no such key; the key of a pipeline is its name")
        built, problems = check_pipeline(merged)
        if built is None:
            raise ConfigError("\n".join(f"{self._where(name, path, layers)}: {what}" for path, what in problems))
        for index, trigger in enumerate(built.triggers):
            if (what := self._wrong_model(trigger, built)) is not None:
                raise ConfigError(f"{self._where(name, ('triggers', index, 'model'), layers)}: {what}")
        if (what := explain_long_warm_up(built.train.warmup_steps, built.train.max_steps)) is not None:
            raise ConfigError(f"{self._where(name, ('train', 'warmup_steps'), layers)}: {what}")
        corpus = built.corpus.model_copy(
            update={"sources": tuple(_absolute(source, self.path.parent) for source in built.corpus.sources)}
        )
        return built.model_copy(update={"corpus": corpus})

    def keep(self) -> dict[str, int]:
        """Return how many of its newest versions each registered model keeps.

        It is the largest `retrain.keep` of the model's pipelines.
        """
        most: dict[str, int] = {}
        for pipeline in map(self.pipeline, self.names()):
            most[pipeline.model_name] = max(pipeline.retrain.keep, most.get(pipeline.model_name, 0))
        return most

    @cached_property
    def _models(self) -> list[Any]:
        """The models' names as the file gives them, not yet checked."""
        defaults = self.data.get("defaults") or {}
        named = self.data["pipelines"].items()
        return [(own or {}).get("model_name", defaults.get("model_name", f"gpt-{name}")) for name, own in named]

    def _wrong_model(self, trigger: TriggerConfig, pipeline: Pipeline) -> str | None:
        """Return why a trigger would never start the pipeline, or would start it forever. None if it is right."""
        if trigger.model is None:
            return None
        if trigger.model == pipeline.model_name:
            return f"{trigger.model} is this pipeline's own model: each run would start the next one"
        known = self._models
        if trigger.model in known:
            return None
        near = difflib.get_close_matches(trigger.model, map(str, known), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(map(str, known))}"
        return f"no pipeline of this file makes the model {trigger.model:.80}; {hint}"

    def _check_top(self) -> None:
        for key in self.data:
            if key not in _TOP_KEYS:
                raise ConfigError(f"{self._at((key,))}{key}: there is no such key; known are {', '.join(_TOP_KEYS)}")
        least, most = _WATCH_SECONDS
        given = self.watch_seconds
        if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
            at = self._at(("watch_seconds",))
            raise ConfigError(
                f"{at}watch_seconds: must be a number of seconds from {least} to {most} (given: {given!r})"
            )
        if not isinstance(self.data.get("pipelines"), dict) or not self.data["pipelines"]:
            raise ConfigError(f"{self.path}: pipelines: must map each pipeline's name to its settings")
        mappings: dict[tuple[str, ...], Any] = {("defaults",): self.data.get("defaults")}
        mappings |= {("pipelines", name): value for name, value in self.data["pipelines"].items()}
        for path, value in mappings.items():
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{self._at(path)}{'.'.join(path)}: must be a mapping of sections to keys")
            for section in SECTIONS:
                _check_section(f"{self._at((*path, section))}{'.'.join((*path, section))}", (value or {}).get(section))

    def _where(self, name: str, path: tuple[str | int, ...], layers: list[Any]) -> str:
        """Return the place that a value came from, as an error names it: the last layer that gives it."""
        key = ".".join(map(str, path))
        if _has(layers[2], path):
            return f"--set {key}"
        for prefix in (("pipelines", name), ("defaults",)):
            if (*prefix, *path) in self.marks:
                return f"{self._at((*prefix, *path))}{'.'.join(map(str, (*prefix, *path)))}"
        return f"{self._at(('pipelines', name, *path))}pipelines.{name}{'.' if key else ''}{key}"

    def _at(self, path: tuple[str | int, ...]) -> str:
        """Return the file and the line of the key, or of the nearest key around it."""
        while path and path not in self.marks:
            path = path[:-1]
        return f"{self.path}:{self.marks[path]}: " if path else f"{self.path}: "


def find_pipelines_file(given: str | None) -> Path:
    """Return the given file's path, or that of pipelines.yaml in the working directory. Raises ConfigError."""
    path = Path(given or "pipelines.yaml").expanduser().resolve()
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(
            f"{path} {what}. Go to a directory with a pipelines.yaml, name one with --file, or write "
            "one for your text with `gptflow init PATH`."
        )
    return path


def check_pipeline(given: Mapping[str, Any]) -> tuple[Pipeline | None, list[tuple[KeyPath, str]]]:
    """Return the pipeline of plain data and no problems, or None and every problem, as `gptcore.sections.check` does.

    Fills in the defaults that depend on other keys (defaults.py).
    """
    return check(Pipeline, defaults.fill_defaults(given))


def merge(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge layers: later ones win, key by key inside the sections.

    A layer that names a size removes the shape keys of earlier layers.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in SECTIONS or not isinstance(value, Mapping):
                merged[key] = value
                continue
            below = merged.get(key) or {}
            if key == "model" and "size" in value:
                below = {name: kept for name, kept in below.items() if name not in _SHAPE_KEYS}
            merged[key] = {**below, **value}
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse the values of --set, which are YAML. Raises ConfigError.

    Example: `["train.max_steps=50"]` becomes `{"train": {"max_steps": 50}}`.
    """
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = key.strip().partition(".")
        if not equals or not section:
            raise ConfigError(
                f"--set {shorten_addresses(override)}: must have the form section.key=value, as in train.max_steps=50"
            )
        try:
            value, _ = yaml.read(text)
        except UnsupportedYAML as error:
            given = shorten_addresses(repr(text))
            raise ConfigError(f"--set {key}: {shorten_addresses(error)} (given: {given:.80})") from None
        if not name:
            _check_section(f"--set {key}", value if section in SECTIONS else None)
            parsed[section] = value
        elif isinstance(below := parsed.setdefault(section, {}), dict):
            below[name] = value
        else:
            given = shorten_addresses(repr(below))
            raise ConfigError(f"--set {key}: {section} was set to {given:.80} before, which has no keys")
    return parsed


def overrides_sources(overrides: Sequence[str]) -> bool:
    """Whether the command line replaces the file's sources. Such a run is an experiment on other text."""
    return _has(parse_overrides(overrides), ("corpus", "sources"))


def _read(path: Path) -> tuple[dict[str, Any], Marks]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a pipelines.yaml has at most {MAX_BYTES:,}")
        data, marks = yaml.read(path.read_text(encoding="utf-8"))
    except UnsupportedYAML as error:
        raise ConfigError(f"{path}{f':{error.line}' if error.line else ''}: {shorten_addresses(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys defaults and pipelines")
    return data, marks


def _check_section(where: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping of keys to values (given: {shorten_addresses(repr(value)):.80})")


def _has(layer: Any, path: tuple[str | int, ...]) -> bool:
    for part in path:
        if isinstance(layer, Mapping) and part in layer:
            layer = layer[part]
        elif isinstance(layer, list | tuple) and isinstance(part, int):
            return True
        else:
            return False
    return bool(path)


def _absolute(source: str, base: Path) -> str:
    """Return the absolute path of a local source, relative to the file's directory. URLs and python-docs stay."""
    is_local = source != "python-docs" and "://" not in source
    try:
        return str(base / Path(source).expanduser()) if is_local else source
    except (RuntimeError, ValueError):  # ~ of an unknown user; `sources.check` refuses it later
        return source

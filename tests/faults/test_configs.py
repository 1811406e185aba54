"""Configurations that nobody should write: each is understood, or refused with the key that is wrong. (FAULTS 24)"""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flows import plain_yaml
from flows.pipelines import SECTIONS, Pipeline, PipelinesFile, parse_overrides
from flows.service.deployed import merged
from gptcore import memory
from gptcore.config import CorpusConfig, ModelConfig, Section, TrainConfig
from gptcore.errors import ConfigError, CorpusError
from gptcore.text import sources

EXAMPLES = 10_000
PER_TEST = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LISTED = ("schedule", "triggers", "notify")


def inner(key: str) -> type[Section]:
    """The section that a key of a pipeline, or each entry of its list, is made of."""
    kinds: list[Any] = [Pipeline.model_fields[key].annotation]
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        kinds += get_args(kind)
    raise AssertionError(key)


PLAIN = sorted(set(Pipeline.model_fields) - set(SECTIONS) - {"name"})
KEYS = [(key, "") for key in PLAIN] + [
    (section, key) for section in (*SECTIONS, *LISTED) for key in inner(section).model_fields
]
STRANGE: list[Any] = [
    *(1e308, -1e308, 5e-324, -0.0, math.nan, math.inf, -math.inf, 2**31, 2**48, 2**63 - 1, 2**63, -(2**63), 2**64),
    *(10**400, -1, 0, 1, 2, 3, 7, 0.5, 0.05, 0.999999, 1.0, True, False, None, [], {}, [[]], [None], {"": 0}, [0], [1]),
    *("", " ", "\0", "\ufeff", "\ud800", "a\udfffb", "١٢", "1", "0x10", "1e3", "nan", "true", "null", "~", "x" * 6000),
    *("auto", "cpu", "cuda:99999999999999", "bytes", "bpe:256", "bpe:257", "bpe:999999", "gpt2", "hash", "champion"),
    *("models:/a/1", "models:/a@b", "models:///1", "../../etc/passwd", "file:///etc/passwd", "http://[::1", "~nobody/x"),
    *("* * * * *", "0 0 30 2 *", "*/0 * * * *", "@daily", "٣ * * * *", "99999999999 * * * *", "Europe/Berlin", "Europe"),
    *("http://a:99999/", "https://example.org/hook", "slack-webhook/team", "skip", "wait", "corpus_changed", "promoted"),
    *(["python-docs"], ["failure"], ["a", 1], [float("nan")], {"on": "promoted"}, [{"on": "promoted", "model": "x"}]),
    *([{"webhook": "http://a/"}], [{"block": "a/b"}], {"cron": "* * * * *"}, {"interval": 10**9}, {"max_steps": 1}),
]
VALUES = st.one_of(
    st.sampled_from(STRANGE),
    st.sampled_from([1, 2, 8, 16, 30, 64, 128, 0.1, 0.4, 0.6, 0.9]),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
UNKNOWN = [("train", "max_step"), ("corpus", "\ud800"), ("traim", "max_steps"), ("name", "")]
Setting = tuple[tuple[str, str], Any]


class Edge(int):
    """Stands for a value on, just inside or just outside of what a key allows."""


def edges(section: str, key: str) -> list[Any]:
    """A key's default, its choices, and its bounds with what lies on both sides of them."""
    kind: Any = inner(section) if key else Pipeline
    name = key or section
    found = [kind.model_fields[name].get_default(call_default_factory=True)]
    left = [kind.model_json_schema()["properties"][name]]
    while left:
        schema = left.pop()
        left += [*schema.get("anyOf", ()), *filter(None, [schema.get("items")])]
        found += schema.get("enum", ())
        for bound in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            if bound in schema:
                found += [schema[bound], schema[bound] - 1, schema[bound] + 1, schema[bound] * 0.999]
    plain = [value for value in found if isinstance(value, str | int | float | tuple | None)]
    return [list(value) if isinstance(value, tuple) else value for value in plain] or [None]


EDGES = {key: edges(*key) for key in KEYS} | dict.fromkeys(UNKNOWN, [1])
SETTINGS = st.lists(
    st.tuples(st.sampled_from([*KEYS, *UNKNOWN]), st.one_of(VALUES, st.integers(0, 23).map(Edge))), min_size=1, max_size=4
)


def resolved(chosen: list[Setting]) -> list[Setting]:
    return [
        (key, EDGES[key][value % len(EDGES[key])] if isinstance(value, Edge) else value) for key, value in chosen
    ]


def nested(chosen: list[Setting]) -> dict[str, Any]:
    """The settings as a pipeline's mapping."""
    layer: dict[str, Any] = {}
    for (section, key), value in chosen:
        if not key:
            layer[section] = value
        elif isinstance(layer.setdefault(section, {}), dict):
            layer[section][key] = value
    return {key: [value] if key in LISTED[1:] and isinstance(value, dict) else value for key, value in layer.items()}


class Dumper(yaml.SafeDumper):
    """Writes a value that stands twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_overrides(chosen: list[Setting], file: PipelinesFile) -> Pipeline:
    def written(value: Any) -> str:
        return value if isinstance(value, str) else yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**9)

    flat = [(f"{section}.{key}" if key else section, value) for (section, key), value in chosen]
    return file.pipeline("tiny", [f"{key}={written(value)}" for key, value in flat])


def as_file(chosen: list[Setting], file: PipelinesFile) -> Pipeline:
    half = len(chosen) // 2
    layers = {"defaults": nested(chosen[:half]), "pipelines": {"tiny": nested(chosen[half:])}}
    path = file.path.with_name("generated.yaml")
    path.write_text(yaml.dump(layers, Dumper=Dumper))
    return PipelinesFile(path).pipeline("tiny")


def as_deployed_run(chosen: list[Setting], file: PipelinesFile) -> Pipeline:
    half = len(chosen) // 2
    registered = {"pipeline": "tiny", "model_name": "gpt-tiny", **nested(chosen[:half])}
    return merged(registered, nested(chosen[half:]))


ROUTES: list[Callable[..., Pipeline]] = [as_overrides, as_file, as_deployed_run, as_deployed_run]


def test_each_of_ten_thousand_configurations_is_valid_or_refused_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {tiny: {}}")
    file = PipelinesFile(tmp_path / "pipelines.yaml")
    seen: Counter[str] = Counter()

    @PER_TEST
    @given(SETTINGS, st.sampled_from(ROUTES))
    def attempt(drawn: list[Setting], route: Callable[..., Pipeline]) -> None:
        seen["all"] += 1
        chosen = resolved(drawn)
        try:
            built = route(chosen, file)
        except ConfigError as refused:
            names = [name for keys, _ in chosen for name in keys if name]
            assert any(name in str(refused) for name in names), (chosen, str(refused))
            assert len(str(refused)) < 5000
            seen.update(["refused", *(f"refused {section}.{key}" for (section, key), _ in chosen)])
        else:
            assert Pipeline.model_validate_json(built.model_dump_json()) == built
            json.dumps(built.model_dump(mode="json"), allow_nan=False)
            seen["valid"] += 1

    attempt()
    assert seen["all"] >= EXAMPLES
    assert not [f"{section}.{key}" for section, key in KEYS if not seen[f"refused {section}.{key}"]]
    with capsys.disabled():
        print(f" [{seen['all']:,} configurations: {seen['valid']:,} valid, {seen['refused']:,} refused] ", end="")

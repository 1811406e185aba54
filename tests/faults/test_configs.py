"""Wrong and strange configurations: each is accepted, or refused with the key that is wrong."""

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

from flows.config.pipelines import SECTIONS, Pipeline, PipelinesFile, parse_overrides
from flows.retrain.parameters import merge_parameters
from gptcore.config import ModelConfig, TrainConfig
from gptcore.corpus import sources
from gptcore.errors import ConfigError, CorpusError
from gptcore.sections import Section, parse
from gptcore.training import memory
from tests.servers import gptflow, refused

PER_TEST = settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LISTED = ("schedule", "triggers", "notify")


def inner(key: str) -> type[Section]:
    """Return the section type of a pipeline's key, or of the entries of its list."""
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
    *("models:/a/1", "models:/a@b", "models:///1", "../../etc/passwd", "file:///etc/passwd", "http://[::1"),
    *("* * * * *", "0 0 30 2 *", "*/0 * * * *", "@daily", "٣ * * * *", "99999999999 * * * *", "Europe/Berlin"),
    *("http://a:99999/", "https://example.org/hook", "slack-webhook/team", "skip", "promoted"),
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
    """An index into EDGES: a value on, just inside or just outside the bounds of a key."""


def edges(section: str, key: str) -> list[Any]:
    """Return a key's default, its choices, and its bounds with the values on both sides."""
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


EDGES = {key: edges(*key) for key in KEYS} | {key: [1] for key in UNKNOWN}
SETTINGS = st.lists(
    st.tuples(st.sampled_from([*KEYS, *UNKNOWN]), st.one_of(VALUES, st.integers(0, 23).map(Edge))),
    min_size=1,
    max_size=3,
)


def resolved(chosen: list[Setting]) -> list[Setting]:
    return [(key, EDGES[key][value % len(EDGES[key])] if isinstance(value, Edge) else value) for key, value in chosen]


def nested(chosen: list[Setting]) -> dict[str, Any]:
    """Return the settings as a pipeline's mapping."""
    layer: dict[str, Any] = {}
    for (section, key), value in chosen:
        if not key:
            layer[section] = value
        elif isinstance(layer.setdefault(section, {}), dict):
            layer[section][key] = value
    return {key: [value] if key in LISTED[1:] and isinstance(value, dict) else value for key, value in layer.items()}


class Dumper(yaml.SafeDumper):
    """A YAML dumper without aliases: it writes a repeated value in full again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_overrides(chosen: list[Setting], file: PipelinesFile) -> Pipeline:
    def written(value: Any) -> str:
        return (
            value if isinstance(value, str) else yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**9)
        )

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
    return merge_parameters(registered, nested(chosen[half:]))


ROUTES: list[Callable[..., Pipeline]] = [as_overrides, as_file, as_deployed_run, as_deployed_run]


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.deep)])
def test_each_of_many_configurations_is_valid_or_refused_with_its_key(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {tiny: {}}")
    file = PipelinesFile(tmp_path / "pipelines.yaml")
    seen: Counter[str] = Counter()

    @settings(PER_TEST, max_examples=count)
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
    assert seen["all"] >= count
    assert not [f"{section}.{key}" for section, key in KEYS if not seen[f"refused {section}.{key}"]]
    with capsys.disabled():
        print(f" [{seen['all']:,} configurations: {seen['valid']:,} valid, {seen['refused']:,} refused] ", end="")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.max_step=5"], ["--set train.max_step", "did you mean max_steps?"]),
        (["train.max_steps=-5"], ["--set train.max_steps", "greater than or equal to 1", "-5"]),
        (["train.max_steps=many"], ["--set train.max_steps", "valid integer", "many"]),
        (["train.max_steps=true"], ["--set train.max_steps", "valid integer"]),
        (["train.max_steps"], ["section.key=value"]),
        (["train.learning_rate=[1"], ["--set train.learning_rate", "not YAML"]),
        (["train.learning_rate=.nan"], ["--set train.learning_rate", "finite"]),
        (["model.emb_dim=33"], ["emb_dim 33 is not divisible by n_heads 2", "32", "34"]),
        (["model.size=huge"], ["'gpt2-xl'", "huge"]),
        (["traim.max_steps=5"], ["traim", "did you mean train?"]),
        (["corpus.val_fraction=0.6", "corpus.holdout_fraction=0.6"], ["0.6", "nothing is left to train on"]),
        (["corpus.sources=['missing.txt']"], ["missing.txt"]),
        (["corpus.sources=['*.nothing']"], ["*.nothing"]),
        (["corpus.sources=[]"], ["at least 1 item"]),
        (["corpus.tokenizer=gpt-2"], ["gpt-2", "gpt2"]),
    ],
)
def test_wrong_settings_are_refused_with_key_and_fix_before_anything_is_created(
    project: Path, overrides: list[str], parts: list[str]
) -> None:
    done = gptflow(project, "run", "tiny", *(word for override in overrides for word in ("--set", override)))
    refused(done, 2, *parts)
    assert not list((project / "mlruns").glob("**/*.db"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pipelines:\n  tiny:\n    train:\n      max_step: 5\n", ["pipelines.yaml:4:", "max_step", "max_steps"]),
        ("pipelines:\n  tiny:\n    train:\n      max_steps: 0\n", ["pipelines.yaml:4:", "greater than or equal to 1"]),
        ("defaults:\n  train: {seed: -1}\npipelines:\n  tiny: {}\n", ["pipelines.yaml:2:", "defaults.train.seed"]),
        ("pipelines:\n  tiny: {}\n  tiny: {}\n", ["pipelines.yaml:3:", "tiny is given twice", "line 2"]),
        ("pipeline:\n  tiny: {}\n", ["pipelines.yaml:1:", "pipeline: there is no such key"]),
        ("pipelines:\n  tiny: [1]\n", ["pipelines.yaml:2:", "must be a mapping"]),
        ("pipelines: {}\n", ["pipelines: must map"]),
        ("pipelines:\n  a: &a {}\n  tiny: *a\n", ["pipelines.yaml:3:", "aliases are not supported"]),
        ("pipelines: [\n", ["pipelines.yaml:2:", "not YAML"]),
        ("- 1\n", ["must be a mapping"]),
        ("pipelines:\n  other: {}\n", ["no pipeline 'tiny'", "other"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(project: Path, text: str, parts: list[str]) -> None:
    (project / "pipelines.yaml").write_text(text)
    refused(gptflow(project, "run", "tiny"), 2, *parts)


def test_a_misspelt_key_of_any_pipeline_keeps_serve_from_starting(project: Path) -> None:
    with (project / "pipelines.yaml").open("a") as file:
        file.write("  other: {model: {emb_dims: 32}}\n")
    done = gptflow(project, "serve", PREFECT_API_URL="http://127.0.0.1:1/api")
    refused(done, 2, "pipelines.yaml:", "other.model.emb_dims", "did you mean emb_dim?")
    assert "other.model.emb_dims" in gptflow(project, "run", "other").stderr


BOMB = "\n".join(["a0: &a0 [lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, r":2: aliases are not supported"),
        ("pipelines: &a {tiny: *a}", r":1: aliases are not supported"),
        ("pipelines: {tiny: {<<: {train: {max_steps: 1}}}}", "<<: there is no such key"),
        ("pipelines: " + "[" * 100_000, "more than 20 deep"),
        ("pipelines:" + "".join(f"\n{' ' * n}a:" for n in range(1, 200)), r":20: .*more than 20 deep"),
        ("pipelines:\n  tiny: !!python/object/apply:pathlib.Path.touch [SENTINEL]", r":2: tags such as .*python"),
        ("pipelines:\n  tiny: !!python/object/new:os.system ['touch SENTINEL']", r":2: tags such as .*python"),
        ("pipelines: {tiny: {tags: [!!binary aGk=]}}", "tags such as"),
        ("pipelines: {tiny: {train: {seed: !!int x}}}", "tags such as"),
        ("pipelines: {tiny: {}}\npipelines: {tiny: {}}", ":2: pipelines is given twice, first on line 1"),
        ("pipelines: {tiny: {train: {seed: 1, seed: 2}}}", "seed is given twice"),
        ("pipelines: {1: {}}", "the key '1' is not text; write it in quotes"),
        ("pipelines: {~: {}}", "the key '~' is not text"),
        ("pipelines: {? [a] : {}}", "the key a list or mapping is not text"),
        ("pipelines: {tiny: {name: other}}", "name: there is no such key"),
        ('pipelines: {"\\ud800": {}}', "should match pattern|lone surrogate"),
        ('pipelines: {tiny: {sample: {prompts: [ok, "\\ud800"]}}}', r"sample.prompts.1: .*lone surrogate '.ud800'"),
        ("pipelines: {tiny: {train: {seed: " + "9" * 5000 + "}}}", "Exceeds the limit|digits"),
        ("pipelines: {tiny: {train: {seed: 0x" + "f" * 5000 + "}}}", "train.seed: is a whole number of 20,000 bits"),
        ("defaults: {train: 5}\npipelines: {tiny: {train: {seed: 1}}}", r":1: defaults.train: must be a mapping"),
        ("pipelines: {tiny: {}}\n---\npipelines: {tiny: {}}", "another document"),
        ("pipelines: {tiny: \0}", "special characters"),
        ("watch_seconds: .inf\npipelines: {tiny: {}}", "watch_seconds: must be a number of seconds from 10 to 86400"),
    ],
)
def test_yaml_with_aliases_deep_nesting_object_tags_or_repeated_keys_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    sentinel = tmp_path / "executed"
    path = tmp_path / "pipelines.yaml"
    path.write_text(text.replace("SENTINEL", str(sentinel)))
    with pytest.raises(ConfigError, match=said) as caught:
        file = PipelinesFile(path)
        file.pipeline(file.names()[0])
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    assert not sentinel.exists()


def test_a_pipelines_file_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ConfigError, match=r"has 100,000,000 bytes; a pipelines.yaml has at most 1,000,000"):
        PipelinesFile(path)


def test_a_file_of_1000_pipelines_with_a_byte_order_mark_and_crlf_is_read(tmp_path: Path) -> None:
    lines = [f"  p{number}: {{train: {{seed: {number}}}}}\r\n" for number in range(1000)]
    text = "\ufeffpipelines:\r\n" + "".join(lines)
    (tmp_path / "pipelines.yaml").write_bytes(text.encode())
    file = PipelinesFile(tmp_path / "pipelines.yaml")
    assert len(file.names()) == 1000 and file.pipeline("p999").train.seed == 999


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train=5", "train.seed=1"], "--set train: must be a mapping"),
        (["schedule=x", "schedule.cron=1"], "schedule was set to 'x' before"),
        (["sample.prompts=&a [*a]"], "--set sample.prompts: aliases"),
        (["sample.prompts=" + "[" * 5000], "--set sample.prompts: .*more than 20 deep"),
        (["train.seed=!!python/name:os.system x"], "--set train.seed: tags"),
        (["schedule.interval=0"], "schedule.interval: .*greater than or equal to 1"),
        (["=5"], "section.key=value"),
    ],
)
def test_overrides_are_read_as_strictly_as_the_file(tmp_path: Path, overrides: list[str], said: str) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {tiny: {}}")
    with pytest.raises(ConfigError, match=said):
        PipelinesFile(tmp_path / "pipelines.yaml").pipeline("tiny", overrides)


def test_overrides_read_dates_as_text_and_numbers_as_in_yaml_1_2() -> None:
    given = ["sample.prompts=[2026-13-45, on]", "train.learning_rate=1e-3", "train.seed=null"]
    assert parse_overrides(given) == {
        "sample": {"prompts": ["2026-13-45", "on"]},
        "train": {"learning_rate": 0.001, "seed": None},
    }


@pytest.mark.parametrize(
    "shape",
    [
        {"emb_dim": 65_536, "n_heads": 1024, "n_layers": 1024},
        {"emb_dim": 65_536, "n_heads": 1, "context_length": 1_048_576},
        {"size": "gpt2-xl", "n_layers": 1024},
    ],
)
def test_a_model_larger_than_the_memory_of_this_machine_is_refused_with_its_size(shape: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"parameters take at least [0-9,.]+ GiB .* this machine has [0-9,.]+ GiB"):
        memory.check(ModelConfig(**shape), TrainConfig(device="cpu"))


def test_a_batch_too_large_for_memory_is_refused_and_parameters_are_counted_as_in_the_book() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size 65536"):
        memory.check(ModelConfig(size="gpt2-xl"), TrainConfig(device="cpu", batch_size=65_536))
    assert memory.num_parameters(ModelConfig(size="gpt2"), 50_257) == 163_009_536  # as published in the book
    memory.check(ModelConfig(), TrainConfig())


def test_a_width_of_a_billion_is_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"emb_dim: .*less than or equal to 65536"):
        parse(ModelConfig, {"emb_dim": 10**9}, "model")


STRANGE_PLACES = [
    *("\0", "a\0", "x" * 5000, "~nosuchuser/x", "~\0", "a**b", "**", "[", "[z-a]", "\ud800*", "", " ", "*" * 200),
    *("http://", "http://\0/", "http://\ud800/", "http://a:x/", "http://a b/", "https://[", "::", "zip://x::http://y"),
    *("reference://x", "nonsense://x", "://", "http:/x", "python-docs ", "file://" + "x" * 5000),
]
PLACES = st.text(st.characters(blacklist_characters="/~"), max_size=12) | st.sampled_from(STRANGE_PLACES)


@PER_TEST
@given(source=PLACES)
def test_any_string_is_a_source_or_is_refused_as_one(source: str) -> None:
    base = Path(__file__).parent / "nowhere"
    try:
        sources.check([source], base)
    except CorpusError as refused:
        assert len(str(refused)) < 12_000
    else:
        assert source == sources.PYTHON_DOCS or sources.scheme_of(source) is not None


@pytest.mark.parametrize("override", ["corpus.sources=notes/", "corpus.sources=[notes/]", "corpus={sources: notes/}"])
def test_one_source_may_be_given_without_brackets(tmp_path: Path, override: str) -> None:
    (tmp_path / "pipelines.yaml").write_text("pipelines: {one: {corpus: {exclude: drafts/}}}")
    pipeline = PipelinesFile(tmp_path / "pipelines.yaml").pipeline("one", (override,))
    assert pipeline.corpus.sources == (str(tmp_path / "notes"),)
    assert pipeline.corpus.exclude == ("drafts/",)

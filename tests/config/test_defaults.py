"""The defaults of a pipeline, which a file may leave out, and what their change means for pipelines and trainings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows.config.defaults import MODEL, TRAIN
from flows.config.pipelines import Pipeline, PipelinesFile
from flows.registry.lineage import run_key, settings_key
from flows.retrain.changed_settings import describe_changed_settings
from gptcore.config import ModelConfig, RunConfig, TrainConfig
from gptcore.errors import ConfigError
from gptcore.training.resolve import find_training_version

SPLIT = "block_bytes: 2048, val_fraction: 0.05, holdout_fraction: 0.05"
MACHINE = "device: cpu, precision: fp32, compile: false, threads: 1"


def read(directory: Path, text: str) -> Pipeline:
    (directory / "pipelines.yaml").write_text(f"pipelines: {{one: {text}}}")
    return PipelinesFile(directory / "pipelines.yaml").pipeline("one")


def chosen(pipeline: Pipeline) -> tuple[str, str, float]:
    return pipeline.model.recipe, pipeline.train.optimizer, pipeline.train.learning_rate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", ("modern", "muon", 0.02)),
        ("{train: {optimizer: adamw}}", ("modern", "adamw", 0.001)),
        ("{model: {recipe: gpt2}, train: {optimizer: muon}}", ("gpt2", "muon", 0.02)),
        ("{train: {learning_rate: 0.3}}", ("modern", "muon", 0.3)),
        ("{train: {start_from: champion}}", ("gpt2", "adamw", 0.001)),
        ("{model: {recipe: modern}, train: {start_from: champion, optimizer: muon}}", ("modern", "muon", 0.02)),
    ],
)
def test_a_pipeline_has_the_recipe_and_optimizer_that_learn_most_unless_it_names_others_or_starts_warm(
    tmp_path: Path, text: str, expected: tuple[str, str, float]
) -> None:
    assert chosen(read(tmp_path, text)) == expected


def test_the_library_and_the_shipped_verdict_keep_the_books_choices() -> None:
    assert (ModelConfig().recipe, TrainConfig().optimizer, TrainConfig().learning_rate) == ("gpt2", "adamw", 0.001)
    assert chosen(Pipeline(name="one", model_name="gpt-one")) == ("modern", "muon", 0.02)
    shipped = PipelinesFile(Path(__file__).parents[2] / "pipelines.yaml")
    assert chosen(shipped.pipeline("verdict")) == ("gpt2", "adamw", 5e-4)
    assert "recipe" in shipped.data["pipelines"]["verdict"]["model"]


@pytest.mark.parametrize(
    ("text", "key", "settings"),
    [
        (  # both keys as a release computed them that had other defaults and another arithmetic of the warm-up
            f"{{corpus: {{{SPLIT}}}, model: {{recipe: gpt2}}, train: {{optimizer: adamw, {MACHINE}}}}}",
            "5a19aee54bfcf8f555d9a39430406c01850245ee4c4d1e3ae31e232e17a1ba53",
            "02802e96ec4b615035598eaafc6759af4fafd9bd1253095537dd8c36ed3076fa",
        ),
        (
            f"{{corpus: {{{SPLIT}}}, train: {{start_from: champion, schedule: constant, {MACHINE}}}}}",
            "6c51d27413929d1818f2713b42d9adcf8dd498684fffb833b4927d4fda85de16",
            "3efc8b04038c78cd471f457b87b1d1526e28423551605125b57927b316a8f085",
        ),
    ],
)
def test_a_training_that_the_new_defaults_do_not_concern_keeps_its_keys(
    tmp_path: Path, text: str, key: str, settings: str
) -> None:
    pipeline = read(tmp_path, text)
    start = "cd" * 32 if pipeline.train.start_from == "champion" else None
    tokens = cast(Any, SimpleNamespace(sha256="ab" * 32, n_vocab=257))
    version = find_training_version(pipeline.train, is_warm_start=start is not None)
    assert (run_key(pipeline, tokens, version, start), settings_key(pipeline)) == (key, settings)


BOOK = {"model": {"recipe": "gpt2"}, "train": {"optimizer": "adamw", "learning_rate": 0.001}}


@pytest.mark.parametrize(
    ("text", "then", "said"),
    [
        (
            "{}",
            BOOK,
            "model.recipe gpt2 -> modern, train.optimizer adamw -> muon, train.learning_rate 0.001 -> 0.02; these are "
            "the defaults now: to keep the old ones, set model.recipe: gpt2 and train.optimizer: adamw",
        ),
        (
            "{model: {recipe: gpt2}, train: {learning_rate: 0.001}}",
            BOOK,
            "train.optimizer adamw -> muon; these are the defaults now: to keep the old ones, set train.optimizer: "
            "adamw (train.learning_rate 0.001 stays; muon's default is 0.02)",
        ),
        (
            "{model: {recipe: modern}, train: {optimizer: muon}}",
            {"train": {"optimizer": "muon", "learning_rate": 0.001}},
            "train.learning_rate 0.001 -> 0.02; these are the defaults now: to keep the old ones, set "
            "train.learning_rate: 0.001",
        ),
        ("{train: {optimizer: adamw, seed: 5}}", {"train": {"seed": 1}}, "train.seed 1 -> 5"),
    ],
)
def test_what_is_new_and_how_to_have_the_old_is_said_in_one_line(
    tmp_path: Path, text: str, then: dict[str, Any], said: str
) -> None:
    assert describe_changed_settings(read(tmp_path, text), then, None) == said


def test_a_training_that_another_release_computes_differently_is_named_with_both_versions(tmp_path: Path) -> None:
    pipeline = read(tmp_path, "{train: {warmup_steps: 10}}")
    recorded = RunConfig(
        training_version=2,
        tokens="tokens",
        tokens_sha256="ab" * 32,
        model=MODEL,
        vocab_size=257,
        train=TRAIN.model_copy(update={"warmup_steps": 10}),
        run_key="ab" * 32,
    )
    then = recorded.model_dump(mode="json", include={"model", "train"})
    said = "this release trains it with other arithmetic (training version 2 -> 3)"
    assert describe_changed_settings(pipeline, then, recorded) == said


def test_a_warm_up_that_the_budget_does_not_outlast_is_refused_with_both_values(tmp_path: Path) -> None:
    assert read(tmp_path, "{train: {max_steps: 10, warmup_steps: 9}}").train.warmup_steps == 9
    refused = r"yaml:1: pipelines.one.train.warmup_steps: warmup_steps 10 are not fewer than the 10 updates"
    with pytest.raises(ConfigError, match=refused):
        read(tmp_path, "{train: {max_steps: 10, warmup_steps: 10}}")

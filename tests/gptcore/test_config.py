"""The configuration: wrong keys and values are refused, with messages that name the problem."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gptcore import config
from gptcore.config import CorpusConfig, MachineSettings, ModelConfig, RunConfig, SampleConfig, Start, TrainConfig
from gptcore.errors import ConfigError
from gptcore.sections import Section, check, parse

SECTIONS = [section for section in Section.__subclasses__() if section.__module__ == "gptcore.config"]
RUN = {
    "training_version": 1,
    "tokens": "../tokens",
    "tokens_sha256": "ab" * 32,
    "model": {"size": "nano", "n_layers": 2},
    "vocab_size": 257,
    "train": {"max_epochs": 3, "threads": 2, "patience": 4, "device": "cpu", "precision": "fp32", "compile": False},
    "run_key": "cd" * 32,
}


def refusal(section, given) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(section, given, "file.yaml")
    return str(caught.value)


def test_the_error_for_an_unknown_key_suggests_the_nearest_known_key():
    assert refusal(TrainConfig, {"learning_rat": 1e-3}) == (
        "file.yaml: learning_rat: there is no such key; did you mean learning_rate?"
    )


def test_the_error_for_an_unknown_key_that_resembles_no_other_lists_all_known_keys():
    message = refusal(TrainConfig, {"zzzz": 1})
    assert all(key in message for key in TrainConfig.model_fields)


def test_an_unknown_key_inside_a_section_is_named_with_its_path():
    message = refusal(RunConfig, {**RUN, "model": {"emb_dimm": 64}})
    assert "file.yaml: model.emb_dimm: there is no such key; did you mean emb_dim?" in message


@pytest.mark.parametrize(
    ("section", "given"),
    [
        (TrainConfig, {"batch_size": True}),
        (TrainConfig, {"batch_size": "4"}),
        (TrainConfig, {"batch_size": 4.5}),
        (TrainConfig, {"learning_rate": "1e-3"}),
        (TrainConfig, {"learning_rate": False}),
        (TrainConfig, {"seed": None}),
        (TrainConfig, {"threads": "4"}),
        (ModelConfig, {"qkv_bias": 1}),
        (ModelConfig, {"qkv_bias": "yes"}),
        (CorpusConfig, {"sources": 1}),
        (CorpusConfig, {"sources": [1]}),
        (SampleConfig, {"temperatures": ["0.8"]}),
        (SampleConfig, {"prompts": "The"}),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_and_value(section, given):
    (key, value), *_ = given.items()
    message = refusal(section, given)
    assert f"file.yaml: {key}" in message and repr(value).strip("[]") in message


def test_an_integer_is_accepted_as_a_float_and_a_list_as_a_tuple():
    assert parse(TrainConfig, {"learning_rate": 1}, "x").learning_rate == 1.0
    assert parse(CorpusConfig, {"sources": ["a", "b"]}, "x").sources == ("a", "b")


@pytest.mark.parametrize(
    ("section", "key", "value", "range_said"),
    [
        (TrainConfig, "learning_rate", -1, "greater than 0"),
        (TrainConfig, "learning_rate", 0, "greater than 0"),
        (TrainConfig, "learning_rate", float("nan"), "finite"),
        (TrainConfig, "max_seconds", float("inf"), "finite"),
        (TrainConfig, "weight_decay", -0.1, "greater than or equal to 0"),
        (TrainConfig, "batch_size", 0, "greater than or equal to 1"),
        (TrainConfig, "max_epochs", 0, "greater than or equal to 1"),
        (TrainConfig, "eval_every", 0, "greater than or equal to 1"),
        (TrainConfig, "eval_batches", 0, "greater than or equal to 1"),
        (TrainConfig, "seed", 2**63, "less than"),
        (TrainConfig, "threads", 0, "greater than or equal to 1"),
        (TrainConfig, "precision", "fp16", "'auto', 'fp32' or 'bf16'"),
        (TrainConfig, "device", "gpu", "pattern"),
        (ModelConfig, "context_length", 0, "greater than or equal to 1"),
        (ModelConfig, "drop_rate", 1.0, "less than 1"),
        (ModelConfig, "size", "huge", "'nano', 'mini'"),
        (CorpusConfig, "val_fraction", 0, "greater than 0"),
        (CorpusConfig, "tokenizer", "bpe:100", "between 257 and 200000"),
        (CorpusConfig, "tokenizer", "../x", "pattern"),
        (CorpusConfig, "sources", [], "at least 1 item"),
        (CorpusConfig, "block_bytes", 10, "greater than or equal to 64"),
        (SampleConfig, "top_p", 0, "greater than 0"),
        (SampleConfig, "top_k", 0, "greater than or equal to 1"),
        (SampleConfig, "temperatures", [-1], "greater than or equal to 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_range(section, key, value, range_said):
    message = refusal(section, {key: value})
    assert key in message and range_said in message


def test_every_problem_is_reported_at_once():
    built, problems = check(TrainConfig, {"batch_size": 0, "learning_rate": -1, "sed": 1})
    assert built is None
    assert [path for path, _ in problems] == [("batch_size",), ("learning_rate",), ("sed",)]


def test_a_problem_that_involves_several_keys_is_reported_for_the_section():
    message = refusal(TrainConfig, {"max_steps": None})
    assert message == "file.yaml: no budget: give at least one of max_steps, max_epochs, max_tokens, max_seconds"


def test_a_width_that_the_heads_do_not_divide_is_refused_with_the_nearest_valid_widths():
    message = refusal(ModelConfig, {"emb_dim": 100, "n_heads": 3})
    assert "emb_dim 100" in message and "n_heads 3" in message and "99 and 102" in message


def test_the_heads_of_a_named_size_are_checked_against_an_overridden_width():
    assert "n_heads 12" in refusal(ModelConfig, {"size": "gpt2", "emb_dim": 770})


def test_a_size_gives_the_shape_and_the_other_fields_override_it_one_by_one():
    shape = parse(ModelConfig, {"size": "gpt2", "context_length": 256, "n_layers": 2}, "x").shape()
    assert shape == {"context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 2}


# Radford et al. 2019, table 2: layers and width.
@pytest.mark.parametrize(
    ("size", "layers", "width"),
    [("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600)],
)
def test_the_sizes_of_gpt2_are_the_published_ones(size, layers, width):
    shape = ModelConfig(size=size).shape()
    assert (shape["n_layers"], shape["emb_dim"], shape["context_length"]) == (layers, width, 1024)
    assert width // shape["n_heads"] == 64


def test_the_cfg_of_a_run_with_the_books_components_has_the_seven_keys_of_the_book():
    assert parse(RunConfig, RUN, "x").cfg() == {
        "vocab_size": 257,
        "context_length": 64,
        "emb_dim": 128,
        "n_heads": 4,
        "n_layers": 2,
        "drop_rate": 0.0,
        "qkv_bias": False,
    }


@pytest.mark.parametrize("budget", [{"max_epochs": 2}, {"max_tokens": 100}, {"max_seconds": 1.5}])
def test_another_budget_replaces_the_default_number_of_steps(budget):
    assert parse(TrainConfig, budget, "x").max_steps is None


def test_an_explicit_number_of_steps_is_kept_beside_another_budget():
    both = parse(TrainConfig, {"max_steps": 7, "max_epochs": 2}, "x")
    assert (both.max_steps, both.max_epochs) == (7, 2)


def test_without_any_budget_the_default_number_of_steps_applies():
    assert TrainConfig().max_steps == 1000
    assert parse(TrainConfig, {"max_epochs": None}, "x").max_steps == 1000


def test_switching_off_every_budget_is_refused():
    assert "no budget" in refusal(TrainConfig, {"max_steps": None, "max_epochs": None})


def test_fractions_that_leave_nothing_to_train_on_are_refused_with_both_values():
    message = refusal(CorpusConfig, {"val_fraction": 0.6, "holdout_fraction": 0.4})
    assert "0.6" in message and "0.4" in message


def test_a_run_config_survives_a_round_trip_through_json():
    run = parse(RunConfig, RUN, "x")
    assert parse(RunConfig, json.loads(run.model_dump_json()), "x") == run
    assert run.train.max_steps is None


@pytest.mark.parametrize("start", ["scratch", "champion", "models:/gpt-a/12", "models:/my model@champion"])
def test_training_starts_from_scratch_the_champion_or_a_version_with_a_number_or_alias(start):
    assert parse(TrainConfig, {"start_from": start}, "x").start_from == start


@pytest.mark.parametrize(
    "start", ["", "best", "models:/gpt-a", "models:/gpt-a/", "models:/a/b/1", "gpt-a/1", "models:/a/x"]
)
def test_any_other_start_is_refused_with_the_given_value(start):
    message = refusal(TrainConfig, {"start_from": start})
    assert "start_from" in message and repr(start) in message


def test_a_run_config_names_the_version_it_starts_from_by_its_number_and_hash():
    start = {"uri": "models:/gpt-a/3", "weights_sha256": "ab" * 32}
    run = parse(RunConfig, {**RUN, "start": start}, "x")
    assert run.start == Start(**start) and parse(RunConfig, json.loads(run.model_dump_json()), "x") == run
    assert "start.uri" in refusal(RunConfig, {**RUN, "start": {**start, "uri": "models:/gpt-a@champion"}})
    assert "start.weights_sha256" in refusal(RunConfig, {**RUN, "start": {**start, "weights_sha256": "ab"}})


def test_a_run_config_keeps_what_its_run_key_was_computed_with_when_it_is_executed_otherwise():
    began = parse(RunConfig, RUN, "x")
    elsewhere = began.with_train(began.train.model_copy(update={"device": "mps", "threads": 1}))
    assert (elsewhere.train.device, elsewhere.train.threads) == ("mps", 1)
    assert elsewhere.machine_in_run_key == began.machine_in_run_key == MachineSettings.of(began.train)
    assert parse(RunConfig, json.loads(elsewhere.model_dump_json()), "x") == elsewhere
    assert elsewhere.with_train(began.train) == began


def test_recorded_settings_stand_for_auto_and_for_any_number_of_threads_but_not_for_an_explicit_change():
    recorded = MachineSettings(device="cuda", precision="bf16", compile=True, threads=8)
    assert MachineSettings.of(recorded.fill_in(TrainConfig())) == recorded
    explicit = recorded.fill_in(TrainConfig(device="cpu", precision="fp32", threads=1))
    assert MachineSettings.of(explicit) == MachineSettings(device="cpu", precision="fp32", compile=True, threads=8)


def test_a_section_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().seed = 1


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_description(section):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("section", [CorpusConfig, ModelConfig, TrainConfig, SampleConfig])
def test_every_field_has_a_default_that_its_own_rules_accept(section):
    assert parse(section, json.loads(section().model_dump_json()), "x") == section()


def test_importing_the_configuration_loads_neither_torch_nor_numpy():
    code = "import sys, gptcore.config; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    root = Path(config.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

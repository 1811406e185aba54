"""Samples: how they are written, and their statistics compared with brute force and counting by hand."""

import json
import random
from difflib import SequenceMatcher

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import SampleConfig
from gptcore.evaluation import samples as module
from gptcore.evaluation.samples import Sample, compute_distinct, find_longest_copies, render_samples, write_samples
from gptcore.generation.generate import generate
from gptcore.model.gpt import GPTModel
from tests.tiny import TINY_CFG, prose


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return GPTModel({**TINY_CFG, "drop_rate": 0.5})


@pytest.fixture
def train_text(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def brute_force(text, corpus):
    lengths = (length for length in range(len(text), 0, -1))
    return next((n for n in lengths if any(text[i : i + n] in corpus for i in range(len(text) - n + 1))), 0)


@settings(max_examples=60)
@given(st.lists(st.text("abé世", max_size=40), max_size=3), st.text("abé世\r\n", max_size=400), st.integers(1, 50))
def test_the_longest_copy_is_as_long_as_brute_force_finds_and_is_in_both_texts(tmp_path_factory, texts, corpus, size):
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_bytes(corpus.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_CHARS", size)
        found = find_longest_copies(texts, path)
    assert [len(copy) for copy in found] == [brute_force(text, corpus) for text in texts]
    assert all(copy in corpus and copy in text for copy, text in zip(found, texts))


def test_the_longest_copy_agrees_with_difflib_on_prose(tmp_path):
    corpus, text = prose(0, 600), prose(1, 120)
    (tmp_path / "train.txt").write_text(corpus)
    match = SequenceMatcher(None, text, corpus, autojunk=False).find_longest_match()
    assert len(find_longest_copies([text], tmp_path / "train.txt")[0]) == match.size


def test_a_copy_across_several_chunks_is_found_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_CHARS", 64)
    secret = "".join(random.Random(1).choices("abcdefghij", k=200))
    (tmp_path / "train.txt").write_text("-" * 50 + secret + "-" * 50)
    assert find_longest_copies([f"?{secret}?", "-?"], tmp_path / "train.txt") == [secret, "-"]


def test_repeated_words_are_counted_as_by_hand():
    words = ["a", "b", "a", "b", "a", "b"]
    assert compute_distinct(words, 1) == 2 / 6
    assert compute_distinct(words, 2) == 2 / 5
    assert 1 - compute_distinct(words, 4) == pytest.approx(1 / 3)  # abab baba abab: the third run repeats the first
    assert compute_distinct([], 1) == compute_distinct(["a"], 2) == 1.0


def test_each_prompt_is_continued_at_each_temperature_with_a_seed_that_repeats_the_sample(
    model, tokenizer, train_text, tmp_path
):
    cfg = SampleConfig(prompts=("The", "Fox"), temperatures=(0.0, 1.0), max_new_tokens=12, top_k=None)
    found = write_samples(model, tokenizer, cfg, 7, train_text, tmp_path)
    assert [(sample.prompt, sample.temperature, sample.seed) for sample in found] == [
        ("The", 0.0, 7),
        ("The", 1.0, 8),
        ("Fox", 0.0, 9),
        ("Fox", 1.0, 10),
    ]
    last = found[-1]
    model.eval()
    again = generate(
        model, tokenizer.encode("Fox"), 12, temperature=1.0, top_k=None, top_p=1.0, seed=10, eos_id=tokenizer.eot
    )
    assert tokenizer.decode(list(again)) == last.text
    assert last.longest_copied == len(last.copied_text) == brute_force(last.text, train_text.read_text())
    assert found == write_samples(model, tokenizer, cfg, 7, train_text, tmp_path)


def test_an_empty_prompt_starts_from_the_end_of_text_id_alone(model, tokenizer, train_text, tmp_path):
    cfg = SampleConfig(prompts=("",), temperatures=(0.0,), max_new_tokens=5)
    sample = write_samples(model, tokenizer, cfg, 0, train_text, tmp_path)[0]
    model.eval()
    ids, drawn = [tokenizer.eot], []
    while len(drawn) < 5:
        drawn.append(int(model(torch.tensor([ids + drawn]))[0, -1].argmax()))
    assert sample.text == tokenizer.decode(drawn)


def test_writing_samples_changes_neither_the_mode_nor_the_random_state(model, tokenizer, train_text, tmp_path):
    state = torch.get_rng_state()
    write_samples(model, tokenizer, SampleConfig(max_new_tokens=3), 0, train_text, tmp_path)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_samples_are_written_as_json_and_as_a_page_for_people(model, tokenizer, train_text, tmp_path):
    found = write_samples(model, tokenizer, SampleConfig(max_new_tokens=5), 0, train_text, tmp_path)
    assert [Sample(**row) for row in json.loads((tmp_path / "samples.json").read_text())] == found
    assert (tmp_path / "samples.md").read_text() == render_samples(found)
    assert [sample.prompt for sample in found] == ["The", "The", "In", "In", "When", "When"]


def test_the_page_shows_prompt_and_continuation_unchanged():
    sample = Sample("# Once\n", 0.5, 3, "upon <b>a</b> *time*\n\nend", 4, 1.0, 1.0, 0.25, 9, "upon <b>a")
    page = render_samples([sample])
    assert "    # Once\n    upon <b>a</b> *time*\n    \n    end\n" in page
    assert "repeated 4-word runs 25%, longest run copied from the training text 9 characters" in page

"""Wrong and extreme calls of the library: input is cropped, clamped or refused, as documented."""

import subprocess
import sys
import threading
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.errors import ConfigError, TokenizerError
from gptcore.evaluation.bits_per_byte import evaluate_model, score_blocks
from gptcore.evaluation.plots import plot_losses
from gptcore.generation.generate import generate, generate_text_simple
from gptcore.tokens.tokenizer import get_tokenizer
from tests.evaluation.test_bits_per_byte import TEXTS, loader, model
from tests.generation.test_generate import plain_loop, seeded_model, some_ids
from tests.training.test_loop import run_simple, weights_of

__all__ = ["model"]


def test_a_long_prompt_is_cropped_to_its_last_tokens():
    model = seeded_model()
    long = some_ids(40).tolist()
    assert list(generate(model, long, 5, temperature=0)) == list(generate(model, long[-16:], 5, temperature=0))
    cropped = generate_text_simple(model, torch.tensor([long]), 5, context_size=10**9)
    assert cropped[:, 40:].tolist() == plain_loop(model, torch.tensor([long]), 5, 16)[:, 40:].tolist()


def test_generate_text_simple_refuses_an_empty_prompt_too():
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate_text_simple(seeded_model(), torch.empty(1, 0, dtype=torch.long), 5, 16)


@pytest.mark.parametrize(
    ("ids", "wrong", "message"),
    [
        ([], {}, "no tokens"),
        ([1, 257], {}, "257 .* 257"),
        ([-1], {}, "-1 .* 257"),
        ([1], {"temperature": -0.1}, r"temperature is -0\.1"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"top_p": 0.0}, r"top_p is 0\.0"),
        ([1], {"top_p": 1.5}, r"top_p is 1\.5"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"seed": 2**64}, "seed is 18446744073709551616"),
        ([[1], [2]], {"eos_id": 3}, r"one row of whole numbers, found \[\[1\], \[2\]\]"),
        (torch.ones(2, 1, dtype=torch.long), {"eos_id": 3}, "several prompts to generate_batch"),
        ([1.5], {}, "whole numbers"),
        (["a"], {}, "whole numbers"),
    ],
)
def test_wrong_input_is_refused_at_the_call(ids, wrong, message):
    with pytest.raises(ConfigError, match=message):
        generate(seeded_model(), ids, 5, **wrong)


@pytest.mark.parametrize("wrong", [257, 10**9, -1])
def test_an_id_outside_the_vocabulary_is_named_by_model_and_tokenizer(wrong):
    with pytest.raises(ConfigError, match=f"token id {wrong} is outside the model's vocabulary of 257 ids"):
        seeded_model()(torch.tensor([[1, wrong]]))
    with pytest.raises(TokenizerError, match=f"token id {wrong} is not in the vocabulary bytes"):
        get_tokenizer("bytes").decode([104, wrong])


@pytest.mark.parametrize("top_k", [257, 258, 10**18])
def test_a_top_k_above_the_vocabulary_size_keeps_every_token(top_k):
    draw = lambda **settings: list(generate(seeded_model(), [1, 2], 30, seed=4, **settings))  # noqa: E731
    assert draw(top_k=top_k) == draw(top_k=257)


def test_temperature_zero_is_greedy():
    model = seeded_model()
    greedy = generate_text_simple(model, some_ids(1, 4), 12, 16)[0, 4:].tolist()
    assert list(generate(model, some_ids(4).tolist(), 12, temperature=0)) == greedy
    assert list(generate(model, some_ids(4).tolist(), 12, top_k=1, seed=1)) == greedy
    assert list(generate(model, some_ids(4).tolist(), 12, top_p=1e-9, seed=1)) == greedy
    assert list(generate(model, some_ids(4).tolist(), 12, temperature=1e-40, seed=1)) == greedy


@pytest.mark.parametrize("setting", [{"temperature": 5e-324}, {"top_p": 5e-324}, {"top_p": 1e-60, "top_k": 3}])
def test_settings_too_small_for_the_arithmetic_take_the_likeliest_token(setting):
    greedy = list(generate(seeded_model(), [1, 2], 10, temperature=0))
    assert list(generate(seeded_model(), [1, 2], 10, seed=1, **setting)) == greedy


def test_generation_stops_at_the_end_of_text_and_does_not_yield_it():
    model = seeded_model()
    all_ids = list(generate(model, [3], 20, temperature=0))
    end = all_ids[7]
    assert list(generate(model, [3], 20, temperature=0, eos_id=end)) == all_ids[: all_ids.index(end)]


def test_prompts_that_are_continued_side_by_side_stop_independently():
    model = seeded_model()
    alone = {first: list(generate(model, [first], 20, temperature=0)) for first in (3, 5, 9)}
    end = alone[3][4]
    streams = [generate(model, [first], 20, temperature=0, eos_id=end) for first in alone]
    rows = [[token for token in row if token is not None] for row in zip(*zip_longest(*streams))]
    assert rows == [ids[: ids.index(end)] if end in ids else ids for ids in alone.values()]
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_modes_random_states_generators_and_gradients_alone(model, tokenizer, training):
    model.train(training)
    model.trf_blocks[0].train(not training)
    modes = [part.training for part in model.modules()]
    loaders = loader(seed=1, shuffle=True), loader(shuffle=True), loader(seed=2)
    state = torch.get_rng_state()
    order = [batch[0].tolist() for batch in loaders[0]]
    for each in (loaders[0], loaders[2]):
        each.generator.manual_seed(3)
    order = [batch[0].tolist() for batch in loaders[0]]
    loaders[0].generator.manual_seed(3)
    torch.set_rng_state(state)
    evaluate_model(model, loaders[0], loaders[1], "cpu", None)
    evaluate_model(model, loaders[2], loaders[1], "cpu", 1)
    list(score_blocks(model, tokenizer, TEXTS, "cpu"))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch[0].tolist() for batch in loaders[0]] == order
    assert torch.equal(loaders[2].generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_train_model_simple_trains_the_same_weights_at_any_evaluation_frequency():
    one, other = (run_simple(eval_freq, num_epochs=2, drop_rate=0.1)[0] for eval_freq in (1, 7))
    assert weights_of(one) == weights_of(other)


def test_plots_need_neither_pyplot_nor_a_display(tmp_path):
    code = (
        "import sys; from gptcore.evaluation.plots import plot_losses; assert 'matplotlib' not in sys.modules;"
        "plot_losses([0, 1], [0, 9], [2.0, 1.0], [2.0, 1.5]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_threads_without_a_display_write_their_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    failed: list[Any] = []

    def draw(number: int) -> None:
        try:
            figure = plot_losses([0, 1], [0, 9], [2.0, 1.0], [2.0, 1.5], path=tmp_path / f"{number}.pdf")
            figure.savefig(tmp_path / f"{number}.png")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert all((tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG") for number in range(3))

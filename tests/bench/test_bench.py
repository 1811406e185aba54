"""The benchmark against other implementations, in a few seconds: what is counted, compared and written."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as program
from bench import forgetting, muon, plain, report, serving
from bench.contender import contender
from bench.encoders import OURS, TIKTOKEN
from bench.peers import first_weights
from bench.shapes import SHAPES, Shape
from bench.steps import Steps, Timed
from bench.tokenizing import measure_tokenizing
from gptcore.evaluation.compare import Comparison

TINY = Shape("M", 2, 2, 32, 256, 2, 300, rounds=2)


def test_flops_by_formula_equal_pytorchs_count_without_the_masked_half_of_attention() -> None:
    model = plain.GPTModel(TINY.cfg(0.0))
    with FlopCounterMode(display=False) as counter:
        plain.loss(model, *TINY.batch(0)).backward()
    masked = 6 * TINY.batch_size * TINY.context_length * TINY.n_layers * TINY.emb_dim * TINY.context_length
    assert counter.get_total_flops() == TINY.step_flops + masked


@pytest.mark.deep
def test_every_contender_has_the_same_losses_and_the_figures_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made" / "bench.json"
    command = "bench --shapes M --only step --contenders plain --quick --rounds 2 --threads 1 --json".split()
    monkeypatch.setattr(sys, "argv", [*command, str(file)])
    monkeypatch.setitem(SHAPES, "M", TINY)
    assert program.main() == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    (step,) = found["step"]
    ours, theirs = step["contenders"]["ours"], step["contenders"]["plain"]
    assert step["ratio"] == pytest.approx(theirs["median_seconds"] / ours["median_seconds"])
    assert f"{step['ratio']:.2f}x" in printed
    assert len(ours["losses"]) == 4 and len(ours["seconds"]) == 2
    assert 0 < theirs["loss_difference"] <= 1e-4 or theirs["losses"] == ours["losses"]
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["peak_mb"] > 50 and 0 < ours["share_of_matmul"] < 1
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("batch", [1, 3])
def test_contenders_generate_the_same_tokens(batch: int) -> None:
    asked = {"batch": batch, "prompt": 5, "new": 6}
    ours, theirs = (contender(name, TINY, 0.0, None)["generate"](**asked) for name in ("ours", "plain"))
    assert ours["ids"] == theirs["ids"] and [len(ids) for ids in ours["ids"]] == [6] * batch


def test_losses_that_differ_are_reported() -> None:
    ours = Timed("ours", (1.0, 1.0), (4.0, 3.0), 100.0)
    steps = Steps(TINY, 0.0, (100.0, 100.0), (ours, replace(ours, name="plain", losses=(4.0, 3.001))))
    (line,) = report.losses_differ([steps])
    assert "M: the losses of plain differ from ours by 3.3e-04" in line
    assert "DIFFER" in report.steps_summary([steps])
    assert report.losses_differ([replace(steps, drop_rate=0.1)]) == []


def test_peers_that_compute_another_function_may_have_other_losses() -> None:
    assert set(first_weights(TINY)) == set(plain.GPTModel(TINY.cfg(0.0)).state_dict()) - {"out_head.weight"}
    ours = Timed("ours", (1.0,), (4.0,), 100.0)
    steps = Steps(
        TINY, 0.0, (100.0,), (ours, *(replace(ours, name=name, losses=(5.0,)) for name in ("litgpt", "hf+padded")))
    )
    assert report.losses_differ([steps]) == []


def test_added_text_has_its_size_and_verdicts_that_break_a_promise_are_listed() -> None:
    for make in (forgetting.make_garbage, forgetting.make_tables):
        added = make(100_000, random.Random(1))
        assert len(added) == 80 and sum(map(len, added.values())) == pytest.approx(100_000, rel=0.01)
    prose = forgetting.read_prose(None)
    part = forgetting.take(prose, list(prose), 50_000)
    assert 40_000 < sum(len(text.encode()) for text in part.values()) <= 50_000
    compared = Comparison(2.0, 2.1, 40, 9_000, "block", 0.95, 0.05, 0.15)
    good = forgetting.Night("growth", 1, 1, True, "better", "because", 0.1, 0.05, 0.15, compared, compared)
    nights = [replace(good, number=number) for number in range(1, 9)]
    assert forgetting.list_failures(nights) == []
    assert forgetting.list_failures(nights[1:]) == ["growth, seed 1: 7 nights promoted"]
    assert forgetting.list_failures([replace(good, scenario="garbage")]) == ["garbage, seed 1: because"]
    (fooled,) = forgetting.list_failures([replace(good, scenario="copies", outside=-0.1)])
    assert fooled == "copies 1, seed 1: promoted, but by -0.100 on text that no model saw"
    assert forgetting.list_failures([replace(good, scenario="copies", outside=0.1)]) == []
    row = "| growth 1 | 1 | +0.100 (+0.050 to +0.150) | 2.100, 2.000, +0.100 (+0.050 to +0.150) |"
    assert row in forgetting.table(nights)


def test_tokenisers_encode_the_same_text_to_the_same_ids() -> None:
    made = measure_tokenizing((OURS, TIKTOKEN), 300_000, rounds=1, threads=2, text=None)
    assert 290_000 < made.num_bytes <= 300_000
    assert [one.same_ids for one in made.contenders] == [True, True]
    assert made.contenders[0].peak_mb > made.contenders[1].peak_mb, "the memory of both child processes is included"


@pytest.mark.deep
def test_a_served_model_under_load_answers_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serving.json"
    monkeypatch.setattr(sys, "argv", f"bench.serving --seconds 1 --clients 5 --max-concurrent 4 --json {file}".split())
    monkeypatch.setitem(SHAPES, "M", replace(TINY, vocab_size=50257))
    monkeypatch.setattr(serving, "_LOOP_SECONDS", 0.2)
    serving.main()
    assert "| serve-model, 5 clients | one request after the other |" in capsys.readouterr().out
    under_load = json.loads(file.read_text())["serve-model, 5 clients"]
    assert under_load["requests"] == len(under_load["answered"]) >= 5
    for one in under_load["answered"]:
        assert one["num_tokens"] <= serving.NEW_TOKENS and 0 < one["first_seconds"] <= one["seconds"]


def test_muons_share_of_a_step_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", "bench.muon --threads 1 --rounds 1 --widths 64".split())
    muon.main()
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:2] == ["|", "64"] and 0 < float(line[-2]) < 1

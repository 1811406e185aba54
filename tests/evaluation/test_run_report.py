"""The report of a finished training: it is made once, then reused, and describes the final weights."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import manifest
from gptcore.config import SampleConfig
from gptcore.corpus.snapshot import read_blocks, sample_blocks
from gptcore.errors import CheckpointError
from gptcore.evaluation.bits_per_byte import evaluate_blocks, score_blocks
from gptcore.evaluation.parallel import score_in_processes
from gptcore.evaluation.run_report import evaluate_run, plot_run, read_samples, read_scores, reported_side, sample_run
from gptcore.evaluation.weights import load_model
from gptcore.processes import ProcessPool
from gptcore.tokens.files import tokenize
from gptcore.training.batches import make_eval_batches
from gptcore.training.loop import compute_mean_loss
from gptcore.training.run_directory import RunDirectory
from tests.tiny import make_snapshot
from tests.trainings import finish, prepare

SAMPLE = SampleConfig(prompts=("The sea", ""), temperatures=(0.0, 0.8), max_new_tokens=12)
PICTURES = {"losses", "schedule", "throughput", "loss-by-position", "surprise"}


def finished(root: Path, **corpus: float):
    """Train a run directory to its end. Return it with its snapshot and tokens."""
    snapshot = make_snapshot(root, **corpus)
    tokens = tokenize(snapshot.path, "bytes", root / "tokens")
    # It ends after an evaluation that is not better than the one before.
    run = prepare(
        root / "run", tokens, learning_rate=0.05, schedule="constant", max_steps=500, eval_every=5, patience=1
    )
    finish(run)
    return run, snapshot, tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("with-holdout"))


@pytest.fixture(scope="module")
def evaluation(made):
    return evaluate_run(*made)


@pytest.fixture(scope="module")
def plots(made, evaluation):
    return plot_run(made[0], evaluation)


def stamps(directory):
    """Return name, inode and time of every file, which change if a file is written again."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files]


def test_an_evaluation_is_published_once_and_reused(made, evaluation):
    run, snapshot, _ = made
    assert evaluation.parent == run.path
    about = manifest.verify(evaluation)
    assert about["inputs"]["weights"] == run.read_result().weights_sha256
    assert about["inputs"]["corpus"] == snapshot.sha256
    before = stamps(evaluation)
    assert evaluate_run(*made) == evaluation
    assert stamps(evaluation) == before


def test_scores_are_read_as_they_were_written(evaluation):
    scores = read_scores(evaluation)
    for side, read in (("val", scores.val), ("holdout", scores.holdout)):
        assert read.to_json() == json.loads((evaluation / f"{side}.json").read_text())
        assert read.side == side


def test_memorization_and_scores_by_source_are_part_of_the_evaluation(made, evaluation, tmp_path):
    scores = read_scores(evaluation)
    found = json.loads((evaluation / "memorization.json").read_text())
    assert found == json.loads(json.dumps(asdict(scores.memorization)))
    assert found["prefix_tokens"] == 16 and found["once"]["sampled"] == 200, "half of the context of 32"
    assert scores.memorized_shares["memorized_once"] == found["once"]["completed"] / 200
    (source,) = scores.sources
    assert (source.source, source.bytes) == ("text.txt", scores.reported.bytes)
    assert source.bits_per_byte == pytest.approx(scores.reported.bits_per_byte)
    earlier = shutil.copytree(evaluation, tmp_path / "earlier")
    for name in ("memorization.json", "sources.csv"):
        (earlier / name).unlink()
    read = read_scores(earlier)
    assert (read.memorization, read.memorized_shares, read.sources) == (None, {}, ()), "an earlier release made it"
    assert read.reported == scores.reported
    (earlier / "sources.csv").write_text("source,blocks\na,1\n")
    with pytest.raises(CheckpointError, match=r"sources.csv is damaged"):
        read_scores(earlier)


def test_the_reported_score_is_the_holdouts_and_was_not_used_for_selection(made, evaluation):
    scores = read_scores(evaluation)
    assert reported_side(made[1]) == "holdout"
    assert scores.reported is scores.holdout
    assert not scores.holdout.also_used_for_selection and scores.val.also_used_for_selection
    assert scores.holdout.blocks == made[1].blocks["holdout"]
    assert scores.holdout.bytes == made[1].bytes["holdout"]


def test_a_limit_that_the_text_does_not_reach_changes_nothing(made, evaluation):
    run, snapshot, tokens = made
    before = stamps(evaluation)
    assert evaluate_run(run, snapshot, tokens, max_bytes=snapshot.bytes["val"] + 1000) == evaluation
    assert stamps(evaluation) == before
    scores = read_scores(evaluation)
    assert [one.available_bytes for one in (scores.val, scores.holdout)] == [
        one.bytes for one in (scores.val, scores.holdout)
    ]


def test_of_much_text_a_sample_is_scored_and_the_evaluation_says_of_how_much(tmp_path):
    run, snapshot, tokens = finished(tmp_path, num_words=16_000)
    evaluation = evaluate_run(run, snapshot, tokens, max_bytes=14_000)
    scores = read_scores(evaluation)
    for side, scored in (("val", scores.val), ("holdout", scores.holdout)):
        sample = sample_blocks(snapshot.path, side, 14_000)
        assert [block["sha256"] for block in scored.per_block] == [block.sha256 for block in sample]
        assert scored.bytes <= 14_000 < scored.available_bytes == snapshot.bytes[side]
        assert scored.low < scored.bits_per_byte < scored.high
    assert sum(source.bytes for source in scores.sources) == scores.reported.bytes
    shared = score_in_processes(run, tokens, snapshot.path, "holdout", 14_000)
    assert [score.num_bytes for score in shared] == [block["bytes"] for block in scores.holdout.per_block]
    whole = evaluate_run(run, snapshot, tokens)
    assert whole != evaluation and read_scores(whole).holdout.bytes == snapshot.bytes["holdout"]
    assert read_scores(whole).holdout.bits_per_byte == pytest.approx(scores.holdout.bits_per_byte, rel=0.05)


def test_a_trained_model_scores_better_than_the_uniform_baseline(evaluation):
    scores = read_scores(evaluation)
    assert scores.baselines.uniform_loss == pytest.approx(math.log(257))
    assert 0 < scores.reported.bits_per_byte < scores.baselines.uniform_bits_per_byte


def test_the_reported_weights_are_those_of_the_best_evaluation_and_not_the_last_ones(made, evaluation):
    run, snapshot, tokens = made
    result = run.read_result()
    assert result.best_step < result.steps, "the last evaluation is not the best"
    model, tokenizer = load_model(run, tokens, torch.device("cpu"))
    train = run.read_config().train
    batches = make_eval_batches(tokens.side("val"), 32, train.batch_size, train.eval_batches)
    assert compute_mean_loss(model, batches, torch.device("cpu")) == pytest.approx(result.best_val_loss, rel=1e-6)
    again = evaluate_blocks(model, tokenizer, list(read_blocks(snapshot.path, "holdout")), "cpu")
    assert read_scores(evaluation).reported.bits_per_byte == pytest.approx(again.bits_per_byte, rel=1e-6)


def test_the_surprise_file_has_the_reported_text_token_by_token(made, evaluation):
    surprise = json.loads((evaluation / "surprise.json").read_text())
    assert len(surprise["tokens"]) == len(surprise["nats"])
    text = (made[1].path / "holdout.txt").read_text()
    assert "".join(surprise["tokens"]) == text[: len("".join(surprise["tokens"]))]
    assert all(nats >= 0 for nats in surprise["nats"])


def test_without_a_holdout_the_reported_score_is_vals_and_marked_as_also_used_for_selection(tmp_path):
    run, snapshot, tokens = finished(tmp_path, holdout_fraction=0.0)
    scores = read_scores(evaluate_run(run, snapshot, tokens))
    assert reported_side(snapshot) == "val"
    assert scores.holdout is None
    assert scores.reported is scores.val and scores.reported.also_used_for_selection


def test_load_model_returns_a_model_in_eval_mode_with_its_tokenizer(made):
    run, _, tokens = made
    model, tokenizer = load_model(run, tokens, torch.device("cpu"))
    assert not model.training and tokenizer.name == "bytes"
    with torch.no_grad():
        assert model(torch.tensor([tokenizer.encode("The sea")])).shape == (1, 7, tokens.n_vocab)


def test_samples_are_published_once_and_reused(made):
    directory = sample_run(*made, SAMPLE)
    manifest.verify(directory)
    before = stamps(directory)
    assert sample_run(*made, SAMPLE) == directory
    assert stamps(directory) == before


def test_there_is_a_sample_for_each_prompt_at_each_temperature(made):
    samples = read_samples(sample_run(*made, SAMPLE))
    found = sorted((sample.prompt, sample.temperature) for sample in samples)
    assert found == [("", 0.0), ("", 0.8), ("The sea", 0.0), ("The sea", 0.8)]


def test_another_sample_config_makes_new_samples_beside_the_first(made):
    first = sample_run(*made, SAMPLE)
    before = stamps(first)
    second = sample_run(*made, SAMPLE.model_copy(update={"max_new_tokens": 5}))
    assert second != first and second.parent == first.parent
    assert stamps(first) == before


def test_plots_are_published_once_and_reused(made, evaluation, plots):
    manifest.verify(plots)
    before = stamps(plots)
    assert plot_run(made[0], evaluation) == plots
    assert stamps(plots) == before


def test_there_are_five_plots_and_the_books_pdf(plots):
    assert {path.stem for path in plots.glob("*.png")} == PICTURES
    pdf = (plots / "losses.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and b"%%EOF" in pdf[-32:] and len(pdf) > 5000


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_every_plot_shows_something(plots, name):
    from matplotlib import image

    pixels = image.imread(plots / f"{name}.png")
    height, width = pixels.shape[:2]
    assert height >= 300 and width >= 600
    inked = (pixels[..., :3].min(axis=2) < 0.9).mean()
    assert 0.005 < inked < 0.95, "neither empty nor covered"


def test_no_temporary_files_are_left_in_the_run_directory(made, plots):
    assert [path.name for path in made[0].path.iterdir() if path.name.startswith(".tmp-")] == []


def trained_on(device, made, path, **train):
    """Return the finished run directory as a training on another device would have left it."""
    run, _, tokens = made
    config = run.read_config()
    changed = {"train": config.train.model_copy(update={"device": device, **train}), "tokens": str(tokens.path)}
    path.mkdir()
    (path / "config.json").write_text(config.model_copy(update=changed).model_dump_json())
    (path / "final").symlink_to(run.final)
    return RunDirectory(path)


def test_the_gpu_of_the_training_evaluates_and_samples(made, evaluation, tmp_path, gpu):
    run = trained_on("cuda", made, tmp_path / "run", processes=2)
    gpu.products.clear()
    on_gpu, samples = evaluate_run(run, *made[1:]), sample_run(run, *made[1:], SAMPLE)
    assert gpu.products["cuda"] and not gpu.products["cpu"], "of two processes, one has a GPU: this one"
    for name in ("val.json", "holdout.json", "memorization.json", "surprise.json", "baselines.json"):
        assert json.loads((on_gpu / name).read_text()) == json.loads((evaluation / name).read_text())
    assert read_samples(samples) == read_samples(sample_run(*made, SAMPLE))


def test_a_training_of_a_gpu_is_evaluated_without_one(made, evaluation, tmp_path):
    run = trained_on("cuda:3", made, tmp_path / "run")
    assert read_scores(evaluate_run(run, *made[1:])) == read_scores(evaluation)


def test_scores_of_several_processes_are_bitwise_equal_to_those_of_one(made, tmp_path, monkeypatch):
    run, snapshot, tokens = made
    with_two = trained_on("cpu", made, tmp_path / "run", processes=2)
    submitted = []
    submit = ProcessPool.submit
    monkeypatch.setattr(ProcessPool, "submit", lambda *call: submitted.append(call[-1].index) or submit(*call))
    by_two = list(score_in_processes(with_two, tokens, snapshot.path, "holdout", group_blocks=1))
    assert submitted == [1], "the second process scored its share"
    texts = [block.text for block in read_blocks(snapshot.path, "holdout")]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    by_one = list(score_blocks(*load_model(run, tokens, torch.device("cpu")), texts, "cpu", group_blocks=1))
    torch.set_num_threads(threads)
    assert len(texts) == len(by_two) == len(by_one) >= 2
    for two, one in zip(by_two, by_one):
        assert two.num_bytes == one.num_bytes
        assert all(np.array_equal(getattr(two, name), getattr(one, name)) for name in ("ids", "nats", "ranks"))

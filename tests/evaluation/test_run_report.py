"""The report of a finished training: it is made once, then reused, and describes the final weights."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import manifest
from gptcore.config import CorpusConfig, RunConfig, SampleConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import read_blocks
from gptcore.evaluation.bits_per_byte import score_blocks
from gptcore.evaluation.parallel import score_in_processes
from gptcore.evaluation.run_report import evaluate_run, plot_run, read_samples, read_scores, reported_side, sample_run
from gptcore.evaluation.weights import load_model
from gptcore.processes import ProcessPool
from gptcore.tokens.files import tokenize
from gptcore.training.resolve import TRAINING_VERSION
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory

WORDS = (
    "the old man looked at a grey sea and said that nothing would come of it but more wind and a little rain".split()
)
SAMPLE = SampleConfig(prompts=("The sea", ""), temperatures=(0.0, 0.8), max_new_tokens=12)
PICTURES = {"losses", "schedule", "throughput", "loss-by-position", "surprise"}


def write_text(path: Path, num_bytes: int) -> None:
    """Write made-up English in paragraphs of three sentences, always the same."""
    draw = random.Random(7)
    text = ""
    while len(text) < num_bytes:
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + "." for _ in range(3))
        text += " ".join(sentences) + "\n\n"
    path.write_text(text)


def finished(root: Path, holdout_fraction: float):
    """Train a run directory to its end. Return it with its snapshot and tokens."""
    write_text(root / "text.txt", 4500)
    asked = {"sources": ("text.txt",), "tokenizer": "bytes", "block_bytes": 256}
    snapshot = ingest(
        CorpusConfig(**asked, val_fraction=0.2, holdout_fraction=holdout_fraction), root / "corpora", root
    )
    tokens = tokenize(snapshot.path, "bytes", root / "tokens")
    run = RunDirectory(root / "run")
    train = {"max_steps": 40, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 5, "device": "cpu", "threads": 1}
    run.prepare(
        RunConfig(
            training_version=TRAINING_VERSION,
            tokens="../tokens/" + tokens.path.name,
            tokens_sha256=tokens.sha256,
            model={"context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1},
            vocab_size=tokens.n_vocab,
            train={**train, "precision": "fp32", "compile": False},
            run_key="ab" * 32,
        )
    )
    train_directory(run.path, Stop())
    return run, snapshot, tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("with-holdout"), 0.2)


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


def test_the_reported_score_is_the_holdouts_and_was_not_used_for_selection(made, evaluation):
    scores = read_scores(evaluation)
    assert reported_side(made[1]) == "holdout"
    assert scores.reported is scores.holdout
    assert not scores.holdout.also_used_for_selection and scores.val.also_used_for_selection
    assert scores.holdout.blocks == made[1].blocks["holdout"]
    assert scores.holdout.bytes == made[1].bytes["holdout"]


def test_a_trained_model_scores_better_than_the_uniform_baseline(evaluation):
    scores = read_scores(evaluation)
    assert scores.baselines.uniform_loss == pytest.approx(math.log(257))
    assert 0 < scores.reported.bits_per_byte < scores.baselines.uniform_bits_per_byte


def test_the_surprise_file_has_the_reported_text_token_by_token(made, evaluation):
    surprise = json.loads((evaluation / "surprise.json").read_text())
    assert len(surprise["tokens"]) == len(surprise["nats"])
    text = (made[1].path / "holdout.txt").read_text()
    assert "".join(surprise["tokens"]) == text[: len("".join(surprise["tokens"]))]
    assert all(nats >= 0 for nats in surprise["nats"])


def test_without_a_holdout_the_reported_score_is_vals_and_marked_as_also_used_for_selection(tmp_path):
    run, snapshot, tokens = finished(tmp_path, 0.0)
    scores = read_scores(evaluate_run(run, snapshot, tokens))
    assert reported_side(snapshot) == "val"
    assert scores.holdout is None
    assert scores.reported is scores.val and scores.reported.also_used_for_selection


def test_load_model_returns_a_model_in_eval_mode_with_its_tokenizer(made):
    run, _, tokens = made
    model, tokenizer = load_model(run, tokens)
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


def test_scores_of_several_processes_are_bitwise_equal_to_those_of_one(made, tmp_path, monkeypatch):
    run, snapshot, tokens = made
    asked = run.read_config()
    (tmp_path / "config.json").write_text(
        asked.model_copy(
            update={"train": asked.train.model_copy(update={"processes": 2}), "tokens": str(tokens.path)}
        ).model_dump_json()
    )
    (tmp_path / "final").symlink_to(run.final)
    submitted = []
    submit = ProcessPool.submit
    monkeypatch.setattr(ProcessPool, "submit", lambda *call: submitted.append(call[-1].index) or submit(*call))
    by_two = list(score_in_processes(RunDirectory(tmp_path), tokens, snapshot.path, "holdout", group_blocks=1))
    assert submitted == [1], "the second process scored its share"
    texts = [block.text for block in read_blocks(snapshot.path, "holdout")]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    by_one = list(score_blocks(*load_model(run, tokens), texts, "cpu", group_blocks=1))
    torch.set_num_threads(threads)
    assert len(texts) == len(by_two) == len(by_one) >= 2
    for two, one in zip(by_two, by_one):
        assert two.num_bytes == one.num_bytes
        assert all(np.array_equal(getattr(two, name), getattr(one, name)) for name in ("ids", "nats", "ranks"))

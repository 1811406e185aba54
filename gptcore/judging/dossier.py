"""The dossier of a finished training: its evaluation, samples and plots.

Each is a committed directory inside the run directory, named by the hash of what it was made from, so making it again
costs nothing, and a changed sample section makes new samples of the same weights. How each is made stands in
evaluate.py, baselines.py, samples.py and plots.py.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from gptcore import manifest, plots
from gptcore.bundle import load
from gptcore.config import SampleConfig
from gptcore.corpus import Block, Snapshot, blocks
from gptcore.data import Tokens
from gptcore.evaluate import Evaluation, evaluate_blocks, score_blocks
from gptcore.judging.baselines import Baselines, baselines
from gptcore.judging.compare import Comparison
from gptcore.judging.samples import Sample, write_samples
from gptcore.judging.shares import scored
from gptcore.judging.surprise import plot_surprise
from gptcore.judging.weights import load_model
from gptcore.learning.rundir import RunDirectory
from gptcore.model import GPTModel
from gptcore.tokenizer import Tokenizer

EVALUATION_VERSION = 1
"""Raised when scores are computed differently, so that old ones are not taken for new ones."""
SURPRISE_BYTES = 4000
"""About one page of text."""


@dataclass(frozen=True)
class Scores:
    """What a model reached, and what simple ones reach on the same text."""

    val: Evaluation
    holdout: Evaluation | None
    """None where the split has no holdout."""
    baselines: Baselines
    """On the reported side."""

    @property
    def reported(self) -> Evaluation:
        """The score that is shown and compared: the holdout's, else val's, marked as also used for selection."""
        return self.holdout or self.val


def reported_side(snapshot: Snapshot) -> str:
    """The side that scores are reported on."""
    return "holdout" if snapshot.blocks["holdout"] else "val"


def evaluate_run(run: RunDirectory, snapshot: Snapshot, tokens: Tokens) -> Path:
    """Scores the run's best weights on val and holdout, beside the baselines."""
    inputs = {"weights": _weights_sha256(run), "corpus": snapshot.sha256, "version": EVALUATION_VERSION}

    def fill(directory: Path) -> None:
        model, tokenizer = load_model(run, tokens)
        train = run.config().train
        device, is_shared = torch.device(train.device), train.processes != 1
        with TemporaryDirectory(prefix=manifest.TEMPORARY, dir=run.path) as work:
            for side in ("val", "holdout"):
                if snapshot.blocks[side]:
                    shares = scored(run, tokens, snapshot.path, side, Path(work)) if is_shared else None
                    its_blocks = blocks(snapshot.path, side)
                    evaluation = evaluate_blocks(model, tokenizer, its_blocks, device, side, shares)
                    _write(directory / f"{side}.json", evaluation.to_json())
        reported = list(blocks(snapshot.path, reported_side(snapshot)))
        train_text = snapshot.path / "train.txt"
        simple = baselines(tokens.side("train"), tokenizer, tokens.n_vocab, reported, train_text)
        _write(directory / "baselines.json", asdict(simple))
        _write(directory / "surprise.json", _surprise(model, tokenizer, reported, device))

    return _published(run, "evaluation", inputs, fill)


def sample_run(run: RunDirectory, snapshot: Snapshot, tokens: Tokens, cfg: SampleConfig) -> Path:
    """Lets the run's best weights continue the configured prompts."""
    inputs = {"weights": _weights_sha256(run), "sample": cfg.model_dump(mode="json")}

    def fill(directory: Path) -> None:
        model, tokenizer = load_model(run, tokens)
        seed = run.config().train.seed
        write_samples(model, tokenizer, cfg, seed, snapshot.path / "train.txt", directory)

    return _published(run, "samples", inputs, fill)


def plot_run(run: RunDirectory, evaluation: Path) -> Path:
    """Draws the training and the evaluation: five PNGs, and the seed's loss plot as PDF."""
    inputs = {"weights": _weights_sha256(run), "evaluation": evaluation.name}

    def fill(directory: Path) -> None:
        metrics, scores = run.read_metrics(), read_scores(evaluation)
        surprise = json.loads((evaluation / "surprise.json").read_text())
        result = run.result()
        assert result is not None, "plots are made of finished trainings"
        evaluated = [line for line in metrics if "val_loss" in line]
        columns = [[line[key] for line in evaluated] for key in ("epoch", "tokens_seen", "train_loss", "val_loss")]
        plots.plot_losses(*columns, path=directory / "losses.pdf")
        title = f"Where the model was surprised: {scores.reported.side} text, coloured token by token"
        figures = {
            "losses": plots.plot_training_losses(metrics, scores.baselines, result.best_step),
            "schedule": plots.plot_schedule(metrics),
            "throughput": plots.plot_throughput(metrics),
            "loss-by-position": plots.plot_loss_by_position(scores.reported),
            "surprise": plot_surprise(surprise["tokens"], surprise["nats"], title),
        }
        for name, figure in figures.items():
            plots.save_png(figure, directory / f"{name}.png")

    return _published(run, "plots", inputs, fill)


def sample_rival(run: RunDirectory, snapshot: Snapshot, rival: Path, weights_sha256: str, cfg: SampleConfig) -> Path:
    """Lets the model in the bundle `rival`, with its own tokenizer, continue the run's prompts with the same seeds.

    Raises CheckpointError or TokenizerError if it cannot be loaded.
    """
    inputs = {"weights": weights_sha256, "sample": cfg.model_dump(mode="json")}

    def fill(directory: Path) -> None:
        train = run.config().train
        loaded = load(rival, train.device)
        write_samples(loaded.model, loaded.tokenizer, cfg, train.seed, snapshot.path / "train.txt", directory)

    return _published(run, "champion-samples", inputs, fill)


def plot_rival(run: RunDirectory, gains: Sequence[float], comparison: Comparison, margin: float) -> Path:
    """Draws how the run's weights and a rival compare, block by block."""
    bounds = {"low": comparison.low, "high": comparison.high, "confidence": comparison.confidence, "margin": margin}
    numbers = json.dumps({"gains": list(gains), **bounds})  # scores that are not finite included
    inputs = {"weights": _weights_sha256(run), "numbers": numbers}

    def fill(directory: Path) -> None:
        plots.save_png(plots.plot_gains(gains, comparison, margin), directory / "gains.png")

    return _published(run, "comparison", inputs, fill)


def read_scores(evaluation: Path) -> Scores:
    """Reads what `evaluate_run` published."""
    sides = {
        side: Evaluation.from_json(json.loads((evaluation / f"{side}.json").read_text()))
        for side in ("val", "holdout")
        if (evaluation / f"{side}.json").exists()
    }
    simple = Baselines(**json.loads((evaluation / "baselines.json").read_text()))
    return Scores(val=sides["val"], holdout=sides.get("holdout"), baselines=simple)


def read_samples(directory: Path) -> list[Sample]:
    """Reads what `sample_run` published."""
    return [Sample(**sample) for sample in json.loads((directory / "samples.json").read_text())]


def _surprise(
    model: GPTModel, tokenizer: Tokenizer, reported: Sequence[Block], device: torch.device
) -> dict[str, list[Any]]:
    """Tokens of about one page of text, as strings, and their nats. A character spread over tokens goes to the last."""
    shown, total = [], 0
    for block in reported:
        if total and total + len(block.text) > SURPRISE_BYTES:
            break
        shown.append(block.text)
        total += len(block.text)
    tokens: list[str] = []
    nats: list[float] = []
    for text, score in zip(shown, score_blocks(model, tokenizer, shown, device)):
        tokens += _pieces(tokenizer, score.ids)
        nats += [float(value) for value in np.nan_to_num(score.nats, posinf=1e9)]
        if not text.endswith("\n"):
            tokens[-1] += "\n"
    return {"tokens": tokens, "nats": nats}


def _pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([int(token)])) for token in ids]


def _published(run: RunDirectory, name: str, inputs: dict[str, Any], fill: Callable[[Path], None]) -> Path:
    """The directory `name`-<hash of inputs>, filled and committed unless it is there already."""
    goal = run.path / f"{name}-{manifest.sha256_of(inputs)[:12]}"
    if not manifest.is_committed(goal):
        with manifest.staging(run.path) as staged:
            fill(staged)
            manifest.commit(staged, goal, {"kind": name, "inputs": inputs})
    return goal


def _weights_sha256(run: RunDirectory) -> str:
    result = run.result()
    assert result is not None, "only a finished training has weights to look at"
    return result.weights_sha256


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")

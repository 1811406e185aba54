"""The report on a finished training: its evaluation, samples and plots, and its comparison with the champion.

Each is a committed directory inside the run directory, named by the hash of its inputs. So making it again costs
nothing, and a changed sample section makes new samples of the same weights. bits_per_byte.py, baselines.py,
memorization.py, sources.py, samples.py and plots.py do the work; this module reads the run directory and publishes the
results there.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gptcore import manifest
from gptcore.bundle import LoadedModel
from gptcore.config import SampleConfig
from gptcore.corpus.snapshot import Block, Snapshot, read_document_list, sample_blocks
from gptcore.errors import CheckpointError
from gptcore.evaluation import plots
from gptcore.evaluation.baselines import Baselines, score_baselines
from gptcore.evaluation.bits_per_byte import BlockScore, Evaluation, evaluate_blocks, score_blocks
from gptcore.evaluation.compare import Comparison, measure_interval
from gptcore.evaluation.memorization import Memorization, measure_memorization
from gptcore.evaluation.parallel import score_in_processes
from gptcore.evaluation.samples import Sample, write_samples
from gptcore.evaluation.sources import SourceScore, parse_source_scores, score_sources, write_source_scores
from gptcore.evaluation.surprisal import plot_surprise
from gptcore.evaluation.weights import choose_scoring_device, load_model
from gptcore.model.gpt import GPTModel
from gptcore.records import NotAFile, read_bytes
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.run_directory import RunDirectory

T = TypeVar("T")

EVALUATION_VERSION = 2
"""Increase this number when scores are computed differently, so that old scores do not pass for new ones."""
SURPRISE_BYTES = 4000
"""About one page of text for the plot of the surprise."""


@dataclass(frozen=True)
class Scores:
    """A model's scores, and those of simple models on the same text."""

    val: Evaluation
    holdout: Evaluation | None
    """None if the split has no holdout."""
    baselines: Baselines
    """Scores of simple models on the reported side."""
    memorization: Memorization | None = None
    """None if an earlier release made the evaluation."""
    sources: tuple[SourceScore, ...] = ()
    """Scores on the reported side by source. Empty if an earlier release made the evaluation."""

    @property
    def reported(self) -> Evaluation:
        """Return the score that is shown and compared: the holdout's, else val's, marked as also used for selection."""
        return self.holdout or self.val

    @property
    def memorized_shares(self) -> dict[str, float]:
        """Return memorized_once and memorized_repeated, shares of passages, without those that were not measured."""
        if self.memorization is None:
            return {}
        shares = {
            "memorized_once": self.memorization.once.share,
            "memorized_repeated": self.memorization.repeated.share,
        }
        return {name: share for name, share in shares.items() if share is not None}


def reported_side(snapshot: Snapshot) -> str:
    """Return the side of the split that scores are reported on: holdout, or val if there is no holdout."""
    return "holdout" if snapshot.blocks["holdout"] else "val"


def evaluate_run(run: RunDirectory, snapshot: Snapshot, tokens: Tokens, max_bytes: int | None = None) -> Path:
    """Score the run's best weights on val and holdout, and the simple models on the reported side.

    Of a side with more than `max_bytes`, a sample is scored (see `sample_blocks`). Also measures what the weights have
    memorized of train. Returns the directory with val.json, holdout.json, baselines.json, memorization.json,
    sources.csv and surprise.json. Raises CheckpointError if the weights were altered, CorpusError if there is no text
    to score.
    """
    inputs = {"weights": _weights_sha256(run), "corpus": snapshot.sha256, "version": EVALUATION_VERSION}
    if max_bytes is not None and any(snapshot.bytes[side] > max_bytes for side in ("val", "holdout")):
        inputs["max_bytes"] = max_bytes

    def fill(directory: Path) -> None:
        device = choose_scoring_device(run)
        model, tokenizer = load_model(run, tokens, device)
        per_block: dict[str, Sequence[dict[str, Any]]] = {}
        blocks: dict[str, list[Block]] = {}
        for side in ("val", "holdout"):
            if snapshot.blocks[side]:
                scores = _score_if_shared(run, snapshot, tokens, side, max_bytes)
                blocks[side] = sample_blocks(snapshot.path, side, max_bytes)
                evaluation = evaluate_blocks(model, tokenizer, blocks[side], device, side, scores)
                low, high = measure_interval(evaluation.per_block) or (None, None)
                evaluation = replace(evaluation, available_bytes=snapshot.bytes[side], low=low, high=high)
                _write_json(directory / f"{side}.json", evaluation.to_json())
                per_block[side] = evaluation.per_block
        reported = blocks[reported_side(snapshot)]
        by_source = score_sources(per_block[reported_side(snapshot)], read_document_list(snapshot.path))
        write_source_scores(directory / "sources.csv", by_source)
        train_text = snapshot.path / "train.txt"
        train_tokens = tokens.side("train")
        memorization = measure_memorization(model, train_tokens, tokens.eot, device)
        _write_json(directory / "memorization.json", asdict(memorization))
        baselines = score_baselines(train_tokens, tokenizer, tokens.n_vocab, reported, train_text)
        _write_json(directory / "baselines.json", asdict(baselines))
        _write_json(directory / "surprise.json", _measure_surprise(model, tokenizer, reported, device))

    return _publish(run, "evaluation", inputs, fill)


def sample_run(run: RunDirectory, snapshot: Snapshot, tokens: Tokens, cfg: SampleConfig) -> Path:
    """Let the run's best weights continue the configured prompts. Returns the directory of the samples."""
    inputs = {"weights": _weights_sha256(run), "sample": cfg.model_dump(mode="json")}

    def fill(directory: Path) -> None:
        model, tokenizer = load_model(run, tokens, choose_scoring_device(run))
        seed = run.read_config().train.seed
        write_samples(model, tokenizer, cfg, seed, snapshot.path / "train.txt", directory)

    return _publish(run, "samples", inputs, fill)


def plot_run(run: RunDirectory, evaluation: Path) -> Path:
    """Draw the training and the evaluation: five PNGs, and the book's loss plot as PDF. Returns their directory."""
    inputs = {"weights": _weights_sha256(run), "evaluation": evaluation.name}

    def fill(directory: Path) -> None:
        metrics, scores = run.read_metrics(), read_scores(evaluation)
        surprise = _read(evaluation / "surprise.json", json.loads)
        result = run.read_result()
        assert result is not None, "only a finished training can be plotted"
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

    return _publish(run, "plots", inputs, fill)


def sample_champion(
    run: RunDirectory,
    snapshot: Snapshot,
    load_champion: Callable[[str], LoadedModel],
    weights_sha256: str,
    cfg: SampleConfig,
) -> Path:
    """Let the champion, with its own tokenizer, continue the run's prompts with the same seeds.

    `load_champion` loads the champion on the named device; it is called only if the samples do not exist yet.
    `weights_sha256` identifies the champion's weights. Returns the directory of the samples.
    """
    inputs = {"weights": weights_sha256, "sample": cfg.model_dump(mode="json")}

    def fill(directory: Path) -> None:
        loaded = load_champion(str(choose_scoring_device(run)))
        seed = run.read_config().train.seed
        write_samples(loaded.model, loaded.tokenizer, cfg, seed, snapshot.path / "train.txt", directory)

    return _publish(run, "champion-samples", inputs, fill)


def plot_against_champion(run: RunDirectory, gains: Sequence[float], comparison: Comparison, margin: float) -> Path:
    """Draw how the run's weights and the champion compare, block by block. Returns the directory of the picture."""
    bounds = {"low": comparison.low, "high": comparison.high, "confidence": comparison.confidence, "margin": margin}
    numbers = json.dumps({"gains": list(gains), **bounds})  # a string, because gains may be NaN or infinite
    inputs = {"weights": _weights_sha256(run), "numbers": numbers}

    def fill(directory: Path) -> None:
        plots.save_png(plots.plot_gains(gains, comparison, margin), directory / "gains.png")

    return _publish(run, "comparison", inputs, fill)


def read_scores(evaluation: Path) -> Scores:
    """Read the directory that `evaluate_run` published."""
    sides = {
        side: _read(evaluation / f"{side}.json", lambda text: Evaluation.from_json(json.loads(text)))
        for side in ("val", "holdout")
        if (evaluation / f"{side}.json").exists()
    }
    baselines = _read(evaluation / "baselines.json", lambda text: Baselines(**json.loads(text)))
    memorized, by_source = evaluation / "memorization.json", evaluation / "sources.csv"
    return Scores(
        val=sides["val"],
        holdout=sides.get("holdout"),
        baselines=baselines,
        memorization=(
            _read(memorized, lambda text: Memorization.from_json(json.loads(text))) if memorized.exists() else None
        ),
        sources=(_read(by_source, lambda text: parse_source_scores(text.decode())) if by_source.exists() else ()),
    )


def read_samples(directory: Path) -> list[Sample]:
    """Read the directory that `sample_run` or `sample_champion` published."""
    return _read(directory / "samples.json", lambda text: [Sample(**sample) for sample in json.loads(text)])


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(read_bytes(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error, NotAFile) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error) or type(error).__name__}. Run the same command again: it replaces "
            f"{path.parent.name}."
        ) from None


def _score_if_shared(
    run: RunDirectory, snapshot: Snapshot, tokens: Tokens, side: str, max_bytes: int | None
) -> Iterator[BlockScore] | None:
    """Score a side with several processes if the run is configured so, else return None."""
    if run.read_config().train.processes == 1:
        return None
    return score_in_processes(run, tokens, snapshot.path, side, max_bytes)


def _measure_surprise(
    model: GPTModel, tokenizer: Tokenizer, reported: Sequence[Block], device: torch.device
) -> dict[str, list[Any]]:
    """Return the tokens of about one page of text, as strings, and the nats of each.

    A character that several tokens spell belongs to the last of them.
    """
    shown, total = [], 0
    for block in reported:
        if total and total + len(block.text) > SURPRISE_BYTES:
            break
        shown.append(block.text)
        total += len(block.text)
    tokens: list[str] = []
    nats: list[float] = []
    for text, score in zip(shown, score_blocks(model, tokenizer, shown, device)):
        tokens += _decode_each(tokenizer, score.ids)
        nats += [float(value) for value in np.nan_to_num(score.nats, posinf=1e9)]
        if not text.endswith("\n"):
            tokens[-1] += "\n"
    return {"tokens": tokens, "nats": nats}


def _decode_each(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Decode each token alone, but keep the first bytes of a character for the token that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.decode_bytes([int(token)])) for token in ids]


def _publish(run: RunDirectory, name: str, inputs: dict[str, Any], fill: Callable[[Path], None]) -> Path:
    """Return the directory `name`-<hash of inputs>; fill and commit it first if it is missing or damaged."""

    def fill_and_describe(staged: Path) -> dict[str, Any]:
        fill(staged)
        return {"kind": name, "inputs": inputs}

    return manifest.make_once(run.path / f"{name}-{manifest.sha256_of(inputs)[:12]}", fill_and_describe)


def _weights_sha256(run: RunDirectory) -> str:
    result = run.read_result()
    assert result is not None, "only a finished training has weights to report on"
    return result.weights_sha256


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")

"""Training a version again from its lineage, and comparing the weights.

Everything comes from the version itself: its lineage, its snapshot, its tokens, never from today's pipelines.yaml. What
is different from the day of the training is named first, and stops it unless it is wanted anyway. The training runs in
a directory that is removed afterwards, in a child process as it always does. Nothing is written to MLflow.
"""

import json as json_module
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flows.command.console import Console
from flows.command.show import differences_table, reproduction_table
from flows.lock import taken
from flows.releases import registry
from flows.releases.differences import Difference, Materials, differences, materials, usable_device, usable_processes
from flows.state import StateRoot
from flows.training import train
from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.corpus import Snapshot, blocks
from gptcore.data import Tokens
from gptcore.errors import GPTCoreError
from gptcore.evaluate import evaluate_blocks
from gptcore.judging.dossier import reported_side
from gptcore.judging.weights import load_model
from gptcore.learning.rundir import Metrics, Result, RunDirectory
from gptcore.sections import parse
from gptcore.train import TRAINING_VERSION


class NotAsThen(GPTCoreError):
    """Something that the weights depend on is not as it was when the version was trained."""

    exit_code = 2


class NotReproduced(GPTCoreError):
    """Everything is as it was, and yet other weights came out."""


@dataclass(frozen=True)
class Reproduction:
    """A version, then and now. What is None was not made."""

    uri: str
    differences: tuple[Difference, ...]
    weights_sha256: str
    holdout_bits_per_byte: float
    reproduced_weights_sha256: str | None = None
    reproduced_bits_per_byte: float | None = None
    """None also where the text to score on is gone."""

    @property
    def is_equal(self) -> bool | None:
        """Whether the same weights came out, bit for bit."""
        made = self.reproduced_weights_sha256
        return None if made is None else made == self.weights_sha256

    @property
    def decisive(self) -> list[str]:
        """What is different and may change the weights."""
        return [difference.what for difference in self.differences if difference.is_decisive]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "equal": self.is_equal}


def reproduce(root: StateRoot, uri: str, anyway: bool, json: bool) -> None:
    """Names what is different, trains again, and prints both results.

    Raises UnknownVersion and RegistryError; NotAsThen if something is different and `anyway` is not given, or if there
    is nothing left to train from; NotReproduced if nothing is different but the weights are.
    """
    found = registry.resolve(root, uri)
    then = registry.describe(root, found)
    if origin := then.get("imported_from"):
        raise NotAsThen(f"{uri} was not trained here but imported from {origin}: there is no training to repeat.")
    if "run_config" not in then:
        raise NotAsThen(f"{uri} was registered by a release that did not record how to train it again.")
    console = Console()
    console.terminal.quiet = json
    with _workplace(root) as work:
        there, lost = materials(root, then, work)
        named = Reproduction(
            uri=then["uri"],
            differences=(*differences(then), *lost),
            weights_sha256=then["weights_sha256"],
            holdout_bits_per_byte=then["holdout_bits_per_byte"],
        )
        if named.differences and not json:
            differences_table([asdict(difference) for difference in named.differences])
        done = named
        if anyway or not named.decisive:
            done = _trained(named, then, there, work, console)
    if json:
        print(json_module.dumps(done.as_dict(), indent=1))
    elif done.is_equal is not None:
        reproduction_table(done.as_dict())
    _judge(done)


def _judge(done: Reproduction) -> None:
    """Turns what was found into an exit code."""
    if done.is_equal is None:
        raise NotAsThen(
            f"{done.uri} was trained under other conditions: {', '.join(done.decisive)}. Restore them, or go on "
            "--anyway and compare weights and bits per byte."
        )
    if not done.is_equal and not done.decisive:
        raise NotReproduced(
            f"{done.uri} has weights with sha256 {done.weights_sha256}, but training it again under the same "
            f"conditions gave {done.reproduced_weights_sha256}."
        )


@contextmanager
def _workplace(root: StateRoot) -> Iterator[Path]:
    """A directory on the state root's disk, under a name that nobody takes for a run's, and gone in the end."""
    runs = root.path / "runs"
    for leftover in manifest.stale(runs):
        with taken(leftover / "lock") as is_free:
            if is_free:
                shutil.rmtree(leftover, ignore_errors=True)
    with manifest.staging(runs) as directory:
        yield directory


def _trained(
    named: Reproduction, then: Mapping[str, Any], there: Materials, work: Path, console: Console
) -> Reproduction:
    """Trains, and scores what came out on the recorded holdout."""
    run = RunDirectory(work)
    run.prepare(_config(named, then, there), there.start)
    result = _followed(run, console)
    score = None
    if there.snapshot is not None and there.tokens is not None:
        score = _bits_per_byte(run, there.snapshot, there.tokens)
    return Reproduction(
        **{key: getattr(named, key) for key in ("uri", "differences", "weights_sha256", "holdout_bits_per_byte")},
        reproduced_weights_sha256=result.weights_sha256,
        reproduced_bits_per_byte=score,
    )


def _config(named: Reproduction, then: Mapping[str, Any], there: Materials) -> RunConfig:
    """The recorded config.json, with today's paths; and with today's device where the recorded one is not here."""
    recorded = then["run_config"]
    if there.tokens is None or (then["ancestors"] and there.start is None):
        what = "there is no text" if there.tokens is None else "the weights that it started from are gone"
        raise NotAsThen(f"{named.uri} cannot be trained again: {what}. Different: {', '.join(named.decisive)}.")
    today: dict[str, Any] = {
        "training_version": TRAINING_VERSION,
        "tokens": str(there.tokens.path.resolve()),
        "tokens_sha256": there.tokens.sha256,
        "vocab_size": there.tokens.n_vocab,
        "train": {
            **recorded["train"],
            "device": usable_device(recorded["train"]["device"]),
            "processes": usable_processes(recorded["train"]["device"], recorded["train"].get("processes", 1)),
            "session_seconds": None,
        },
    }
    if there.start is not None:
        today["start"] = {**recorded["start"], "weights_sha256": manifest.sha256_of_file(there.start)}
    return parse(RunConfig, {**recorded, **today}, f"the lineage of {named.uri}")


def _followed(run: RunDirectory, console: Console) -> Result:
    """Trains in a child process while a bar moves."""
    with console.bar() as bar:

        def on_metrics(lines: list[Metrics]) -> None:
            if lines:
                bar.show(lines[-1])

        result = train(run, on_metrics)
    assert isinstance(result, Result), "without session_seconds a training goes on to its end"
    line = f"{result.steps:,} steps, {result.tokens_seen:,} tokens, best at step {result.best_step:,}"
    console.terminal.print(f"[bold]train    [/bold]{line}  ({result.seconds:.1f} s in updates)")
    return result


def _bits_per_byte(run: RunDirectory, snapshot: Snapshot, tokens: Tokens) -> float:
    side = reported_side(snapshot)
    model, tokenizer = load_model(run, tokens)
    device = torch.device(run.config().train.device)
    return evaluate_blocks(model, tokenizer, blocks(snapshot.path, side), device, side).bits_per_byte

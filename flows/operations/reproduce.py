"""`gptflow reproduce`: train a version again from its lineage, and compare the weights.

Everything comes from the version's lineage, snapshot and tokens, never from today's pipelines.yaml. Differences from
the day of the training are listed first. If one of them can change the weights, only --anyway continues. The training
runs in a child process, as always, in a directory that is removed afterwards. Nothing is written to MLflow.
"""

import json as json_module
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.registry import versions
from flows.registry.differences import (
    Difference,
    Materials,
    differences,
    materials,
    training_version_today,
    usable_processes,
)
from flows.retrain.trainer_process import train
from flows.state.console import Console, print_table
from flows.state.locks import try_lock
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.config import RunConfig
from gptcore.corpus.snapshot import Snapshot, read_blocks
from gptcore.devices import choose_usable_device
from gptcore.errors import GPTCoreError
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.evaluation.run_report import reported_side
from gptcore.evaluation.weights import choose_scoring_device, load_model
from gptcore.sections import parse_recorded
from gptcore.tokens.directory import Tokens
from gptcore.training.run_directory import MetricsLine, Result, RunDirectory


class NotAsThen(GPTCoreError):
    """Something that the weights depend on has changed since the version was trained."""

    exit_code = 2


class NotReproduced(GPTCoreError):
    """The training gave other weights, although nothing that they depend on has changed."""


@dataclass(frozen=True)
class Reproduction:
    """A version then and now. A field is None if it was not made."""

    uri: str
    differences: tuple[Difference, ...]
    weights_sha256: str
    holdout_bits_per_byte: float
    reproduced_weights_sha256: str | None = None
    reproduced_bits_per_byte: float | None = None
    """None also if the held-out text was deleted."""

    @property
    def is_equal(self) -> bool | None:
        """Whether the weights are equal, bit for bit. None if nothing was trained."""
        made = self.reproduced_weights_sha256
        return None if made is None else made == self.weights_sha256

    @property
    def decisive(self) -> list[str]:
        """Names of the differences that can change the weights."""
        return [difference.what for difference in self.differences if difference.is_decisive]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for --json."""
        return {**asdict(self), "equal": self.is_equal}


def reproduce(root: StateRoot, uri: str, anyway: bool, json: bool) -> None:
    """List the differences, train again, and print both results.

    Raises UnknownVersion and RegistryError. Raises NotAsThen if a difference can change the weights and `anyway` is not
    set, or if the text or the start was deleted. Raises NotReproduced if the weights differ for no known reason.
    """
    found = versions.resolve(root, uri)
    then = versions.describe(root, found)
    if origin := then.get("imported_from"):
        raise NotAsThen(f"{uri} was not trained here but imported from {origin}: it has no training to repeat.")
    if "run_config" not in then:
        raise NotAsThen(f"{uri} was registered by a release that did not record how to train it again.")
    console = Console()
    console.terminal.quiet = json
    with temporary_run(root) as work:
        there, lost = materials(root, then, work)
        named = Reproduction(
            uri=then["uri"],
            differences=(*differences(then), *lost),
            weights_sha256=then["weights_sha256"],
            holdout_bits_per_byte=then["holdout_bits_per_byte"],
        )
        if named.differences and not json:
            _print_differences([asdict(difference) for difference in named.differences])
        done = named
        if anyway or not named.decisive:
            done = _train_again(named, then, there, work, console)
    if json:
        print(json_module.dumps(done.as_dict(), indent=1))
    elif done.is_equal is not None:
        _print_reproduction(done.as_dict())
    _raise_if_different(done)


def _print_differences(differences: Sequence[Mapping[str, Any]]) -> None:
    """Print the differences as a table, and mark those that cannot change the weights."""
    table = Table("different", "then", "now", title="Changed since this version was trained", title_style="bold")
    for found in differences:
        note = "" if found["is_decisive"] else " (changes no weights)"
        table.add_row(f"{found['what']}{note}", found["then"], found["now"])
    print_table(table)


def _print_reproduction(done: Mapping[str, Any]) -> None:
    """Print a version then and now as a table."""
    table = Table("", "then", "now", title=f"{done['uri']} trained again", title_style="bold")
    table.add_row("weights sha256", done["weights_sha256"], done["reproduced_weights_sha256"])
    now = done["reproduced_bits_per_byte"]
    table.add_row(
        "bits per byte", f"{done['holdout_bits_per_byte']:.6f}", "not scored" if now is None else f"{now:.6f}"
    )
    print_table(table)
    accepted = " There were differences, see above." if not done["equal"] and done["differences"] else ""
    print(f"The weights are {'equal, bit for bit.' if done['equal'] else 'not equal.'}{accepted}")


def _raise_if_different(done: Reproduction) -> None:
    """Raise NotAsThen or NotReproduced, which set the exit code, unless the weights are equal."""
    if done.is_equal is None:
        raise NotAsThen(
            f"{done.uri} was trained under other conditions: {', '.join(done.decisive)}. Restore them, or add "
            "--anyway to train all the same and compare weights and bits per byte."
        )
    if not done.is_equal and not done.decisive:
        noted = ", ".join(difference.what for difference in done.differences)
        raise NotReproduced(
            f"{done.uri} has weights with sha256 {done.weights_sha256}, but training it again under the same "
            f"conditions gave {done.reproduced_weights_sha256}."
            + (f" Different, though it should not change weights: {noted}." if noted else "")
        )


@contextmanager
def temporary_run(root: StateRoot) -> Iterator[Path]:
    """Yield a temporary directory in the state root that no run mistakes for its own. Remove it, and left-over ones."""
    runs = root.path / "runs"
    for leftover in manifest.list_stale(runs):
        with try_lock(leftover / "lock") as is_free:
            if is_free:
                shutil.rmtree(leftover, ignore_errors=True)
    with manifest.stage(runs) as directory:
        yield directory


def _train_again(
    named: Reproduction, then: Mapping[str, Any], there: Materials, work: Path, console: Console
) -> Reproduction:
    """Train, and score the weights on the recorded holdout."""
    run = RunDirectory(work)
    run.prepare(_run_config(named, then, there), there.start)
    result = _train_with_bar(run, console)
    score = None
    if there.snapshot is not None and there.tokens is not None:
        score = _score(run, there.snapshot, there.tokens)
    return Reproduction(
        **{key: getattr(named, key) for key in ("uri", "differences", "weights_sha256", "holdout_bits_per_byte")},
        reproduced_weights_sha256=result.weights_sha256,
        reproduced_bits_per_byte=score,
    )


def _run_config(named: Reproduction, then: Mapping[str, Any], there: Materials) -> RunConfig:
    """Return the recorded config.json with today's paths, and today's device if the recorded one is missing."""
    recorded = then["run_config"]
    if there.tokens is None or (then["ancestors"] and there.start is None):
        what = "there is no text" if there.tokens is None else "the weights that it started from are gone"
        raise NotAsThen(f"{named.uri} cannot be trained again: {what}. Different: {', '.join(named.decisive)}.")
    train = {**recorded["train"], **(then.get("executions") or [{}])[-1]}
    device = str(choose_usable_device(train["device"]))
    today: dict[str, Any] = {
        "training_version": training_version_today(then),
        "tokens": str(there.tokens.path.resolve()),
        "tokens_sha256": there.tokens.sha256,
        "vocab_size": there.tokens.n_vocab,
        "train": {
            **train,
            "device": device,
            "compile": train["compile"] and device == train["device"],
            "processes": usable_processes(train["device"], train.get("processes", 1)),
            "session_seconds": None,
        },
        "in_run_key": None,
    }
    if there.start is not None:
        today["start"] = {**recorded["start"], "weights_sha256": manifest.sha256_of_file(there.start)}
    return parse_recorded(RunConfig, {**recorded, **today}, f"the lineage of {named.uri}")


def _train_with_bar(run: RunDirectory, console: Console) -> Result:
    """Train in a child process, and show a progress bar."""
    with console.progress_bar() as bar:

        def on_metrics(lines: list[MetricsLine]) -> None:
            if lines:
                bar.show(lines[-1])

        result = train(run, on_metrics)
    assert isinstance(result, Result), "without session_seconds a training runs to its end"
    line = f"{result.steps:,} steps, {result.tokens_seen:,} tokens, best at step {result.best_step:,}"
    console.terminal.print(f"[bold]train    [/bold]{line}  ({result.seconds:.1f} s in updates)")
    return result


def _score(run: RunDirectory, snapshot: Snapshot, tokens: Tokens) -> float:
    side = reported_side(snapshot)
    device = choose_scoring_device(run)
    model, tokenizer = load_model(run, tokens, device)
    return evaluate_blocks(model, tokenizer, read_blocks(snapshot.path, side), device, side).bits_per_byte

"""Whether judging grows with the corpus: `python -m bench.judging --megabytes 10 1000`.

For each size, a corpus of made-up prose is ingested as it was yesterday and as it is tonight, with 3 percent more text.
A model of yesterday is champion, one of tonight the challenger; neither is trained for longer than an update. The model
is tiny (1 layer, width 32, bytes), so that what grows with the text shows. Then the step `evaluate` of the challenger
and the step `gate` run as in a retraining, but without Prefect, and each of their parts is measured. `--max-bytes 0`
scores all text, as releases before evaluate.max_bytes did.

Times are seconds of the processor, all threads together, because other programs slow down a shared machine. The last
column says what a part costs for each MB by which the larger corpus is larger: hashing files and searching training
texts cannot stop at a sample. xz takes as long for 10 MB as for 1 GB, and longest of all; `--prime-bytes` shortens it.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient

from bench.tokenizing import _reference
from flows.registry import versions
from flows.registry.gate import judge
from flows.state.root import OPT_OUTS, StateRoot, state_root
from gptcore import manifest
from gptcore.bundle import WEIGHTS, write_bundle
from gptcore.config import CorpusConfig, EvaluateConfig, GateConfig, ModelConfig, RunConfig, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot
from gptcore.evaluation import baselines
from gptcore.evaluation.run_report import evaluate_run, read_scores
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.training.resolve import find_training_version, resolve
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory

NAME = "gpt-bench"
GROWTH = 0.03
"""Share of tonight's text that is new."""
CORPUS: dict[str, Any] = {"block_bytes": 2048, "val_fraction": 0.05, "holdout_fraction": 0.05}
PARTS = {
    "evaluate": {
        "scores of val and holdout": ("gptcore.evaluation.run_report", "evaluate_blocks"),
        "simple models and xz": ("gptcore.evaluation.run_report", "score_baselines"),
        "of which xz": ("gptcore.evaluation.baselines", "measure_compressed_size"),
        "of which counting tokens": ("gptcore.evaluation.baselines", "count_tokens"),
        "memorization": ("gptcore.evaluation.run_report", "measure_memorization"),
        "of which passages in the text": ("gptcore.evaluation.memorization", "pick_passages"),
        "choosing the sample": ("gptcore.evaluation.run_report", "sample_blocks"),
        "scores by source": ("gptcore.evaluation.run_report", "score_sources"),
    },
    "gate": {
        "scores of both models": ("flows.registry.gate", "evaluate_blocks"),
        "hashes of the snapshots": ("gptcore.manifest", "_compare"),
        "clean blocks": ("flows.registry.gate", "find_clean_blocks"),
        "of which views of the training texts": ("gptcore.corpus.clean_blocks", "normalize_file"),
        "of which search for shared runs": ("gptcore.corpus.contamination", "find_shared_runs"),
        "old and new blocks": ("flows.registry.gate", "find_old_blocks"),
        "scores by source": ("flows.registry.gate", "compare_sources"),
        "bootstrap": ("gptcore.evaluation.compare", "bootstrap"),
    },
}
"""The parts of each step: module and name of the function whose calls are timed."""
_LINES, _LINE_WORDS = 400_000, 11
_DOCUMENT_LINES = 300

MODEL = ModelConfig(context_length=128, emb_dim=32, n_heads=2, n_layers=1)

Times = dict[str, float]


def write_texts(directory: Path, megabytes: float) -> None:
    """Write documents of made-up lines, of 20 kB in the mean. Hardly two of them share a run of two lines."""
    draw = random.Random(1)
    words = _reference().split()
    lines = [" ".join(draw.choices(words, k=_LINE_WORDS)) + "\n" for _ in range(_LINES)]
    random_lines = np.random.default_rng(2)
    total = number = 0
    while total < megabytes * 1e6:
        size = int(random_lines.exponential(_DOCUMENT_LINES)) + 5
        chosen = random_lines.integers(0, _LINES, size)
        written = "".join(lines[line] + ("\n" if line % 5 == 0 else "") for line in chosen.tolist()).encode()
        (directory / f"{number:06d}.txt").write_bytes(written)
        total, number = total + len(written), number + 1


def make_snapshots(root: StateRoot, text: Path) -> tuple[Snapshot, Snapshot]:
    """Return the snapshots of yesterday's and of tonight's text."""
    documents = sorted(text.glob("*.txt"))
    new = documents[-max(1, int(GROWTH * len(documents))) :]
    aside = text.with_name("new")
    aside.mkdir()
    for path in new:
        path.rename(aside / path.name)
    cfg = CorpusConfig(sources=(str(text),), **CORPUS)
    before = ingest(cfg, root.corpora, root.path)
    for path in new:
        (aside / path.name).rename(path)
    return before, ingest(cfg, root.corpora, root.path)


def train_one_update(root: StateRoot, tokens: Tokens) -> RunDirectory:
    """Return a run directory whose training is finished."""
    run = RunDirectory(root.path / "runs" / "bench")
    train = resolve(TrainConfig(max_steps=1, eval_batches=1, device="cpu", compile=False, threads=1))
    run.prepare(
        RunConfig(
            training_version=find_training_version(train, is_warm_start=False),
            tokens=str(tokens.path),
            tokens_sha256=tokens.sha256,
            model=MODEL,
            vocab_size=tokens.n_vocab,
            train=train,
            run_key="ab" * 32,
        )
    )
    train_directory(run.path, Stop())
    return run


def register(root: StateRoot, run: RunDirectory, tokens: Tokens, corpus: Snapshot) -> str:
    """Register the run's weights as a version that learned from `corpus`, and return its number."""
    client = MlflowClient(root.tracking_uri)
    source = root.path / "models" / corpus.path.name
    bundle = source / "artifacts" / versions.BUNDLE
    bundle.mkdir(parents=True)
    write_bundle(bundle, run.read_config().cfg(), run.weights, tokens.load_tokenizer(), {})
    tags = {"corpus_sha256": corpus.sha256, "weights_sha256": manifest.sha256_of_file(bundle / WEIGHTS)}
    return str(client.create_model_version(NAME, str(source), tags=tags).version)


@contextlib.contextmanager
def timed(step: str, times: Times) -> Iterator[None]:
    """Add up the processor seconds of the step and of its parts in `times`."""
    with contextlib.ExitStack() as stack:
        for part, (module, name) in PARTS[step].items():
            owner = importlib.import_module(module)
            function = getattr(owner, name)
            setattr(owner, name, _time_calls(function, f"{step}: {part}", times))
            stack.callback(setattr, owner, name, function)
        began = time.process_time()
        yield
        times[step] = time.process_time() - began


def _time_calls(function: Callable[..., Any], part: str, times: Times) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return function(*given, **named)
        finally:
            times[part] += time.process_time() - began

    return call


def measure(megabytes: int, max_bytes: int | None) -> dict[str, Any]:
    """Measure one size of the corpus in a state root of its own."""
    times: Times = defaultdict(float)
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(OPT_OUTS, GPTFLOW_HOME=home)
        root = state_root().prepare()
        os.environ["MLFLOW_TRACKING_URI"] = root.tracking_uri
        MlflowClient(root.tracking_uri).create_registered_model(NAME)
        text = root.path / "text"
        text.mkdir()
        write_texts(text, megabytes)
        before, now = make_snapshots(root, text)
        tokens = tokenize(now.path, "bytes", root.tokens)
        run = train_one_update(root, tokens)
        with timed("evaluate", times):
            evaluation = evaluate_run(run, now, tokens, max_bytes)
        scores = read_scores(evaluation)
        champion = register(root, run, tokens, before)
        MlflowClient(root.tracking_uri).set_registered_model_alias(NAME, versions.CHAMPION, champion)
        challenger = register(root, run, tokens, now)
        with timed("gate", times):
            verdict = judge(root, NAME, challenger, now, scores, GateConfig(), False, max_bytes)
        print(f"{megabytes} MB: {verdict.reason}", flush=True)
        return {
            "megabytes": sum(now.bytes.values()) / 1e6,
            "evaluated": scores.val.bytes + scores.reported.bytes,
            "judged": verdict.bytes,
            "times": dict(times),
        }


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return one row per part, as Markdown, with the cost of each further MB between the first and the last size."""
    first, last = measured[0], measured[-1]
    larger = last["megabytes"] - first["megabytes"]
    head = [f"{one['megabytes']:,.0f} MB" for one in measured]
    scored = [f"{one['evaluated'] / 1e6:.2f}, {one['judged'] / 1e6:.2f}" for one in measured]
    lines = [
        f"| seconds of the processor | {' | '.join(head)} | ratio | ms for each MB more |",
        f"|---|{'---:|' * len(head)}---:|---:|",
        f"| MB scored in evaluate, gate | {' | '.join(scored)} | | |",
    ]
    for step, parts in PARTS.items():
        for name in (step, *(f"{step}: {part}" for part in parts)):
            values = [one["times"].get(name, 0.0) for one in measured]
            ratio = f"{values[-1] / values[0]:.2f}" if values[0] >= 0.05 else ""
            more = f"{1000 * (values[-1] - values[0]) / larger:.2f}" if larger > 0 else ""
            shown = f"**{name}**" if name == step else name.partition(": ")[2]
            lines.append(f"| {shown} | {' | '.join(f'{value:.2f}' for value in values)} | {ratio} | {more} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sizes of the command line and print a table as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.judging", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--max-bytes", type=int, default=EvaluateConfig().max_bytes, help="0: all text")
    parser.add_argument("--prime-bytes", type=int, default=baselines.PRIME_BYTES, help="of training text, for xz")
    parser.add_argument("--json", type=Path, help="where every number is written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    baselines.PRIME_BYTES = asked.prime_bytes
    measured = [measure(size, asked.max_bytes or None) for size in asked.megabytes]
    print(f"\n{table(measured)}")
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()

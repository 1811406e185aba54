"""Does new text outvote old text, and do copies fool the gate? The real gate on nights of garbage, copies and growth.

    python -m bench.forgetting --seeds 1 2 3 --json forgetting.json
    python -m bench.forgetting --text prose.txt --only garbage

A tiny model (1 layer, 4 heads, width 64, bytes) learns 200 kB of prose: Python's reference, which is part of Python, or
`--text`. A seed selects the documents and starts the training. Every night is ingested, trained from scratch,
registered and judged as a retraining does it, but in this process and without Prefect. The scenarios are

    garbage     80 files of base64 are added by mistake: 39 percent of the text
    new kind    80 tables of numbers are added on purpose: as many bytes; the gate judges the model with the default,
                then with a larger gate.forget
    growth      ten nights add 15 percent of prose each, and each trains for as many epochs
    copies      ten nights add copies of the documents in other forms (line ends, indents, quoting, capitals, ...) to a
                third of the prose, and every model is also scored on prose that no model saw

For each verdict the table shows the improvement in bits per byte, with its interval, on all blocks, on the old and on
the new ones, and what all blocks together would have decided. The exit code is 1 if garbage was promoted, if a new kind
was promoted by default or rejected with the larger `gate.forget`, if fewer than 8 of 10 nights of growth were promoted,
or if a night of copies was promoted that is not better on the prose that no model saw. A seed takes five minutes of one
core.
"""

import argparse
import base64
import itertools
import json
import os
import random
import re
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from flows.cards.verdict import Verdict
from flows.registry import versions
from flows.registry.gate import judge
from flows.state.root import OPT_OUTS, StateRoot, state_root
from gptcore import manifest
from gptcore.bundle import WEIGHTS, load, write_bundle
from gptcore.config import CorpusConfig, GateConfig, ModelConfig, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Block, Snapshot, read_blocks
from gptcore.evaluation.baselines import score_baselines
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.evaluation.compare import Comparison
from gptcore.evaluation.run_report import Scores
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.training.batches import Batches
from gptcore.training.loop import run_updates
from gptcore.training.resolve import resolve
from gptcore.training.state import TrainState

SHARE, FILES = 0.39, 80
"""Share of the night's text, in bytes, that is added, and in how many files."""
SCENARIOS = ("garbage", "new kind", "growth", "copies")
NIGHTS, GROWTH, LEAST_PROMOTED = 10, 1.15, 8
FORGET = 1.0
"""The larger `gate.forget`, in bits per byte."""
STEPS, EPOCHS, BATCH, CONTEXT = 200, 2, 16, 64
FORMS: dict[str, Callable[[str], str]] = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "trailing blanks": lambda text: text.replace("\n", "  \n"),
    "indent": lambda text: textwrap.indent(text, "    "),
    "quoted": lambda text: textwrap.indent(text, "> ", lambda _: True),
    "rewrapped": lambda text: "\n\n".join(textwrap.fill(paragraph, 50) for paragraph in text.split("\n\n")),
    "capitals": str.upper,
    "double spaces": lambda text: text.replace(" ", "  "),
    "NFD, without punctuation": lambda text: unicodedata.normalize("NFD", re.sub(r"[.,;:]", "", text)),
    "numbered lines": lambda text: "\n".join(f"* {line}" for line in text.split("\n")),
    "curly quotes": lambda text: text.replace('"', "\u201d").replace("'", "\u2019"),
}
"""The forms of the nights of copies."""
_COPIED_BYTES, _COPY_STEPS, _OUTSIDE_BYTES = 66_000, 500, 60_000
CORPUS: dict[str, Any] = {"block_bytes": 256, "val_fraction": 0.05, "holdout_fraction": 0.25, "tokenizer": "bytes"}
MODEL = ModelConfig(recipe="modern", context_length=CONTEXT, emb_dim=64, n_heads=4, n_layers=1)
MUON = {"optimizer": "muon", "learning_rate": 0.02, "schedule": "linear", "weight_decay": 0.3, "grad_clip": 0.0}
TRAIN: dict[str, Any] = {**MUON, "batch_size": BATCH, "threads": 1, "device": "cpu"}
_PROSE_BYTES, _DOCUMENT_BYTES = 200_000, 6_000

Texts = dict[str, str]
"""The documents of a corpus by file name."""


@dataclass(frozen=True)
class Night:
    """One verdict of the gate."""

    scenario: str
    seed: int
    number: int
    promoted: bool
    kind: str
    reason: str
    improvement: float
    low: float | None
    """Bounds of the improvement. None if too few blocks can be compared."""
    high: float | None
    old: Comparison | None
    """None if too few blocks can be compared."""
    new: Comparison | None
    """None if no block is new, or too few can be compared."""
    outside: float | None = None
    """Improvement on text that no model saw, in bits per byte. None if it was not measured."""

    @property
    def would_be_promoted(self) -> bool:
        """Whether the blocks together, old and new, would have promoted the version."""
        return self.kind in ("better", "worse on old text")


class Bench:
    """A registered model and the text of its nights."""

    def __init__(self, root: StateRoot, model: str, seed: int) -> None:
        self.root, self.model, self.seed = root, model, seed
        self.client = MlflowClient(root.tracking_uri)
        self.client.create_registered_model(model)
        self.count = 0
        self.bundle = Path()
        """The newest model."""
        self.scores: Scores | None = None
        """The scores of the first model, which the gate compares with the unigram model's. It ignores later ones."""

    def train(self, texts: Texts, steps: int | None) -> "Trained":
        """Ingest the texts and train on them, for so many steps or for `EPOCHS`."""
        folder = self.root.path / "text" / self.model
        for path in folder.glob("*"):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        cfg, previous = CorpusConfig(sources=(str(folder),), **CORPUS), self._find_snapshot_of_champion()
        snapshot = ingest(cfg, self.root.corpora, self.root.path, previous=previous)
        tokens = tokenize(snapshot.path, CORPUS["tokenizer"], self.root.tokens)
        ids = tokens.side("train")
        num_steps = steps or EPOCHS * len(ids) // (BATCH * CONTEXT)
        train = resolve(TrainConfig(**TRAIN, max_steps=num_steps, seed=self.seed))
        state = TrainState.initial(MODEL.build_cfg(tokens.n_vocab), train)
        for _ in run_updates(state, Batches(ids, CONTEXT, CONTEXT, BATCH, 1, self.seed), train):
            pass
        weights = {key: value.detach() for key, value in state.model.state_dict().items()}
        return Trained(snapshot, tokens, weights)

    def _find_snapshot_of_champion(self) -> Path | None:
        """Return the text whose split a pipeline keeps, as the flow does."""
        champion = versions.find_champion(self.root, self.model)
        return None if champion is None else self.root.fetch_corpus(champion.tags["corpus_sha256"])

    def judge(self, trained: "Trained", gate: GateConfig) -> Verdict:
        """Register a model and let the gate decide about it."""
        self.count += 1
        source = self.root.path / "models" / self.model / str(self.count)
        bundle = source / "artifacts" / versions.BUNDLE
        bundle.mkdir(parents=True)
        self.bundle = bundle
        save_file(trained.weights, source / "weights")
        tokenizer = trained.tokens.load_tokenizer()
        write_bundle(bundle, MODEL.build_cfg(trained.tokens.n_vocab), source / "weights", tokenizer, {})
        sha256 = manifest.sha256_of_file(bundle / WEIGHTS)
        tags = {"corpus_sha256": trained.snapshot.sha256, "weights_sha256": sha256}
        version = str(self.client.create_model_version(self.model, str(source), tags=tags).version)
        self.scores = self.scores or _score(trained, bundle)
        return judge(self.root, self.model, version, trained.snapshot, self.scores, gate, False)


@dataclass(frozen=True)
class Trained:
    """A model, and the text that it learned."""

    snapshot: Snapshot
    tokens: Tokens
    weights: dict[str, torch.Tensor]


def _score(trained: Trained, bundle: Path) -> Scores:
    """Score a model and the unigram model, which a first version must beat, on a few blocks."""
    blocks = list(read_blocks(trained.snapshot.path, "holdout"))[:40]
    loaded, train = load(bundle), trained.snapshot.path / "train.txt"
    evaluation = evaluate_blocks(loaded.model, loaded.tokenizer, blocks, "cpu")
    ids = trained.tokens.side("train")
    return Scores(evaluation, evaluation, score_baselines(ids, loaded.tokenizer, trained.tokens.n_vocab, blocks, train))


def read_prose(path: Path | None) -> Texts:
    """Read a file or the topics of Python's reference, and cut long texts into documents at empty lines."""
    texts = [topics[name] for name in sorted(topics)] if path is None else [path.read_text()]
    documents = [""]
    for text in texts:
        for paragraph in text.split("\n\n"):
            documents[-1] += paragraph + "\n\n"
            if len(documents[-1]) >= _DOCUMENT_BYTES:
                documents.append("")
        documents.append("")
    return {f"{number:04}.txt": text for number, text in enumerate(filter(None, documents))}


def take(texts: Texts, names: Sequence[str], size: int) -> Texts:
    """Return the first of the named documents, at most `size` bytes in all."""
    ends = itertools.accumulate(len(texts[name].encode()) for name in names)
    return {name: texts[name] for name, end in zip(names, ends) if end <= size}


def make_garbage(size: int, draw: random.Random) -> Texts:
    """Return `FILES` documents of base64, `size` bytes in all. No two of them have anything in common."""
    raw = size // FILES * 3 * 76 // (4 * 77)  # three bytes become four letters, 76 letters become a line
    return {f"garbage-{n}.txt": base64.encodebytes(draw.randbytes(raw)).decode() for n in range(FILES)}


def make_tables(size: int, draw: random.Random) -> Texts:
    """Return `FILES` documents of measurements, one per line, `size` bytes in all."""

    def rows() -> str:
        first = draw.randrange(20_000_000)
        lines = (
            f"{first + n};{draw.gauss(20, 5):.2f};{draw.gauss(1013, 9):.1f};{draw.choice('NESW')}"
            for n in itertools.count()
        )
        return "\n".join(itertools.islice(lines, size // FILES // 20))[: size // FILES]

    return {f"table-{n}.txt": rows() for n in range(FILES)}


Nights = Iterator[Night]


def judge_addition(
    bench: Bench, prose: Texts, added: Texts, scenario: str, forgets: Sequence[float | None] = (None,)
) -> Nights:
    """Judge a model of prose and the added text against a model of prose, once for each `gate.forget`."""
    first = bench.judge(bench.train(prose, STEPS), GateConfig())
    assert first.promoted, first.reason
    challenger = bench.train({**prose, **added}, STEPS)
    for number, forget in enumerate(forgets, 1):
        label = scenario if forget is None else f"{scenario}, forget {forget:g}"
        yield _describe(label, bench.seed, number, bench.judge(challenger, GateConfig(forget=forget)))


def judge_growth(bench: Bench, prose: Texts) -> Nights:
    """Judge ten nights, each with more prose."""
    for number in range(NIGHTS + 1):
        tonight = take(prose, list(prose), round(_PROSE_BYTES * GROWTH ** (number - NIGHTS)))
        trained = bench.train(tonight, None)
        verdict = bench.judge(trained, GateConfig())
        if number:
            yield _describe("growth", bench.seed, number, verdict)


def judge_copies(bench: Bench, prose: Texts, outside: Texts) -> Nights:
    """Judge ten nights, each with copies of all documents in one more form."""
    unseen = [Block(number, "", text) for number, text in enumerate(outside.values())]

    def judge_night(texts: Texts) -> tuple[Verdict, float]:
        verdict = bench.judge(bench.train(texts, _COPY_STEPS), GateConfig())
        loaded = load(bench.bundle)
        return verdict, evaluate_blocks(loaded.model, loaded.tokenizer, unseen, "cpu").bits_per_byte

    first, champion = judge_night(prose)
    assert first.promoted, first.reason
    texts = dict(prose)
    for number, (form, change) in enumerate(FORMS.items(), 1):
        texts |= {f"{form}-{name}": change(text) for name, text in prose.items()}
        verdict, challenger = judge_night(texts)
        yield replace(_describe("copies", bench.seed, number, verdict), outside=champion - challenger)
        champion = challenger if verdict.promoted else champion


def _describe(scenario: str, seed: int, number: int, verdict: Verdict) -> Night:
    assert verdict.champion_bits_per_byte is not None
    return Night(
        scenario=scenario,
        seed=seed,
        number=number,
        promoted=verdict.promoted,
        kind=verdict.kind,
        reason=verdict.reason,
        improvement=verdict.champion_bits_per_byte - verdict.bits_per_byte,
        low=verdict.low,
        high=verdict.high,
        old=verdict.old,
        new=verdict.new if verdict.new and verdict.new.blocks else None,
    )


def judge_all(root: StateRoot, prose: Texts, seed: int, scenarios: Sequence[str]) -> Nights:
    """Judge every scenario with one seed."""
    draw = random.Random(seed)
    chosen = take(prose, draw.sample(sorted(prose), len(prose)), _PROSE_BYTES)
    size = round(sum(len(text.encode()) for text in chosen.values()) * SHARE / (1 - SHARE))
    if "garbage" in scenarios:
        yield from judge_addition(Bench(root, f"garbage-{seed}", seed), chosen, make_garbage(size, draw), "garbage")
    if "new kind" in scenarios:
        bench = Bench(root, f"new-kind-{seed}", seed)
        yield from judge_addition(bench, chosen, make_tables(size, draw), "new kind", (None, FORGET))
    if "growth" in scenarios:
        yield from judge_growth(Bench(root, f"growth-{seed}", seed), chosen)
    if "copies" in scenarios:
        copied = take(chosen, list(chosen), _COPIED_BYTES)
        outside = take(chosen, [name for name in chosen if name not in copied], _OUTSIDE_BYTES)
        yield from judge_copies(Bench(root, f"copies-{seed}", seed), copied, outside)


def table(nights: Sequence[Night]) -> str:
    """Return one row per verdict, as Markdown."""
    lines = [
        "| night | seed | all | old blocks: champion, challenger, improvement | new blocks | by all blocks | gate | "
        "unseen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for night in nights:
        number = f" {night.number}" if night.scenario in ("growth", "copies") else ""
        old, new = night.old, night.new
        cells = (
            f"{night.scenario}{number}",
            str(night.seed),
            _interval(night.improvement, night.low, night.high),
            f"{old.champion:.3f}, {old.challenger:.3f}, {_interval(old.improvement, old.low, old.high)}" if old else "",
            _interval(new.improvement, new.low, new.high) if new else "no blocks",
            "promoted" if night.would_be_promoted else "rejected",
            "promoted" if night.promoted else "rejected",
            "" if night.outside is None else f"{night.outside:+.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def list_failures(nights: Sequence[Night]) -> list[str]:
    """List what contradicts the promises of the module."""
    wanted = {"garbage": False, "new kind": False, f"new kind, forget {FORGET:g}": True}
    failures = [
        f"{night.scenario}, seed {night.seed}: {night.reason}"
        for night in nights
        if wanted.get(night.scenario, night.promoted) != night.promoted
    ]
    failures += [
        f"copies {night.number}, seed {night.seed}: promoted, but by {night.outside:+.3f} on text that no model saw"
        for night in nights
        if night.promoted and night.outside is not None and night.outside <= 0
    ]
    for seed in sorted({night.seed for night in nights if night.scenario == "growth"}):
        count = sum(night.promoted for night in nights if night.scenario == "growth" and night.seed == seed)
        failures += [f"growth, seed {seed}: {count} nights promoted"] if count < LEAST_PROMOTED else []
    return failures


def _interval(improvement: float, low: float | None, high: float | None) -> str:
    return f"{improvement:+.3f}" + ("" if low is None or high is None else f" ({low:+.3f} to {high:+.3f})")


def main() -> int:
    """Run the scenarios of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--text", type=Path, help="prose of 300 kB or more (default: Python's reference)")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--json", type=Path, help="where every verdict is written")
    options = parser.parse_args()
    began, nights = time.perf_counter(), list[Night]()
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(OPT_OUTS, GPTFLOW_HOME=home)
        root = state_root().prepare()
        os.environ["MLFLOW_TRACKING_URI"] = root.tracking_uri
        torch.set_num_threads(1)
        prose = read_prose(options.text)
        for seed in options.seeds:
            for night in judge_all(root, prose, seed, options.only):
                nights.append(night)
                print(f"{night.scenario} {night.number}, seed {seed}: {night.reason}", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{table(nights)}\n\n{seconds:.0f} s, {time.process_time():.0f} s of processor time")
    if options.json:
        options.json.write_text(json.dumps([asdict(night) for night in nights], indent=1) + "\n")
    failures = list_failures(nights)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

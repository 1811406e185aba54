"""How much a recipe learns in the time that its training takes, compared with another one in the same run.

    python -m bench.learning bytes input.txt --seeds 1 2 3 --json learning.json
    python -m bench.learning bpe input.txt --seeds 1 2 3

A small model (4 layers, 4 heads, width 128) learns the first 90 percent of a text. Its loss is over all of the rest, in
nats per token. With bytes, the context is 64 and the batch 12; the baseline is GPT-2's architecture with AdamW for
2,000 steps. With GPT-2's vocabulary, the context is 128 and the batch 16; the baseline has AdamW for 100 steps at its
best learning rate. The modern recipe, with Muon, has far fewer steps. Recipes take turns, seed by seed. Seconds are
those of the updates alone, as in `seconds` of a training.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptcore.config import CorpusConfig, ModelConfig, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.training import memory
from gptcore.training.batches import Batches, make_eval_batches
from gptcore.training.loop import compute_mean_loss, run_updates
from gptcore.training.resolve import resolve
from gptcore.training.state import TrainState

SHAPE = {"emb_dim": 128, "n_heads": 4, "n_layers": 4}
GPT2 = {"init": "gpt2", "tied": True}
MODERN = {"recipe": "modern"}
ADAMW = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "weight_decay": 0.1}
FEWER_STEPS = {"learning_rate": 3e-3, "warmup_steps": 10}
MUON = {"optimizer": "muon", "learning_rate": 0.02, "schedule": "linear", "weight_decay": 0.3, "grad_clip": 0.0}


@dataclass(frozen=True)
class Recipe:
    """A model and the settings of its training."""

    name: str
    model: dict[str, Any]
    train: dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """Recipes that are compared on the same tokens, the baseline first."""

    tokenizer: str
    context: int
    batch_size: int
    recipes: tuple[Recipe, ...]


CONTESTS = {
    "bytes": Contest(
        *("bytes", 64, 12),
        (
            Recipe("gpt2, AdamW, 2,000 steps", GPT2, {**ADAMW, "max_steps": 2000}),
            Recipe("modern, Muon, 260 steps", MODERN, {**MUON, "max_steps": 260}),
            Recipe("modern, Muon, 450 steps", MODERN, {**MUON, "max_steps": 450}),
        ),
    ),
    "bpe": Contest(
        *("gpt2", 128, 16),
        (
            Recipe(
                "gpt2, AdamW, 100 steps", GPT2, {**ADAMW, "learning_rate": 3e-3, "warmup_steps": 15, "max_steps": 100}
            ),
            Recipe("modern, Muon, 45 steps", MODERN, {**MUON, "max_steps": 45}),
        ),
    ),
}


@dataclass(frozen=True)
class Learned:
    """The result of one training."""

    recipe: str
    seed: int
    loss: float
    """Nats per token over the whole val split."""
    seconds: float
    """Seconds in updates."""


def learn(recipe: Recipe, contest: Contest, tokens: Tokens, seed: int) -> Learned:
    """Train once, in this process."""
    model = ModelConfig(**SHAPE, **recipe.model, context_length=contest.context)
    train = resolve(TrainConfig(batch_size=contest.batch_size, eval_batches=None, **recipe.train, seed=seed))
    torch.set_num_threads(int(train.threads))
    state = TrainState.initial(model.build_cfg(tokens.n_vocab), train)
    batches = Batches(tokens.side("train"), contest.context, 1, contest.batch_size, 1, seed)
    for _ in run_updates(state, batches, train):
        pass
    held_out = make_eval_batches(tokens.side("val"), contest.context, 64, None)
    return Learned(
        recipe.name, seed, round(compute_mean_loss(state.model, held_out, state.device), 4), round(state.seconds, 2)
    )


def table(learned: Sequence[Learned]) -> str:
    """Return medians over the seeds, and the time compared with that of the first recipe."""
    of: dict[str, list[Learned]] = defaultdict(list)
    for one in learned:
        of[one.recipe].append(one)
    yardstick = statistics.median(one.seconds for one in of[learned[0].recipe])
    lines = [f"{'recipe':<26} {'loss':>6}  {'training':>9}  {'share':>5}"]
    for name, ones in of.items():
        loss, seconds = (statistics.median(getattr(one, key) for one in ones) for key in ("loss", "seconds"))
        lines.append(f"{name:<26} {loss:6.3f}  {seconds:7.1f} s  {seconds / yardstick:5.2f}")
    return "\n".join(lines)


def main() -> int:
    """Run the contest of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", choices=CONTESTS)
    parser.add_argument("text", help="a text of about a megabyte, such as Shakespeare's plays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="where every training is written")
    asked = parser.parse_args()
    memory.keep_freed_memory()
    contest = CONTESTS[asked.contest]
    with tempfile.TemporaryDirectory() as made:
        split: dict[str, Any] = {"split": "contiguous", "val_fraction": 0.1, "holdout_fraction": 0.0}
        snapshot = ingest(CorpusConfig(sources=(asked.text,), **split), Path(made) / "corpora", Path.cwd())
        tokens = tokenize(snapshot.path, contest.tokenizer, Path(made) / "tokens")
        learned = []
        for seed in asked.seeds:
            for recipe in contest.recipes:
                learned.append(learn(recipe, contest, tokens, seed))
                print(learned[-1], flush=True)
    print(table(learned))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in learned], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

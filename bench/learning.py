"""How much a recipe learns for the time that its training takes, beside another one in the same run.

    python -m bench.learning input.txt --seeds 1 2 3 --json learning.json

A small model of bytes (4 layers, 4 heads, width 128, context 64, batches of 12) learns the first 90 percent of a text;
its loss is over all of the rest, in nats per byte. The yardstick is GPT-2's architecture with AdamW for 2,000 steps.
Beside it stands the modern recipe, with Muon, for far fewer. Recipes take turns, seed by seed. Seconds are those of the
updates alone, which is what `seconds` of a training counts.
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
from gptcore.corpus import ingest
from gptcore.data import Batches, Tokens, eval_batches, tokenize
from gptcore.train import TrainState, mean_loss, resolve, training

SHAPE = {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4}
SHARED: dict[str, Any] = {"batch_size": 12, "stride": 1, "eval_batches": None}
GPT2 = {"init": "gpt2"}
MODERN = {"recipe": "modern"}
ADAMW = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "weight_decay": 0.1}
MUON = {"optimizer": "muon", "learning_rate": 0.02, "schedule": "linear", "weight_decay": 0.0}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long."""

    name: str
    model: dict[str, Any]
    train: dict[str, Any]


RECIPES = (
    Recipe("gpt2, AdamW, 2,000 steps", GPT2, {**ADAMW, "max_steps": 2000}),
    Recipe("modern, Muon, 170 steps", MODERN, {**MUON, "max_steps": 170}),
    Recipe("modern, Muon, 350 steps", MODERN, {**MUON, "max_steps": 350}),
    Recipe("modern, AdamW, 350 steps", MODERN, {**MUON, "optimizer": "adamw", "learning_rate": 4e-3, "max_steps": 350}),
)


@dataclass(frozen=True)
class Learned:
    """What one training came to."""

    recipe: str
    seed: int
    loss: float
    """Nats per byte over the whole val split."""
    seconds: float
    """In updates."""


def learn(recipe: Recipe, tokens: Tokens, seed: int) -> Learned:
    """Trains once, in this process."""
    model, train = ModelConfig(**SHAPE, **recipe.model), resolve(TrainConfig(**SHARED, **recipe.train, seed=seed))
    torch.set_num_threads(int(train.threads))
    state = TrainState.initial(model.for_vocabulary(tokens.n_vocab), train)
    context = SHAPE["context_length"]
    batches = Batches(tokens.side("train"), context, train.stride or context, train.batch_size, 1, seed)
    for _ in training(state, batches, train):
        pass
    loss = mean_loss(state.model, eval_batches(tokens.side("val"), context, 64, None), state.device)
    return Learned(recipe.name, seed, round(loss, 4), round(state.seconds, 2))


def table(learned: Sequence[Learned]) -> str:
    """Medians over the seeds, and the time beside that of the first recipe."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text of about a megabyte, such as Shakespeare's plays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="where every training is written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        split: dict[str, Any] = {"split": "contiguous", "val_fraction": 0.1, "holdout_fraction": 0.0}
        snapshot = ingest(CorpusConfig(sources=(asked.text,), **split), Path(made) / "corpora", Path.cwd())
        tokens = tokenize(snapshot.path, "bytes", Path(made) / "tokens")
        learned = []
        for seed in asked.seeds:
            for recipe in RECIPES:
                learned.append(learn(recipe, tokens, seed))
                print(learned[-1], flush=True)
    print(table(learned))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(one) for one in learned], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

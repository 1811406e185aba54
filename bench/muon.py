"""How much of a training step Muon takes to make its directions orthogonal.

    python -m bench.muon

Steps of 1,024 tokens by the recipe `modern` with 6 layers and 2,048 ids, on two cores. The time within
`gptcore.training.muon.orthogonalise` is compared with the whole step.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from bench.report import table
from gptcore.config import ModelConfig, TrainConfig
from gptcore.processes import count_cpus
from gptcore.training import memory, muon
from gptcore.training.loop import update_weights
from gptcore.training.state import TrainState

TOKENS, IDS = 1024, 2048
_LEARNING_RATE = 0.01


def measure(width: int, context: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of a step and of its orthogonal directions. Two rounds more are not counted."""
    model = ModelConfig(recipe="modern", emb_dim=width, n_heads=width // 64, n_layers=6, context_length=context)
    train = TrainConfig(
        optimizer="muon",
        learning_rate=_LEARNING_RATE,
        batch_size=TOKENS // context,
        device="cpu",
        precision="fp32",
        compile=False,
        threads=torch.get_num_threads(),
    )
    state = TrainState.initial(model.build_cfg(IDS), train)
    tokens = torch.randint(IDS, (train.batch_size, context))
    steps, directions, orthogonalise = [], [0.0], muon.orthogonalise

    def timed(matrices: Tensor) -> Tensor:
        began = time.perf_counter()
        made = orthogonalise(matrices)
        directions[-1] += time.perf_counter() - began
        return made

    muon.orthogonalise = timed
    try:
        for _ in range(rounds + 2):
            began = time.perf_counter()
            update_weights(state, [(tokens, tokens)], _LEARNING_RATE, train)
            steps.append(time.perf_counter() - began)
            directions.append(0.0)
    finally:
        muon.orthogonalise = orthogonalise
    return statistics.median(steps[2:]), statistics.median(directions[2:-1])


def main() -> None:
    """Measure at two widths and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=count_cpus())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 384])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    memory.keep_freed_memory()
    rows = []
    for width in asked.widths:
        step, directions = measure(width, 128, asked.rounds)
        rows.append((str(width), f"{1e3 * step:.0f} ms", f"{1e3 * directions:.0f} ms", f"{directions / step:.2f}"))
    print(table(("width", "step", "directions", "share"), rows))


if __name__ == "__main__":
    main()

"""How training scales over the processes of one machine: `python -m bench.scaling`.

All runs have the same model and global batch, and divide the cores evenly. Each number of processes is measured with
copies of the model and with shards of its tensors. The results are the median time of an update, and the bytes that one
rank sent in it, compared with the least that a ring needs. Copies need an all-reduce of the gradients, 2 (n - 1) / n of
their bytes. Shards need two all-gathers of the weights and a reduce-scatter of the gradients, 3 (n - 1) / n
(Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054, section 7). gloo has no reduce-scatter and sends a whole all-reduce
instead. Bytes are those of the loopback interface in a separate network namespace, which needs Linux and root.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.workers import ROOT
from gptcore.config import TrainConfig
from gptcore.training.batches import Batches
from gptcore.training.distributed import join_ranks
from gptcore.training.loop import update_weights
from gptcore.training.rendezvous import make_local_environments, new_store
from gptcore.training.state import TrainState

CFG = {"vocab_size": 8192, "context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6, "drop_rate": 0.0}
MODEL = {**CFG, "qkv_bias": False, "tied": True, "init": "gpt2"}
BATCH_SIZE = 8
WARM_UP = 2
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Scaled:
    """The measurement of one number of processes."""

    processes: int
    shard: bool
    seconds: float
    """The median of an update."""
    mb_sent: float | None
    """Sent by each rank in one update; None if the bytes of other programs could not be excluded."""
    mb_at_least: float
    loss: float
    """The loss of the last update. It is the same for all measurements if they do the same."""


def measure(processes: int, shard: bool, optimizer: str, steps: int) -> Scaled:
    """Start the ranks in a separate network namespace, and read the figures of rank 0."""
    asked = json.dumps({"shard": shard, "optimizer": optimizer, "steps": steps})
    command = [sys.executable, "-m", "bench.scaling", "--processes", str(processes), "--start", asked]
    is_alone = os.geteuid() == 0 and sys.platform == "linux"
    if is_alone:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    passes = 3 if shard else 2
    return Scaled(
        processes=processes,
        shard=shard,
        seconds=statistics.median(found["seconds"]),
        mb_sent=found["bytes"] / steps / processes / 1e6 if is_alone else None,
        mb_at_least=passes * (processes - 1) / processes * _FLOAT_BYTES * found["parameters"] / 1e6,
        loss=found["loss"],
    )


def start_ranks(processes: int, asked: str) -> None:
    """Start the ranks on this machine, and wait until they have ended."""
    command = [sys.executable, "-m", "bench.scaling", "--rank", asked]
    with tempfile.TemporaryDirectory() as directory:
        environments = make_local_environments(processes, new_store(Path(directory)))
        ranks = [subprocess.Popen(command, env={**os.environ, **environment}) for environment in environments]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks ended with exit codes {codes}")


def rank(shard: bool, optimizer: str, steps: int) -> dict[str, Any]:
    """Make the updates of one rank, which are the same as those of all others, and return its figures."""
    train = TrainConfig(
        batch_size=BATCH_SIZE, shard=shard, optimizer=optimizer, device="cpu", precision="fp32", compile=False
    )
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], 200_000).astype(np.uint16)
    with join_ranks() as ranks:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.size))
        state = TrainState.initial(MODEL, train, ranks)
        context = MODEL["context_length"]
        batches = Batches(tokens, context, context, BATCH_SIZE, 1, 0, rank=ranks.rank, num_ranks=ranks.size)
        seconds = []
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                ranks.run_on_all_ranks(lambda: None)
                sent = _sent()
            began = time.perf_counter()
            loss, _ = update_weights(state, batches.make_micro_batches(step), 1e-3, train)
            seconds.append(time.perf_counter() - began)
        ranks.run_on_all_ranks(lambda: None)
        return {
            "rank": ranks.rank,
            "seconds": seconds[WARM_UP:],
            "bytes": _sent() - sent,
            "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
            "loss": loss,
        }


def _sent() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.start:
        start_ranks(asked.processes[0], asked.start)
        return
    if asked.rank:
        found = rank(**json.loads(asked.rank))
        if found["rank"] == 0:
            print(json.dumps(found), flush=True)
        return
    print("| processes | held as | updates/s | speed-up | MB sent per rank and update | at least | last loss |")
    print("|---|---|---|---|---|---|---|")
    alone = None
    for processes in asked.processes:
        for shard in (False, True) if processes > 1 else (False,):
            made = measure(processes, shard, asked.optimizer, asked.steps)
            alone = alone or made.seconds
            sent = "-" if made.mb_sent is None else f"{made.mb_sent:.1f}"
            held = "parts" if shard else "copies" if processes > 1 else "one"
            print(
                f"| {processes} | {held} | {1 / made.seconds:.2f} | {alone / made.seconds:.2f} | {sent} | "
                f"{made.mb_at_least:.1f} | {made.loss:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

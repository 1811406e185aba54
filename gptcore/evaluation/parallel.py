"""Scores blocks of text with several processes, each on its own GPU or with its share of the CPU cores.

bits_per_byte.py scores blocks in groups, and the scores of a group do not depend on the process. This process and
child processes (gptcore/processes.py) take the groups in turn. The scores equal those of one process that has as many
threads as each of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from gptcore.corpus.snapshot import sample_blocks
from gptcore.devices import count_devices
from gptcore.evaluation.bits_per_byte import GROUP_BLOCKS, BlockScore, score_blocks
from gptcore.evaluation.weights import choose_scoring_device, load_model
from gptcore.processes import start_pool
from gptcore.tokens.directory import Tokens, read_manifest
from gptcore.training.run_directory import RunDirectory


@dataclass(frozen=True)
class _Share:
    """The groups of blocks that one process scores: every `count`-th group, from group `index` on."""

    run: RunDirectory
    tokens: Path
    snapshot: Path
    side: str
    max_bytes: int | None
    index: int
    count: int
    group_blocks: int
    threads: int

    def read_texts(self) -> list[str]:
        """Read the texts of its blocks, in order."""
        numbered = enumerate(sample_blocks(self.snapshot, self.side, self.max_bytes))
        return [block.text for number, block in numbered if number // self.group_blocks % self.count == self.index]


def score_in_processes(
    run: RunDirectory,
    tokens: Tokens,
    snapshot: Path,
    side: str,
    max_bytes: int | None = None,
    group_blocks: int = GROUP_BLOCKS,
) -> Iterator[BlockScore]:
    """Score the blocks that `sample_blocks` returns by the run's best weights, with the run's number of processes.

    Raises CheckpointError if the weights were altered, and WorkerDied if a child dies three times.
    """
    groups = -(-len(sample_blocks(snapshot, side, max_bytes)) // group_blocks)
    count = max(1, min(int(run.read_config().train.processes), groups))
    if choose_scoring_device(run).type == "cuda":
        count = min(count, count_devices("cuda"))
    threads = torch.get_num_threads()
    shares = [
        _Share(
            run,
            tokens.path,
            snapshot,
            side,
            max_bytes,
            index=index,
            count=count,
            group_blocks=group_blocks,
            threads=max(1, threads // count),
        )
        for index in range(count)
    ]
    try:
        with start_pool(count - 1) as pool:
            others = [pool.submit(_score_share, share) for share in shares[1:]]
            scores = [_score_share(shares[0]), *(other.result() for other in others)]
    finally:
        torch.set_num_threads(threads)
    sources = [iter(share_scores) for share_scores in scores]
    for group in range(groups):
        yield from islice(sources[group % count], group_blocks)


def _score_share(share: _Share) -> list[BlockScore]:
    torch.set_num_threads(share.threads)
    device = choose_scoring_device(share.run)
    if device.type == "cuda" and share.count > 1:
        device = torch.device("cuda", share.index)
    model, tokenizer = load_model(share.run, read_manifest(share.tokens), device)
    return list(score_blocks(model, tokenizer, share.read_texts(), device, share.group_blocks))

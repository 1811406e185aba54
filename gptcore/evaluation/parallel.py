"""Scores blocks of text with several processes, each on its own GPU or with its share of the CPU cores.

bits_per_byte.py scores blocks in groups, and the scores of a group do not depend on the process. This process and
plain child processes take the groups in turn; each child writes its scores to a file. The scores equal those of one
process that has as many threads as each of these. A child exits when its parent does.
"""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcore.corpus.snapshot import read_blocks
from gptcore.errors import GPTCoreError
from gptcore.evaluation.bits_per_byte import GROUP_BLOCKS, BlockScore, score_blocks
from gptcore.evaluation.weights import load_model
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import load_tokens
from gptcore.training.run_directory import RunDirectory

_ARRAYS = ("ids", "nats", "ranks", "positions")


@dataclass(frozen=True)
class _Job:
    """What is scored: one side of a snapshot, by a run's best weights."""

    run: RunDirectory
    tokens: Tokens
    snapshot: Path
    side: str


@dataclass(frozen=True)
class _Share:
    """The groups of blocks that one process scores: every `count`-th group, from group `index` on."""

    index: int
    count: int
    group_blocks: int = GROUP_BLOCKS

    def read_texts(self, snapshot: Path, side: str) -> list[str]:
        """Read the texts of its blocks, in order."""
        numbered = enumerate(read_blocks(snapshot, side))
        return [block.text for number, block in numbered if number // self.group_blocks % self.count == self.index]


def score_in_processes(
    run: RunDirectory, tokens: Tokens, snapshot: Path, side: str, work: Path, group_blocks: int = GROUP_BLOCKS
) -> Iterator[BlockScore]:
    """Score all blocks of a side by the run's best weights, in order, with the run's number of processes.

    The children leave their files in the directory `work`. Raises GPTCoreError if a child fails.
    """
    groups = -(-sum(1 for _ in read_blocks(snapshot, side)) // group_blocks)
    count = max(1, min(int(run.read_config().train.processes), groups))
    shares = [_Share(index, count, group_blocks) for index in range(count)]
    files = [work / f"{side}-{share.index}.npz" for share in shares[1:]]
    job = _Job(run=run, tokens=tokens, snapshot=snapshot, side=side)
    with _start_children(job, shares[1:], files) as children, _limit_threads(count):
        own_scores = list(_score_share(job, shares[0]))
        for child in children:
            _wait_for(child, side)
    sources = [iter(own_scores), *(_read_scores(file) for file in files)]
    for group in range(groups):
        yield from islice(sources[group % count], group_blocks)


def _score_share(job: _Job, share: _Share) -> Iterator[BlockScore]:
    device = torch.device(job.run.read_config().train.device)
    if device.type == "cuda" and share.count > 1:
        device = torch.device("cuda", share.index)
    model, tokenizer = load_model(job.run, job.tokens)
    texts = share.read_texts(job.snapshot, job.side)
    return score_blocks(model.to(device), tokenizer, texts, device, share.group_blocks)


@contextmanager
def _limit_threads(processes: int) -> Iterator[None]:
    """Let torch use only this process's share of the threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes))
    yield
    torch.set_num_threads(before)


@contextmanager
def _start_children(
    job: _Job, shares: Sequence[_Share], files: Sequence[Path]
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Start a child for each share, and kill those that still run when the `with` block ends."""
    started: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        for share, file in zip(shares, files):
            started.append(
                subprocess.Popen(
                    _command(job, share, file),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    env=environment,
                )
            )
        yield started
    finally:
        for child in started:
            child.kill()
            child.communicate()


def _command(job: _Job, share: _Share, file: Path) -> list[str]:
    options = {
        "run": job.run.path.absolute(),
        "tokens": job.tokens.path.absolute(),
        "snapshot": job.snapshot.absolute(),
        "side": job.side,
        "index": share.index,
        "count": share.count,
        "group-blocks": share.group_blocks,
        "threads": torch.get_num_threads() // share.count,
        "file": file,
    }
    return [
        sys.executable,
        "-m",
        "gptcore.evaluation.parallel",
        *(f"--{key}={value}" for key, value in options.items()),
    ]


def _wait_for(child: "subprocess.Popen[bytes]", side: str) -> None:
    """Wait until a child exits. Raises GPTCoreError with the last line of its output if it failed."""
    assert child.stderr is not None
    output = child.stderr.read().decode(errors="replace")  # `communicate` would close the child's input
    if child.wait():
        last = " ".join(output.strip().splitlines()[-1:])
        raise GPTCoreError(f"A process that scored {side} failed with exit code {child.returncode}: {last}")


def _write_scores(file: Path, scores: list[BlockScore]) -> None:
    arrays: dict[str, Any] = {name: np.concatenate([getattr(score, name) for score in scores]) for name in _ARRAYS}
    arrays["lengths"] = np.array([len(score.ids) for score in scores])
    np.savez(file, num_bytes=np.array([score.num_bytes for score in scores]), **arrays)


def _read_scores(file: Path) -> Iterator[BlockScore]:
    with np.load(file, allow_pickle=False) as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        columns = [np.split(arrays[name], cuts) for name in _ARRAYS]
        for num_bytes, *values in zip(arrays["num_bytes"].tolist(), *columns):
            yield BlockScore(num_bytes, *values)


def _exit_with_parent() -> None:
    """Exit as soon as the parent closes this process's input, which it also does when it dies."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Score one share, as a child process, and write the scores to a file."""
    parser = argparse.ArgumentParser()
    for name in ("--run", "--tokens", "--snapshot", "--file"):
        parser.add_argument(name, type=Path)
    for name in ("--index", "--count", "--group-blocks", "--threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("--side")
    options = parser.parse_args()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, options.threads))
    run, tokens = RunDirectory(options.run), load_tokens(options.tokens)
    job = _Job(run=run, tokens=tokens, snapshot=options.snapshot, side=options.side)
    share = _Share(index=options.index, count=options.count, group_blocks=options.group_blocks)
    _write_scores(options.file, list(_score_share(job, share)))


if __name__ == "__main__":
    main()

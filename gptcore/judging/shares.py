"""Scoring blocks of text by several processes, each on a GPU of its own or on its share of the cores.

Blocks are scored in groups (gptcore.evaluate), and what comes out of a group does not depend on who scores it: the
groups are dealt out in turn to this process and to plain children, which leave their scores in a file. The numbers are
those of one process that has as many threads as each of these. A child ends with the process that started it.
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

from gptcore.corpus import blocks
from gptcore.data import Tokens, load_tokens
from gptcore.errors import GPTCoreError
from gptcore.evaluate import GROUP_BLOCKS, BlockScore, score_blocks
from gptcore.judging.weights import load_model
from gptcore.learning.rundir import RunDirectory

_ARRAYS = ("ids", "nats", "ranks", "positions")


@dataclass(frozen=True)
class Share:
    """Which groups of blocks are one process's: every `of`-th one, from `index` on."""

    index: int
    of: int
    group_blocks: int = GROUP_BLOCKS

    def texts(self, snapshot: Path, side: str) -> list[str]:
        """The texts of its blocks, in order."""
        every = enumerate(blocks(snapshot, side))
        return [block.text for number, block in every if number // self.group_blocks % self.of == self.index]


def scored(
    run: RunDirectory, tokens: Tokens, snapshot: Path, side: str, work: Path, group_blocks: int = GROUP_BLOCKS
) -> Iterator[BlockScore]:
    """The scores of all blocks of a side by the run's best weights, in order, by its number of processes.

    The children's files are left in `work`. Raises GPTCoreError if a child fails.
    """
    groups = -(-sum(1 for _ in blocks(snapshot, side)) // group_blocks)
    of = max(1, min(int(run.config().train.processes), groups))
    shares = [Share(index, of, group_blocks) for index in range(of)]
    files = [work / f"{side}-{share.index}.npz" for share in shares[1:]]
    with _children(run, tokens, snapshot, side, shares[1:], files) as children, _threads(of):
        mine = list(_scored(run, tokens, snapshot, side, shares[0]))
        for child in children:
            assert child.stderr is not None
            said = child.stderr.read().decode(errors="replace")  # not communicate, which would end its input
            if child.wait():
                last = " ".join(said.strip().splitlines()[-1:])
                raise GPTCoreError(f"a process that scored {side} ended with exit code {child.returncode}: {last}")
    sources = [iter(mine), *(_read(file) for file in files)]
    for group in range(groups):
        yield from islice(sources[group % of], group_blocks)


def _scored(run: RunDirectory, tokens: Tokens, snapshot: Path, side: str, share: Share) -> Iterator[BlockScore]:
    device = torch.device(run.config().train.device)
    if device.type == "cuda" and share.of > 1:
        device = torch.device("cuda", share.index)
    model, tokenizer = load_model(run, tokens)
    return score_blocks(model.to(device), tokenizer, share.texts(snapshot, side), device, share.group_blocks)


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """While it lasts, torch uses this process's share of the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes))
    yield
    torch.set_num_threads(before)


@contextmanager
def _children(
    run: RunDirectory, tokens: Tokens, snapshot: Path, side: str, shares: Sequence[Share], files: Sequence[Path]
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []
    inputs = [str(path.absolute()) for path in (run.path, tokens.path, snapshot)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        for share, file in zip(shares, files):
            numbers = map(str, (share.index, share.of, share.group_blocks, torch.get_num_threads() // share.of))
            command = [sys.executable, "-m", "gptcore.judging.shares", *inputs, side, *numbers, str(file)]
            started.append(
                subprocess.Popen(
                    command,
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


def _write(file: Path, scores: list[BlockScore]) -> None:
    arrays: dict[str, Any] = {name: np.concatenate([getattr(score, name) for score in scores]) for name in _ARRAYS}
    arrays["lengths"] = np.array([len(score.ids) for score in scores])
    np.savez(file, num_bytes=np.array([score.num_bytes for score in scores]), **arrays)


def _read(file: Path) -> Iterator[BlockScore]:
    with np.load(file, allow_pickle=False) as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        columns = [np.split(arrays[name], cuts) for name in _ARRAYS]
        for num_bytes, *values in zip(arrays["num_bytes"].tolist(), *columns):
            yield BlockScore(num_bytes, *values)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """A child: scores its share and writes it."""
    parser = argparse.ArgumentParser()
    for name in ("run", "tokens", "snapshot", "side"):
        parser.add_argument(name)
    for name in ("index", "of", "group_blocks", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, asked.threads))
    run, tokens = RunDirectory(Path(asked.run)), load_tokens(Path(asked.tokens))
    share = Share(asked.index, asked.of, asked.group_blocks)
    _write(asked.file, list(_scored(run, tokens, Path(asked.snapshot), asked.side, share)))


if __name__ == "__main__":
    main()

"""Say what evidence the gate lacks if too few held-out blocks can count, and how to get it.

compare.py needs `MIN_BLOCKS` blocks that are clean for both models. A small corpus may have fewer. Then no challenger
can win, however good it is, so the run says so when it reads the text, and the gate in its reason.
"""

import math
from collections.abc import Iterator
from itertools import chain, islice

from gptcore.corpus.blocks import cut_blocks
from gptcore.corpus.snapshot import Snapshot, read_blocks
from gptcore.corpus.split import CHOICES, ENOUGH_BLOCKS
from gptcore.evaluation.compare import MIN_BLOCKS
from gptcore.evaluation.run_report import reported_side

_LARGEST_SHARE = 0.5  # of the text, that is suggested for the reported side
_SAMPLE = 200  # blocks that are cut again, to learn how many blocks a smaller size gives


def explain_shortage(snapshot: Snapshot, clean_blocks: int | None = None) -> str:
    """Return a sentence about a reported side that is too small to decide anything. Empty if it has enough blocks.

    `clean_blocks` is the number of blocks that are clean for both models, or None before there is a model to compare.
    For example, "holdout has 12 blocks; the gate needs 20 that are clean for both models: set corpus.block_bytes to 512
    or corpus.holdout_fraction to 0.15, or add about 200 kB of text".
    """
    side = reported_side(snapshot)
    count = snapshot.blocks[side] if clean_blocks is None else clean_blocks
    if count >= MIN_BLOCKS:
        return ""
    expected = snapshot.split[f"{side}_fraction"] * sum(snapshot.blocks.values())
    more = math.ceil((ENOUGH_BLOCKS - count) / expected * sum(snapshot.bytes.values()) / 1000)
    keys = " or ".join(_suggest_keys(snapshot, side, ENOUGH_BLOCKS - count))
    has = f"{side} has {count} blocks" + ("" if clean_blocks is None else " that are clean for both models")
    needs = f"the gate needs {MIN_BLOCKS}" + (" that are clean for both models" if clean_blocks is None else "")
    return f"{has}; {needs}: {f'set {keys}, or ' if keys else ''}add about {more:,} kB of text"


def _suggest_keys(snapshot: Snapshot, side: str, missing: int) -> Iterator[str]:
    """Yield each key of the configuration that would by itself give the `missing` blocks, with its value."""
    key = f"{side}_fraction"
    share = snapshot.split[key]
    needed_bytes = sum(snapshot.bytes.values()) * share / ENOUGH_BLOCKS
    for choice in CHOICES:
        smaller = choice.block_bytes
        if smaller < snapshot.split["block_bytes"] and _mean_block_bytes(snapshot, smaller) <= needed_bytes:
            yield f"corpus.block_bytes to {smaller}"
            break
    larger = math.ceil(20 * (share + missing / sum(snapshot.blocks.values()))) / 20
    if larger <= _LARGEST_SHARE:
        yield f"corpus.{key} to {larger:g}"


def _mean_block_bytes(snapshot: Snapshot, block_bytes: int) -> float:
    """Return the mean length that blocks of the held-out text would have if `block_bytes` were this small."""
    held_out = chain.from_iterable(read_blocks(snapshot.path, side) for side in ("val", "holdout"))
    texts = [block.text.encode() for block in islice(held_out, _SAMPLE)]
    return sum(map(len, texts)) / sum(1 for text in texts for _ in cut_blocks([text], block_bytes))

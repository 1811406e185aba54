"""How good a model is: the loss while it trains, and its score on text that it never saw.

`evaluate_model` is the seed's: mean losses over some batches of two loaders. `evaluate_blocks` is the score that
releases are compared by: bits per byte, which does not depend on the vocabulary, with accuracies and the loss at each
position beside it. Neither changes what is trained: `undisturbed` gives back every mode and random state as it was.
What simple models and a compressor reach on the same text stands in baselines.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.corpus import Block
from gptcore.errors import CorpusError
from gptcore.loss import calc_loss_loader, losses_and_ranks
from gptcore.model import GPTModel, eval_mode
from gptcore.tokenizer import Tokenizer

BATCH_TOKENS = 4096
"""Tokens, padding included, that go through the model at once."""
GROUP_BLOCKS = 256
"""Blocks that are held in memory together, so that windows of like length find each other."""


def evaluate_model(
    model: nn.Module, train_loader: Any, val_loader: Any, device: torch.device | str, eval_iter: int | None
) -> tuple[float, float]:
    """Mean losses, in nats per token, over the first `eval_iter` batches of both loaders, in eval mode.

    The model's modes, the random states and the loaders' generators are afterwards what they were before.
    """
    with undisturbed(model, train_loader, val_loader):
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    return train_loss, val_loss


@contextlib.contextmanager
def undisturbed(model: nn.Module, *loaders: Any) -> Iterator[None]:
    """Eval mode without gradients, after which training goes on as if nothing had happened.

    Restores train or eval mode of each module on its own (a part may be frozen in eval mode), torch's random state on
    the CPU and on the model's devices, and the generators of the loaders and of their samplers. (Iterating a DataLoader
    draws from them, or from the global state, even where nothing is shuffled.)
    """
    generators = {id(generator): generator for loader in loaders for generator in _generators(loader)}.values()
    restore: list[Callable[[], object]] = [
        partial(generator.set_state, generator.get_state()) for generator in generators
    ]
    restore += _random_states(model)
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for action in restore:
            action()


def _random_states(model: nn.Module) -> list[Callable[[], object]]:
    """What gives torch's random states on the CPU and on the model's devices their present values back."""
    restore: list[Callable[[], object]] = [partial(torch.set_rng_state, torch.get_rng_state())]
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "mps":
            restore.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
        elif device.type != "cpu":
            module = torch.get_device_module(device)
            restore.append(partial(module.set_rng_state, module.get_rng_state(device), device))
    return restore


def _generators(loader: Any) -> Iterator[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            yield generator


class BlockScore(NamedTuple):
    """What a model makes of one block of text; arrays have one entry per token of the block."""

    num_bytes: int
    """Of the text in UTF-8."""
    ids: np.ndarray
    """(tokens,) the block's tokens, without an end-of-text id."""
    nats: np.ndarray
    """(tokens,) minus the natural logarithm of the probability that the model gave to each."""
    ranks: np.ndarray
    """(tokens,) how many other entries of the vocabulary were at least as likely: 0 is a hit. Ties count against."""
    positions: np.ndarray
    """(tokens,) how many tokens of the window stood before the one that the prediction was read from."""


def score_blocks(
    model: GPTModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    device: torch.device | str,
    group_blocks: int = GROUP_BLOCKS,
) -> Iterator[BlockScore]:
    """Scores every text on its own, in order, as DESIGN defines bits per byte.

    A text is preceded by the end-of-text id and each of its tokens is predicted exactly once, in windows of the
    model's context that advance by half a context: the first window predicts all of its tokens, each later one those
    that are still open. The end-of-text id itself is never predicted. Windows of many texts share a batch, padded on
    the right, where a causal model cannot see it.
    """
    remaining = iter(texts)
    while group := list(islice(remaining, group_blocks)):
        ids = [np.asarray(tokenizer.encode(text), dtype=np.int64) for text in group]
        with undisturbed(model):
            scored = _score_tokens(model, ids, tokenizer.eot, device)
        for text, block_ids, (nats, ranks, positions) in zip(group, ids, scored):
            yield BlockScore(len(text.encode()), block_ids, nats, ranks, positions)


class _Window(NamedTuple):
    block: int
    begin: int
    """First input. Input i of a block is the token before its token i; input 0 is the end-of-text id."""
    scored: int
    """First token that no earlier window predicted."""
    end: int


def windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first predicted, end) of the windows that predict each of `num_tokens` exactly once."""
    begin, predicted = 0, 0
    while predicted < num_tokens:
        end = min(begin + context, num_tokens)
        yield begin, predicted, end
        begin, predicted = begin + max(1, context // 2), end


def _score_tokens(
    model: GPTModel, blocks: Sequence[np.ndarray], eot: int, device: torch.device | str
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Nats, ranks and positions of every block's tokens."""
    inputs = [np.concatenate(([eot], ids[:-1])) for ids in blocks]
    results = [(np.zeros(len(ids)), np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)) for ids in blocks]
    every = [
        _Window(index, *window)
        for index, ids in enumerate(blocks)
        for window in windows(len(ids), model.context_length)
    ]
    for batch in _batches(every):
        width = max(window.end - window.begin for window in batch)
        ids = np.full((len(batch), width), eot)
        targets = np.full((len(batch), width), -1)
        for row, (block, begin, scored, end) in enumerate(batch):
            ids[row, : end - begin] = inputs[block][begin:end]
            targets[row, scored - begin : end - begin] = blocks[block][scored:end]
        nats, ranks = _predict(model, torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
        cuts = np.cumsum([window.end - window.scored for window in batch])[:-1]
        for window, its_nats, its_ranks in zip(batch, np.split(nats, cuts), np.split(ranks, cuts)):
            place = slice(window.scored, window.end)
            results[window.block][0][place] = its_nats
            results[window.block][1][place] = its_ranks
            results[window.block][2][place] = np.arange(window.scored - window.begin, window.end - window.begin)
    return results


def _batches(every: list[_Window]) -> Iterator[list[_Window]]:
    """Windows of like length together, so that little of a batch is padding."""
    remaining = iter(sorted(every, key=lambda window: window.begin - window.end))
    while first := next(remaining, None):
        rows = max(1, BATCH_TOKENS // (first.end - first.begin))
        yield [first, *islice(remaining, rows - 1)]


def _predict(model: GPTModel, ids: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nats and ranks of the targets, of shape (batch, tokens), that are not -1, row by row."""
    wanted = targets >= 0
    hidden, chosen = model.hidden(ids)[wanted], targets[wanted]
    if isinstance(model.out_head, nn.Linear):
        nats, ranks = losses_and_ranks(hidden, model.out_head.weight, chosen)
    else:  # of rounded weights, which no product but the layer's own takes
        pieces = [_of_logits(model.out_head(rows), ids) for rows, ids in zip(hidden.split(512), chosen.split(512))]
        nats, ranks = (torch.cat(each) for each in zip(*pieces))
    return nats.double().cpu().numpy(), ranks.cpu().numpy()


def _of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `losses_and_ranks` gives, of logits (rows, vocabulary)."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    ranks = (logits >= logits.gather(1, targets[:, None])).sum(dim=1) - 1
    return losses, torch.where(losses.isnan(), logits.shape[1], ranks)


@dataclass(frozen=True)
class Evaluation:
    """A model's score on one side of the split. A score that is not finite stays NaN or infinite here, None in JSON."""

    side: str
    """Which side of the split was scored: holdout, or val where there is no holdout."""
    also_used_for_selection: bool
    """Whether this text also chose the checkpoint, which makes the scores a little too good."""
    blocks: int
    bytes: int
    tokens: int
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss), per token: comparable only between models with the same tokenizer."""
    bits_per_byte: float
    top1: float
    """Share of tokens that the model thought likeliest."""
    top5: float
    """Share of tokens among the model's five likeliest."""
    loss_by_position: tuple[float, ...]
    """Mean nats of the tokens predicted from position 0, 1, ... of a window; position p has seen p + 1 tokens, at the
    start of a block the end-of-text id among them. Positions from half a context on also hold the later windows of
    long blocks. NaN where nothing was predicted."""
    per_block: tuple[dict[str, Any], ...]
    """For each block sha256, document, bytes, nats and tokens, for the paired comparison of two models."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps(..., allow_nan=False)."""
        return _without_nan(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Evaluation":
        """The reverse of `to_json`; None becomes NaN."""
        scores = {key: _number(data[key]) for key in ("loss", "perplexity", "bits_per_byte")}
        positions = tuple(_number(value) for value in data["loss_by_position"])
        blocks = tuple({**block, "nats": _number(block["nats"])} for block in data["per_block"])
        return cls(**{**data, **scores, "loss_by_position": positions, "per_block": blocks})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_blocks(
    model: GPTModel,
    tokenizer: Tokenizer,
    blocks: Iterable[Block],
    device: torch.device | str,
    side: str = "holdout",
    scores: Iterable[BlockScore] | None = None,
) -> Evaluation:
    """Scores a model, with its own tokenizer, on blocks of text of one side of the split.

    `scores` are the blocks' if somebody has made them already. Losses that are not finite are reported as they are.
    Raises CorpusError where there is no text to score.
    """
    per_block: list[dict[str, Any]] = []
    hits = np.zeros(2)
    sums, counts = np.zeros((2, model.context_length))
    kept = list(blocks)
    if scores is None:
        scores = score_blocks(model, tokenizer, (block.text for block in kept), device)
    for block, score in zip(kept, scores):
        per_block.append({"sha256": block.sha256, "document": block.document, **_totals(score)})
        hits += (score.ranks < 1).sum(), (score.ranks < 5).sum()
        np.add.at(sums, score.positions, score.nats)
        np.add.at(counts, score.positions, 1)
    if not counts.any():
        raise CorpusError(f"The {side} side has no text to score ({len(kept)} blocks); add text or raise its fraction.")
    return _evaluation(side, per_block, hits, sums, counts)


def _totals(score: BlockScore) -> dict[str, Any]:
    return {"bytes": score.num_bytes, "nats": float(score.nats.sum()), "tokens": len(score.ids)}


def _evaluation(
    side: str, per_block: list[dict[str, Any]], hits: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> Evaluation:
    nats, num_bytes, tokens = (sum(block[key] for block in per_block) for key in ("nats", "bytes", "tokens"))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        perplexity = float(np.exp(np.float64(nats / tokens)))
        loss_by_position = tuple((sums / counts).tolist())
    return Evaluation(
        side=side,
        also_used_for_selection=side != "holdout",
        blocks=len(per_block),
        bytes=num_bytes,
        tokens=tokens,
        loss=nats / tokens,
        perplexity=perplexity,
        bits_per_byte=nats / math.log(2) / num_bytes,
        top1=float(hits[0] / tokens),
        top5=float(hits[1] / tokens),
        loss_by_position=loss_by_position,
        per_block=tuple(per_block),
    )

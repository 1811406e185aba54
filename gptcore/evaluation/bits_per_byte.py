"""The loss of a model while it trains, and its score on text that it never saw.

`evaluate_model` is the book's: mean losses over some batches of two loaders. `evaluate_blocks` gives the score that
versions are compared by, bits per byte: how many bits the model needs on average for one byte of the text. Tokenizers
cut text into tokens of different lengths, so losses per token do not compare between vocabularies, but bits per byte
do. Accuracies and the loss at each position come with the score. Neither function changes the model or any random
state (`preserve_training_state`). The scores of simple models and of a compressor on the same text are in baselines.py.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.corpus.snapshot import Block
from gptcore.errors import CorpusError
from gptcore.model.gpt import GPTModel
from gptcore.model.loss import calc_loss_loader, calc_losses_and_ranks
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.preserve import preserve_training_state

BATCH_TOKENS = 4096
"""Tokens, padding included, in one batch."""
GROUP_BLOCKS = 256
"""Blocks in memory at the same time. Windows of similar length are batched within such a group."""


def evaluate_model(
    model: nn.Module, train_loader: Any, val_loader: Any, device: torch.device | str, eval_iter: int | None
) -> tuple[float, float]:
    """Return the mean losses, in nats per token, over the first `eval_iter` batches of each loader, in eval mode.

    Restores the model's modes, the random states and the loaders' generators, so that an evaluation changes nothing in
    the training. The book's evaluation draws random numbers and switches all of the model to training mode. So, under
    the same seed, losses after the first evaluation differ from the book's. This is the book's:

        model.eval()
        with torch.no_grad():
            train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
            val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
        model.train()
    """
    with preserve_training_state(model, train_loader, val_loader):
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    return train_loss, val_loss


class BlockScore(NamedTuple):
    """A model's predictions of one block of text. The arrays have one entry per token of the block."""

    num_bytes: int
    """Length of the text in UTF-8."""
    ids: np.ndarray
    """(tokens,) the block's tokens, without an end-of-text id."""
    nats: np.ndarray
    """(tokens,) minus the natural logarithm of the probability that the model gave to each token."""
    ranks: np.ndarray
    """(tokens,) how many other entries of the vocabulary were at least as likely. 0 is a hit; ties count against it."""
    positions: np.ndarray
    """(tokens,) the position in the window that each prediction was read from; position p has seen p + 1 tokens."""


def score_blocks(
    model: GPTModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    device: torch.device | str,
    group_blocks: int = GROUP_BLOCKS,
) -> Iterator[BlockScore]:
    """Score every text on its own, in order.

    The end-of-text id precedes each text and is never predicted itself. Each token of the text is predicted exactly
    once, in windows of the model's context that advance by half a context (see `plan_windows`). Windows of many texts
    share a batch. They are padded on the right, and a causal model cannot see that padding.
    """
    remaining = iter(texts)
    while group := list(islice(remaining, group_blocks)):
        blocks = [np.asarray(tokenizer.encode(text), dtype=np.int64) for text in group]
        with preserve_training_state(model):
            token_scores = _score_tokens(model, blocks, tokenizer.eot, device)
        for text, ids, (nats, ranks, positions) in zip(group, blocks, token_scores):
            yield BlockScore(len(text.encode()), ids, nats, ranks, positions)


class _Window(NamedTuple):
    block: int
    begin: int
    """First input. Input i of a block is the token before its token i; input 0 is the end-of-text id."""
    first_predicted: int
    """First token that no earlier window predicted."""
    end: int


class _TokenScores(NamedTuple):
    """(tokens,) scores of one block's tokens, filled window by window."""

    nats: np.ndarray
    ranks: np.ndarray
    positions: np.ndarray


def plan_windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first predicted token, end) of the windows that predict each of `num_tokens` exactly once.

    The first window predicts all of its tokens. Each later window predicts those that no earlier one has predicted.
    For example, 10 tokens in a context of 4 give (0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10).
    """
    begin, predicted = 0, 0
    while predicted < num_tokens:
        end = min(begin + context, num_tokens)
        yield begin, predicted, end
        begin, predicted = begin + max(1, context // 2), end


def _score_tokens(
    model: GPTModel, blocks: Sequence[np.ndarray], eot: int, device: torch.device | str
) -> list[_TokenScores]:
    """Score the tokens of every block, each (tokens,)."""
    inputs = [np.concatenate(([eot], ids[:-1])) for ids in blocks]
    results = [
        _TokenScores(
            nats=np.zeros(len(ids)), ranks=np.zeros(len(ids), np.int64), positions=np.zeros(len(ids), np.int64)
        )
        for ids in blocks
    ]
    all_windows = [
        _Window(index, *window)
        for index, ids in enumerate(blocks)
        for window in plan_windows(len(ids), model.context_length)
    ]
    for batch in _batch_windows(all_windows):
        width = max(window.end - window.begin for window in batch)
        ids = np.full((len(batch), width), eot)  # (batch, tokens), padded on the right
        targets = np.full((len(batch), width), -1)  # (batch, tokens), -1 if this window does not predict it
        for row, (block, begin, first, end) in enumerate(batch):
            ids[row, : end - begin] = inputs[block][begin:end]
            targets[row, first - begin : end - begin] = blocks[block][first:end]
        # (predicted tokens,) of the whole batch, row by row
        nats, ranks = predict_targets(model, torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
        cuts = np.cumsum([window.end - window.first_predicted for window in batch])[:-1]
        for (block, begin, first, end), row_nats, row_ranks in zip(batch, np.split(nats, cuts), np.split(ranks, cuts)):
            results[block].nats[first:end] = row_nats
            results[block].ranks[first:end] = row_ranks
            results[block].positions[first:end] = np.arange(first - begin, end - begin)
    return results


def _batch_windows(windows: list[_Window]) -> Iterator[list[_Window]]:
    """Batch windows of similar length together, so that little of a batch is padding."""
    remaining = iter(sorted(windows, key=lambda window: window.begin - window.end))
    while first := next(remaining, None):
        rows = max(1, BATCH_TOKENS // (first.end - first.begin))
        yield [first, *islice(remaining, rows - 1)]


def predict_targets(model: GPTModel, ids: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and ranks, each (predicted tokens,), of the targets (batch, tokens) that are not -1, row by row.

    `ids` is (batch, tokens). Rank 0 means that the target is the model's first guess. See `BlockScore`.
    """
    is_target = targets >= 0  # (batch, tokens)
    hidden, chosen = model.compute_hidden(ids)[is_target], targets[is_target]  # (predicted, emb_dim), (predicted,)
    if isinstance(model.out_head, nn.Linear):
        nats, ranks = calc_losses_and_ranks(hidden, model.out_head.weight, chosen)  # (predicted,) each
    else:  # a head of rounded weights, which only the layer itself can multiply with
        pieces = [
            _score_logits(model.out_head(rows), row_targets)  # (512, vocabulary) at most
            for rows, row_targets in zip(hidden.split(512), chosen.split(512))
        ]
        nats, ranks = (torch.cat(values) for values in zip(*pieces))  # (predicted,) each
    return nats.cpu().double().numpy(), ranks.cpu().numpy()  # in this order: Apple's GPUs have no doubles


def _score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `calc_losses_and_ranks`, (rows,) each, from logits (rows, vocabulary)."""
    losses = F.cross_entropy(logits, targets, reduction="none")  # (rows,)
    ranks = (logits >= logits.gather(1, targets[:, None])).sum(dim=1) - 1  # (rows,)
    return losses, torch.where(losses.isnan(), logits.shape[1], ranks)


@dataclass(frozen=True)
class Evaluation:
    """A model's score on one side of the split. A score that is not finite is NaN or infinite here, null in JSON."""

    side: str
    """The side of the split that was scored: holdout, or val if there is no holdout."""
    also_used_for_selection: bool
    """Whether this text also chose the checkpoint, which makes the scores a little too good."""
    blocks: int
    bytes: int
    tokens: int
    loss: float
    """Nats per token."""
    perplexity: float
    """exp(loss), per token. It compares only between models with the same tokenizer."""
    bits_per_byte: float
    top1: float
    """Share of tokens that were the model's most likely guess."""
    top5: float
    """Share of tokens among the model's five most likely guesses."""
    loss_by_position: tuple[float, ...]
    """Mean nats of the tokens predicted from position 0, 1, ... of a window. Position p has seen p + 1 tokens, with the
    end-of-text id at the start of a block. Positions from half a context on also hold the later windows of long
    blocks. NaN if nothing was predicted from a position."""
    per_block: tuple[dict[str, Any], ...]
    """For each block its sha256, document, bytes, nats and tokens, for the paired comparison of two models."""
    available_bytes: int | None = None
    """Bytes of the whole side; more than `bytes` if the blocks are a sample. None if an earlier release made the
    evaluation, which scored the whole side."""
    low: float | None = None
    """Lower bound of bits_per_byte, with `high` an interval of 95 % (compare.measure_interval). None if unknown."""
    high: float | None = None
    """Upper bound of bits_per_byte."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for json.dumps(..., allow_nan=False)."""
        return _replace_non_finite(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Evaluation":
        """Read what `to_json` returned; None becomes NaN."""
        scores = {key: _restore_nan(data[key]) for key in ("loss", "perplexity", "bits_per_byte")}
        positions = tuple(_restore_nan(value) for value in data["loss_by_position"])
        blocks = tuple({**block, "nats": _restore_nan(block["nats"])} for block in data["per_block"])
        return cls(**{**data, **scores, "loss_by_position": positions, "per_block": blocks})


def _restore_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _replace_non_finite(value: Any) -> Any:
    """Copy nested data with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_blocks(
    model: GPTModel,
    tokenizer: Tokenizer,
    blocks: Iterable[Block],
    device: torch.device | str,
    side: str = "holdout",
    scores: Iterable[BlockScore] | None = None,
) -> Evaluation:
    """Score a model, with its own tokenizer, on blocks of text of one side of the split.

    Pass `scores` if the blocks have been scored already (see parallel.py). Losses that are not finite are reported as
    they are. Raises CorpusError if there is no text to score.

    For example, `evaluate_blocks(model, tokenizer, read_blocks(snapshot.path, "holdout"), "cpu").bits_per_byte`.
    """
    blocks = list(blocks)
    if scores is None:
        scores = score_blocks(model, tokenizer, (block.text for block in blocks), device)
    per_block: list[dict[str, Any]] = []
    hits = np.zeros(2)  # tokens among the model's first guess, and among its first five
    sums, counts = np.zeros((2, model.context_length))  # (context,) each: nats and tokens by position
    for block, score in zip(blocks, scores):
        totals = {"bytes": score.num_bytes, "nats": float(score.nats.sum()), "tokens": len(score.ids)}
        per_block.append({"sha256": block.sha256, "document": block.document, **totals})
        hits += (score.ranks < 1).sum(), (score.ranks < 5).sum()
        np.add.at(sums, score.positions, score.nats)
        np.add.at(counts, score.positions, 1)
    if not counts.any():
        raise CorpusError(
            f"The {side} side has no text to score ({len(blocks)} blocks). Add text or raise its fraction."
        )
    return _summarize(side, per_block, hits, sums, counts)


def _summarize(
    side: str, per_block: list[dict[str, Any]], hits: np.ndarray, sums: np.ndarray, counts: np.ndarray
) -> Evaluation:
    """Build the evaluation from totals: `hits` (2,), `sums` and `counts` (context,)."""
    nats, num_bytes, tokens = (sum(block[key] for block in per_block) for key in ("nats", "bytes", "tokens"))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        perplexity = float(np.exp(np.float64(nats / tokens)))
        loss_by_position = tuple((sums / counts).tolist())  # (context,)
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

"""Batches for training and evaluation: windows of a token array, as inputs and targets.

A window is `context` ids, and the same ids shifted by one as targets. The book's `GPTDatasetV1` and
`create_dataloader_v1` cut windows from a text. `Batches` cuts them from a token file, in an order that depends only on
seed and step, so a resumed training sees the same windows as an uninterrupted one. No window copies the corpus.
tokens/files.py makes the token files.
"""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gptcore.errors import ConfigError, CorpusError
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import END_OF_TEXT, load_tiktoken_encoding

BatchPairs = Sequence[tuple[Tensor, Tensor]]
"""Pairs of inputs and targets, each (rows, tokens) int64."""


def num_windows(n: int, context: int, stride: int) -> int:
    """Return how many windows of `context` inputs and their targets `n` tokens hold, one every `stride` tokens.

    As in the book, the last window may end with the last token: 10 tokens hold 2 windows of 4 at stride 4.
    """
    return len(range(0, n - context, stride))


class GPTDatasetV1(Dataset):
    """The book's sliding windows over a text: item i is (ids[s : s + L], ids[s + 1 : s + L + 1]) at s = i * stride.

    The ids are stored once, 4 bytes each. A window is a slice of them, converted to int64 on access.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        """Encode `txt`. Raises ConfigError if max_length or stride is below 1, CorpusError if no window fits the text.

        `tokenizer` is a tiktoken encoding or anything else with `encode(text)`, such as a gptcore Tokenizer. Only in an
        encoding whose `encode` takes `allowed_special` is <|endoftext|> the special token, as in the book.
        """
        for name, value in (("max_length", max_length), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"GPTDatasetV1: {name} is {value}, it must be at least 1.")
        self.token_ids = _encode(tokenizer, txt)
        if len(self.token_ids) <= max_length:
            raise CorpusError(
                f"the text has {len(self.token_ids)} tokens, and a window of max_length {max_length} with its targets "
                f"needs {max_length + 1}. Give more text, or a smaller max_length."
            )
        self.max_length = max_length
        self.stride = stride

    def __len__(self) -> int:
        return num_windows(len(self.token_ids), self.max_length, self.stride)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        """Return input and target, each (max_length,) int64. Raises IndexError."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"window {idx} of {len(self)}")
        begin = (idx % len(self)) * self.stride
        ids = self.token_ids[begin : begin + self.max_length + 1]  # (max_length + 1,)
        window = torch.from_numpy(ids.astype(np.int64))  # (max_length + 1,)
        return window[:-1], window[1:]


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    *,
    tokenizer: Any = None,
) -> DataLoader:
    """Make the book's loader: batches of (input, target), each (batch_size, max_length) int64.

    Without a `tokenizer`, takes GPT-2's, which needs no network.
    """
    dataset = GPTDatasetV1(txt, tokenizer or load_tiktoken_encoding("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)


class Batches:
    """Training batches as a pure function of the step, so an interrupted run resumes without a saved position.

    Each epoch visits the windows once, in its own order. The last windows of an epoch are left out if they do not fill
    an update. The order is the stable argsort of the raw 64-bit stream of NumPy's Philox-4x64 with the key (seed,
    epoch). This algorithm has published values (Salmon et al. 2011), so the order does not change with a release of
    NumPy or torch. No global random state is read or changed.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        stride: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """`tokens`: (tokens,) ids, mapped, streamed or in memory.

        With several ranks, each reads batch_size / num_ranks rows of every micro-batch; num_ranks divides batch_size.
        Raises CorpusError if the tokens do not fill one update.
        """
        self.context, self.stride = context, stride
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.num_windows = num_windows(len(tokens), context, stride)
        self._rows = batch_size // num_ranks
        self._own_rows = slice(rank * self._rows, (rank + 1) * self._rows)
        self._tokens = tokens if _is_streamed(tokens) else np.asarray(tokens)
        self._order: tuple[int, np.ndarray] | None = None
        _check_side("train", len(tokens), context, stride, self.windows_per_step)

    @property
    def windows_per_step(self) -> int:
        """Windows in one update, of all ranks together."""
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one update, of all ranks together."""
        return self.windows_per_step * self.context

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the windows."""
        return self.num_windows // self.windows_per_step

    def make_micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return the micro-batches of update `step` (from 0): (input, target) pairs, each (rows, context) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.windows_per_step
        chosen = self._order_of(epoch)[begin : begin + self.windows_per_step]  # (windows_per_step,)
        own = chosen.reshape(self.accumulation, self.batch_size)[:, self._own_rows].flatten()  # (accumulation * rows,)
        inputs, targets = _cut_windows(self._tokens, own * self.stride, self.context)  # (accumulation * rows, context)
        return list(zip(inputs.split(self._rows), targets.split(self._rows)))

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the windows of an epoch in its order, (num_windows,). Keeps the newest epoch's order."""
        if self._order is None or self._order[0] != epoch:
            stream = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_windows)
            self._order = epoch, np.argsort(stream, kind="stable")
        return self._order[1]


def feed(batches: Batches, step: int, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the micro-batches of update `step` and of all later updates, without end, on `device`.

    For a CPU they are made on demand. For another device, a thread makes the next ones during the computation, and
    copies them to the device. For CUDA it copies from pinned memory, so that nothing waits for the copy.
    """
    if device.type == "cpu":
        yield from map(batches.make_micro_batches, itertools.count(step))
        return  # never reached, because the iterator does not end

    def make_on_device(step: int) -> list[tuple[Tensor, Tensor]]:
        return [(_copy(inputs, device), _copy(targets, device)) for inputs, targets in batches.make_micro_batches(step)]

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(make_on_device, step)
        for next_step in itertools.count(step + 1):
            ready, pending = pending.result(), thread.submit(make_on_device, next_step)
            yield ready


def _copy(ids: Tensor, device: torch.device) -> Tensor:
    return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)


def make_eval_batches(
    tokens: np.ndarray, context: int, batch_size: int, num_batches: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Make the (input, target) batches of an evaluation, each (batch, context) int64, the same ones on every call.

    The windows do not overlap, and are spaced evenly over the tokens so that they represent the whole text. The last
    batch may be smaller. With `num_batches` None, the batches hold every window.
    """
    total = num_windows(len(tokens), context, context)
    wanted = total if num_batches is None else min(total, num_batches * batch_size)
    starts = np.arange(wanted) * total // max(wanted, 1) * context  # (wanted,)
    starts_of_batches = (starts[begin : begin + batch_size] for begin in range(0, wanted, batch_size))
    return [_cut_windows(tokens, batch, context) for batch in starts_of_batches]


def check_sizes(tokens: Tokens, context: int, stride: int, windows_per_update: int) -> None:
    """Raise CorpusError if train does not fill one update, or val has no window. The error says what to change."""
    _check_side("train", tokens.counts["train"], context, stride, windows_per_update)
    _check_side("val", tokens.counts["val"], context, stride=context, windows=1)


def _check_side(side: str, count: int, context: int, stride: int, windows: int) -> None:
    if num_windows(count, context, stride) >= windows:
        return
    least = context + (windows - 1) * stride + 1
    raise CorpusError(
        f"the {side} split has {count} tokens, but {windows} window{'s' * (windows > 1)} of context_length {context} "
        f"at stride {stride} need at least {least}. Give more text, or lower model.context_length"
        + (", train.batch_size or train.accumulation." if windows > 1 else ".")
    )


def _encode(tokenizer: Any, txt: str) -> np.ndarray:
    """Encode `txt` -> ids (tokens,) uint32."""
    takes_special = "allowed_special" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(txt, allowed_special={END_OF_TEXT}) if takes_special else tokenizer.encode(txt)
    return np.asarray(ids, dtype=np.uint32)


def _is_streamed(tokens: Any) -> bool:
    """Whether `tokens` are a `gptcore.tokens.stream.StreamedIds`, which is not an array."""
    return hasattr(tokens, "read_windows")


def _cut_windows(tokens: Any, starts: Sequence[int] | np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the windows at `starts`, each (windows, context) int64."""
    if _is_streamed(tokens):
        windows = tokens.read_windows(starts, context + 1).astype(np.int64)  # (windows, context + 1)
    else:
        view = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context + 1)  # (all starts, context + 1)
        windows = view[starts].astype(np.int64)  # (windows, context + 1)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

"""What a training step reads: windows of a token array, as batches of inputs and targets.

A window is `context` ids and the same ids shifted by one. The seed's `GPTDatasetV1` and `create_dataloader_v1` cut
them from a text; `Batches` cuts them from a token file in an order that is a function of seed and step alone, so that
a resumed training sees what an uninterrupted one would have seen. No window copies the corpus. Where token files come
from stands in tokens.py.
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
from gptcore.text.tokens import Tokens, load_tokens, tokenize
from gptcore.tokenizer import END_OF_TEXT, tiktoken_encoding

__all__ = [
    "Batches",
    "GPTDatasetV1",
    "Tokens",
    "check_sizes",
    "create_dataloader_v1",
    "eval_batches",
    "feed",
    "load_tokens",
    "num_windows",
    "tokenize",
]


def num_windows(n: int, context: int, stride: int) -> int:
    """How many windows of `context` inputs and their targets `n` tokens hold, one every `stride` tokens.

    It is the seed's count, `len(range(0, n - context, stride))`: the last window may end with the last token.
    """
    return len(range(0, n - context, stride))


class GPTDatasetV1(Dataset):
    """The seed's sliding windows over a text: item i is (ids[s : s + L], ids[s + 1 : s + L + 1]) at s = i * stride.

    The ids are held once, 4 bytes each; a window is a slice of them, converted to int64 when it is asked for.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        """`tokenizer` is a tiktoken encoding, in which <|endoftext|> is the special token as in the book, or a gptcore
        Tokenizer, in which it is text like any other, or anything else with `encode(text)`. Raises ConfigError if
        max_length or stride is below 1."""
        for name, value in (("max_length", max_length), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"GPTDatasetV1: {name} is {value}, it must be at least 1.")
        self.token_ids = _ids(tokenizer, txt)
        self.max_length = max_length
        self.stride = stride

    def __len__(self) -> int:
        return num_windows(len(self.token_ids), self.max_length, self.stride)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        """Input and target, each (max_length,) int64. Raises IndexError."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"window {idx} of {len(self)}")
        begin = (idx % len(self)) * self.stride
        window = torch.from_numpy(self.token_ids[begin : begin + self.max_length + 1].astype(np.int64))
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
    """The seed's loader: batches of (input, target), each (batch_size, max_length) int64.

    `tokenizer` is GPT-2's, which needs no network, where it is left out.
    """
    dataset = GPTDatasetV1(txt, tokenizer or tiktoken_encoding("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)


class Batches:
    """Training batches as a pure function of the step: nothing has to be saved to go on where a run was cut off.

    Each epoch visits the windows once, in an order of its own; those that do not fill a whole update are left out.
    The order is the stable argsort of the raw 64-bit stream of NumPy's Philox-4x64 with the key (seed, epoch), an
    algorithm with published values (Salmon et al. 2011), so it does not change with a release of NumPy or torch, and
    no global random state is read or moved.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        stride: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`tokens`: (tokens,) ids, mapped, streamed or in memory. `share` (rank, ranks): of each micro-batch this rank
        reads its part of the rows alone; batch_size is divisible by the ranks. Raises CorpusError if the tokens do not
        fill one update."""
        self.context, self.stride = context, stride
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.num_windows = num_windows(len(tokens), context, stride)
        rank, ranks = share
        self._rows = batch_size // ranks
        self._own = slice(rank * self._rows, (rank + 1) * self._rows)
        self._tokens = tokens if _is_streamed(tokens) else np.asarray(tokens)
        self._order: tuple[int, np.ndarray] | None = None
        _check("train", len(tokens), context, stride, self.windows_per_step)

    @property
    def windows_per_step(self) -> int:
        """Windows that one update learns from."""
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update learns from."""
        return self.windows_per_step * self.context

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the windows."""
        return self.num_windows // self.windows_per_step

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of update `step`, counted from 0: (input, target) pairs, each (rows, context) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.windows_per_step
        chosen = self._order_of(epoch)[begin : begin + self.windows_per_step]
        own = chosen.reshape(self.accumulation, self.batch_size)[:, self._own].flatten()
        inputs, targets = _gather(self._tokens, own * self.stride, self.context)
        return list(zip(inputs.split(self._rows), targets.split(self._rows)))

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            stream = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_windows)
            self._order = epoch, np.argsort(stream, kind="stable")
        return self._order[1]


def feed(batches: Batches, step: int, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The micro-batches of update `step` and of every one after it.

    On a CPU they are made when they are asked for. For another device, a thread makes the next ones while it computes,
    and copies them there, from pinned memory where it is CUDA, so that nobody waits for the copy.
    """
    if device.type == "cpu":
        yield from map(batches.batch, itertools.count(step))  # without end

    def there(step: int) -> list[tuple[Tensor, Tensor]]:
        return [(_copied(inputs, device), _copied(targets, device)) for inputs, targets in batches.batch(step)]

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(there, step)
        for following in itertools.count(step + 1):
            ready, coming = coming.result(), thread.submit(there, following)
            yield ready


def _copied(ids: Tensor, device: torch.device) -> Tensor:
    return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)


def eval_batches(
    tokens: np.ndarray, context: int, batch_size: int, num_batches: int | None
) -> list[tuple[Tensor, Tensor]]:
    """The same (input, target) batches every time, each (batch, context) int64.

    They hold non-overlapping windows, evenly spaced over the tokens so that no part of the text stands for all of it;
    the last batch may be smaller. `num_batches` None takes every window.
    """
    total = num_windows(len(tokens), context, context)
    wanted = total if num_batches is None else min(total, num_batches * batch_size)
    starts = np.arange(wanted) * total // max(wanted, 1) * context
    batches = (starts[begin : begin + batch_size] for begin in range(0, wanted, batch_size))
    return [_gather(tokens, batch, context) for batch in batches]


def check_sizes(tokens: Tokens, context: int, stride: int, windows_per_update: int) -> None:
    """Raises CorpusError if train does not fill one update or val has no window, with the counts and the cure."""
    _check("train", tokens.counts["train"], context, stride, windows_per_update)
    _check("val", tokens.counts["val"], context, context, 1)


def _check(side: str, count: int, context: int, stride: int, windows: int) -> None:
    if num_windows(count, context, stride) >= windows:
        return
    least = context + (windows - 1) * stride + 1
    raise CorpusError(
        f"the {side} split has {count} tokens, but {windows} window{'s' * (windows > 1)} of context_length {context} "
        f"at stride {stride} need at least {least}. Give more text, or lower model.context_length"
        + (", train.batch_size or train.accumulation." if windows > 1 else ".")
    )


def _ids(tokenizer: Any, txt: str) -> np.ndarray:
    """(tokens,) uint32."""
    special = "allowed_special" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(txt, allowed_special={END_OF_TEXT}) if special else tokenizer.encode(txt)
    return np.asarray(ids, dtype=np.uint32)


def _is_streamed(tokens: Any) -> bool:
    """Whether they are `gptcore.text.streamed.StreamedIds`, which are no array."""
    return hasattr(tokens, "windows")


def _gather(tokens: Any, starts: Sequence[int] | np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the windows at `starts`: (windows, context) int64 each."""
    if _is_streamed(tokens):
        windows = tokens.windows(starts, context + 1).astype(np.int64)
    else:
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context + 1)[starts].astype(np.int64)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

"""Token files read from an object store as training asks for them: block by block, into a cache of bounded size.

Training reads windows in a random order, a KB or two each. The blocks around those of a batch are fetched side by side,
and the ones that were used last are kept. The directory is at a URL that fsspec opens, as in s3://BUCKET/PREFIX;
credentials and endpoints come from the environment of the process, as the storage's package documents it, and stand in
no configuration.
"""

import importlib.util
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from gptcore import manifest
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, SourceUnavailable
from gptcore.text.stored import telling
from gptcore.text.tokens import Tokens, dtype_of, of_manifest
from gptcore.tokenizer import VOCABULARY

BLOCK_BYTES = 64 * 1024
MAX_BLOCKS = 4096
"""Of each side: together 256 MiB."""

_READERS = 16
"""Blocks on their way at once: an object store answers after tens of milliseconds, but many requests side by side."""

_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a failed read is tried again."""


class StreamedIds:
    """(tokens,) the ids of one side, read when they are asked for: slices, and windows."""

    ndim = 1

    def __init__(self, url: str, count: int, dtype: np.dtype) -> None:
        """Raises CheckpointError if the object has not `count` ids, and as `load`."""
        self._url, self.dtype, self.shape = url, dtype, (count,)
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="tokens")
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._files: threading.local | None = None
        with _in_our_words(url):
            self._state = self._info()
        found, expected = self._state["size"], str(count * dtype.itemsize)
        if found != expected:
            raise CheckpointError(f"{url} has {found} bytes, its manifest says {expected}: it was altered.")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, asked: slice) -> np.ndarray:
        """(ids,) of a slice without a step."""
        start, stop, step = asked.indices(len(self))
        assert step == 1, "read it in order"
        made, most = np.empty(max(0, stop - start), self.dtype), _READERS * BLOCK_BYTES // self.dtype.itemsize
        for begin in range(0, len(made), most):
            part = made[begin : begin + most]
            part[:] = self.windows([start + begin], len(part))[0]
        return made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """(starts, length) ids: what `sliding_window_view(ids, length)[starts]` is of an array."""
        size, places = length * self.dtype.itemsize, [int(start) * self.dtype.itemsize for start in starts]
        spans = [range(place // BLOCK_BYTES, -(-(place + size) // BLOCK_BYTES)) for place in places]
        blocks = self._blocks(sorted({number for span in spans for number in span}))
        made = np.empty((len(starts), length), self.dtype)
        for row, place, span in zip(made, places, spans, strict=True):
            there = b"".join(blocks[number] for number in span)
            row[:] = np.frombuffer(there, self.dtype, length, place - span.start * BLOCK_BYTES)
        return made

    def _blocks(self, numbers: list[int]) -> dict[int, bytes]:
        for pause in (*_PAUSES, None):
            try:
                with self._lock:
                    return self._blocks_once(numbers)
            except (GPTCoreError, ImportError, MemoryError):
                raise
            except Exception as error:
                self._files = None
                if pause is None:
                    tried = f"tried {1 + len(_PAUSES)} times in {sum(_PAUSES):g} seconds"
                    raise SourceUnavailable(
                        f"{self._url} cannot be read any more ({tried}): {_said(error)}. What was saved stays: run the "
                        "same command again when it is back."
                    ) from None
                time.sleep(pause)
        raise AssertionError("returned or raised")

    def _blocks_once(self, numbers: list[int]) -> dict[int, bytes]:
        if self._files is None:
            if self._info() != self._state:
                raise CheckpointError(f"{self._url} was replaced while it was read. Prepare the run again.")
            self._files = threading.local()
        missing = [number for number in numbers if number not in self._kept]
        fetched = self._readers.map(partial(self._fetched, self._files), missing)
        found = dict(zip(missing, fetched, strict=True))
        for number in numbers:
            if number in self._kept:
                self._kept.move_to_end(number)
                found[number] = self._kept[number]
        self._kept.update((number, found[number]) for number in missing)
        while len(self._kept) > MAX_BLOCKS:
            self._kept.popitem(last=False)
        return found

    def _fetched(self, files: Any, number: int) -> bytes:
        """One block, through a file of this thread alone."""
        if not hasattr(files, "opened"):
            filesystem, path = _opened(self._url)
            files.opened = filesystem.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
        begin = number * BLOCK_BYTES
        size = min(BLOCK_BYTES, len(self) * self.dtype.itemsize - begin)
        files.opened.seek(begin)
        data = bytes(files.opened.read(size))
        if len(data) != size:
            raise EOFError(f"{len(data)} bytes came from byte {begin} on, not {size}")
        return data

    def _info(self) -> dict[str, str]:
        filesystem, path = _opened(self._url)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return {**telling(info), "size": str(info["size"])}


@dataclass(frozen=True)
class StreamedTokens(Tokens):
    """A token directory behind a URL. `path` holds a copy of its manifest and its tokenizer, while this exists."""

    url: str = ""
    held: Any = field(default=None, repr=False, compare=False)
    """Removes `path`."""

    def side(self, side: str) -> np.ndarray:
        """The ids of "train" or "val": no array, but all of one that `gptcore.data` asks for."""
        dtype = dtype_of(self.n_vocab)
        if self.counts[side] == 0:
            return np.empty(0, dtype=dtype)
        return cast(np.ndarray, StreamedIds(f"{self.url}/{side}.bin", self.counts[side], dtype))


def load(url: str) -> StreamedTokens:
    """The token directory at `url`, verified as far as `load_tokens` verifies one on disk.

    Raises ConfigError for an address with a password or a storage whose package is missing, CheckpointError where
    nothing complete is there, SourceUnavailable where the storage does not answer.
    """
    url = url.rstrip("/")
    _check(url)
    held = tempfile.TemporaryDirectory(prefix="gptflow-tokens-")
    path = Path(held.name)
    (path / "tokenizer").mkdir()
    for name in (manifest.MANIFEST, f"tokenizer/{VOCABULARY}"):
        with _in_our_words(f"{url}/{name}"):
            filesystem, place = _opened(url)
            (path / name).write_bytes(filesystem.cat_file(f"{place}/{name}"))
    tokens = StreamedTokens(**vars(of_manifest(path)), url=url, held=held)
    for side in tokens.counts:
        tokens.side(side)
    return tokens


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.password or parts.username or "@" in parts.netloc:
        raise ConfigError(
            f"the tokens' address {parts.scheme}://...@{parts.netloc.rpartition('@')[2]} holds credentials: give them "
            "in the environment, as the storage's package documents it."
        )
    if parts.scheme in ("s3", "s3a") and importlib.util.find_spec("s3fs") is None:
        raise ConfigError(f"{url} needs the package s3fs, which is not installed: pip install 'gptflow[s3]'")


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


@contextmanager
def _in_our_words(url: str) -> Iterator[None]:
    try:
        yield
    except GPTCoreError:
        raise
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: {error}. pip install it.") from None
    except FileNotFoundError:
        raise CheckpointError(f"{url} does not exist: there is no complete token directory.") from None
    except Exception as error:
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise ConfigError(
                f"{url} may not be read: {_said(error)}. Credentials come from the environment: for s3://, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the machine."
            ) from None
        raise SourceUnavailable(f"{url} does not answer: {_said(error)}.") from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(".:").partition("\n")[0]
